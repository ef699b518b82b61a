"""Gates of all layers that are learned together: what they do to reads, and which layers they keep."""

import dataclasses

import pytest
import torch

from cramlab.language_model.text import PreparedText
from reproduction.protocols.language import BASE, configs
from reproduction.protocols.static_gates import StaticGates, allowed, arm_of, learn

LAYERS = 3
TINY = dataclasses.replace(
    BASE, vocab_size=30, context=16, d_model=16, n_heads=2, batch_size=4, n_steps=3, warmup_steps=2, eval_every_steps=3,
    precision="32", compile=False,
)  # fmt: skip


@pytest.fixture
def config():
    return configs(TINY, ["all-layers"], [f"n_layers={LAYERS}", "cram.memory_layers=[0, 1, 2]"])[0]


def test_a_gate_scales_the_reads_of_its_layer(config):
    model, tokens = config.build().eval(), torch.arange(16)[None]
    gates = StaticGates(model)
    plain = config.build().eval()
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    gates.drawn = torch.zeros(LAYERS)
    torch.testing.assert_close(model(tokens).logits, plain(tokens, read_none=True).logits)
    gates.drawn = torch.tensor([1.0, 0.5, 1.0])
    with torch.no_grad():
        plain.layers[1].mixer.episodic.w_out.weight *= 0.5
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)


def test_gates_are_open_as_often_as_they_say(config):
    gates = StaticGates(config.build())
    with torch.no_grad():
        gates.logit.copy_(torch.tensor([-3.0, 0.0, 1.5]))
        drawn = []
        for seed in range(4000):
            gates.draw(seed)
            drawn.append(gates.drawn)
    found = (torch.stack(drawn) > 0).float().mean(0)
    torch.testing.assert_close(found, gates.chances().detach(), atol=0.03, rtol=0.0)
    assert 0 < float((torch.stack(drawn) == 1).float().mean()) < 1


def test_the_layer_whose_reads_say_something_is_kept(config, monkeypatch):
    learned = dataclasses.replace(config, n_steps=90, learning_rate=0.01)
    build = type(config).build

    def deaf(self):
        model = build(self)
        for i in (0, 2):
            model.layers[i].mixer.episodic.w_out.register_forward_hook(lambda _module, _given, read: 0.0 * read)
        return model

    monkeypatch.setattr(type(config), "build", deaf)
    half = torch.randint(30, (400, 8), generator=torch.Generator().manual_seed(0))
    stream = torch.cat([half, half], dim=1).flatten().to(torch.int32)
    found = learn(learned, PreparedText(None, stream, stream[:200]), 1)
    assert found["layers"] == [1]
    assert found["gates"][1] > max(found["gates"][0], found["gates"][2])
    assert sum(found["gates"]) < 2  # the price rose until gates closed


def test_the_number_of_open_gates_falls_in_the_second_third():
    assert [allowed(passed, 8, 1) for passed in (0.0, 1 / 3, 0.5, 2 / 3, 1.0)] == pytest.approx([8, 8, 4.5, 1, 1])


def test_a_set_of_layers_has_its_arm():
    assert arm_of([6]) == "layer-6"
    assert arm_of([3, 5, 7]) == "layers-3-5-7"
    assert arm_of([0, 1]) is None
