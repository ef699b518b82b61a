"""The digest of all weights against a plain one, and what it must and must not see."""

import copy
import hashlib

import pytest
import torch
from accelerate import disk_offload
from families import BUILD, build, documents
from torch import nn

from cramlab.errors import LoadError
from cramlab.hf.weights import config_digest, weights_digest


def of_parameters(model):
    """What folders of every version hold."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(f"{name} {tuple(parameter.shape)}\0".encode())
        sha.update(parameter.detach().float().numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("name", BUILD)
def test_it_is_that_of_the_parameters_in_any_precision(name):
    model = build(name)
    half = copy.deepcopy(model).bfloat16()
    assert weights_digest(model) == weights_digest(model.double()) == of_parameters(build(name))
    assert weights_digest(half) == of_parameters(half)


@pytest.mark.parametrize("at", [0, 70, -1])
def test_every_number_counts(at):
    model, other = build("llama"), build("llama")
    for name, parameter in other.named_parameters():
        with torch.no_grad():
            parameter.view(-1)[min(at, parameter.numel() - 1)] += 1e-3
        assert weights_digest(model) != weights_digest(other), name
        with torch.no_grad():
            parameter.copy_(model.get_parameter(name))
    assert weights_digest(model) == weights_digest(other)


def test_digits_that_single_precision_would_lose_count():
    model = build("gpt2").double()
    before = weights_digest(model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-12
    assert weights_digest(model) != before
    codes = nn.Module()
    codes.code = nn.Parameter(torch.tensor([2**24 + 1]), requires_grad=False)
    before = weights_digest(codes)
    codes.code.data -= 1
    assert weights_digest(codes) != before


def test_buffers_count_if_they_are_saved():
    model = nn.BatchNorm1d(3)
    before = weights_digest(model)
    model.running_mean += 1
    assert weights_digest(model) != before
    model.register_buffer("passing", torch.zeros(3), persistent=False)
    before = weights_digest(model)
    model.passing += 1
    assert weights_digest(model) == before


def test_weights_kept_on_disk_are_read_from_there(tmp_path):
    model = build("llama")
    disk_offload(away := build("llama"), tmp_path)
    assert {p.device.type for p in away.parameters()} == {"meta"}
    assert weights_digest(away) == weights_digest(model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[-1, -1] += 1e-3
    assert weights_digest(away) != weights_digest(model)


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = BUILD["gpt2"]()
    with pytest.raises(LoadError, match=r"transformer.h.0.attn.c_attn.bias has no values"):
        weights_digest(model)


def test_the_configuration_counts_but_for_where_it_is_from():
    model, other = build("llama"), build("llama")
    other.config._name_or_path, other.config.transformers_version = "elsewhere", "0"
    other(input_ids=torch.stack(documents(1, 8)))  # running a model does not change what it is
    assert config_digest(model) == config_digest(other)
    other.config.rms_norm_eps = 0.5
    assert config_digest(model) != config_digest(other)
    assert config_digest(model) != config_digest(build("llama").bfloat16())
    assert config_digest(nn.Linear(2, 2)) == config_digest(nn.Linear(2, 2))
