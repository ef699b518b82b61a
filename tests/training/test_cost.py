import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cramlab.config import overridden
from cramlab.experiments.srcd import run_config
from cramlab.mixer import Routing
from cramlab.model import SequenceModel
from cramlab.training.cost import measured_shares, surroundings
from cramlab.training.evaluate import split_batches


def tiny(*overrides, mixer="cram"):
    config = run_config(mixer=mixer, size="tiny", seed=0)
    config = overridden(config, ["training.n_validation_tokens=2048", *overrides])
    torch.manual_seed(0)
    model = SequenceModel(config.model, config.task.input_spec).eval()
    for name, gate in model.named_modules():
        if name.endswith((".gate", ".salience")):  # some tokens pass, others do not
            nn.init.normal_(gate.out.weight)
            nn.init.zeros_(gate.out.bias)
    return config, model


def test_what_stands_around_the_mixers_is_what_a_counter_sees():
    config, model = tiny("model.n_layers=2")
    batch = next(iter(split_batches(config, "validation")))
    with FlopCounterMode(display=False) as counter:
        model(batch)
    seen = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    around, mlps = surroundings(model)
    heads = ("embedding", "level_head", "answer_head")
    assert around * batch.n_tokens == sum(seen[f"SequenceModel.{name}"] for name in heads)
    for i, mlp in enumerate(mlps):
        parts = ("mlp_in", "mlp_out")
        assert mlp * batch.n_tokens == sum(seen[f"SequenceModel.layers.{i}.{name}"] for name in parts)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_training_shares_are_those_of_training_with_its_audits(n_layers):
    config, model = tiny(
        f"model.n_layers={n_layers}", "training.audit_frac=0.3", "model.mixer.episodic.write=salience",
        "model.mixer.episodic.write_audit_frac=0.4",
    )  # fmt: skip
    decoding, training = measured_shares(config, model)[0]
    layer = model.blocks[0].mixer
    n_tokens, read, written = 0, 0, 0
    for batch in split_batches(config, "validation"):
        share = torch.where(batch.retrieval_mask, config.training.audit_supervised_frac, config.training.audit_frac)
        for audited in range(n_layers):
            audits = (torch.rand(share.shape) < share) if audited == 0 else None
            trace = model.train()(batch, routing=Routing(audits=audits), counterfactual_layer=audited).traces[0]
            n_tokens += batch.n_tokens
            read += int((trace.scored & batch.valid).sum())
            written += int(trace.written.sum())
    assert decoding.read_frac < training.read_frac == pytest.approx(read / n_tokens, abs=0.05)
    assert decoding.write_frac < training.write_frac == pytest.approx(written / n_tokens, abs=0.05)
    layer.config = dataclasses.replace(layer.config, router=dataclasses.replace(layer.config.router, name="always"))
    decoding, training = measured_shares(config, model)[0]
    assert training.read_frac == decoding.read_frac  # audits are for the gate that learns
