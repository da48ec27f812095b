"""Weights read and written as the matrices that Fishers are of, whatever the kind of layer and the way it is stored."""

import pytest
import torch
from architectures import MODELS, make, merged_weights, move
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fishergeo.capture import (
    adapter_factors,
    gradient_matrix,
    plain_name,
    select_layers,
    weight_matrix,
    write_matrix,
)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.turned = nn.ConvTranspose1d(3, 5, 2)
        self.embed = nn.Embedding(7, 3)
        self.norm = nn.LayerNorm(5)
        self.attention = nn.MultiheadAttention(4, 2)
        self.linear = nn.Linear(3, 2)


LAYERS = [
    "conv",
    "conv+bias",
    "turned",
    "embed",
    "norm",
    "norm.bias",
    "attention.in_proj",
    "linear+bias",
    "linear.bias",
]


@settings(deadline=None, max_examples=20)
@given(name=st.sampled_from(LAYERS), seed=st.integers(0, 99))
def test_what_is_written_is_read_again_and_nothing_else_is_touched(name, seed):
    model = Mixed().double()
    (layer,) = select_layers(model, [name]).values()
    before = {n: p.clone() for n, p in model.named_parameters()}
    matrix = torch.randn(layer.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    own = weight_matrix(layer).detach().clone()
    write_matrix(layer, matrix)
    assert torch.equal(weight_matrix(layer), matrix)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) == (2 if name.endswith("+bias") else 1)
    write_matrix(layer, own)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_that_of_the_matrix(name):
    model = Mixed().double()
    (layer,) = select_layers(model, [name]).values()
    assert gradient_matrix(layer) is None
    weights = torch.randn(layer.shape, dtype=torch.float64)
    (weights * weight_matrix(layer).square()).sum().backward()
    assert torch.allclose(gradient_matrix(layer), 2 * weights * weight_matrix(layer))
    write_matrix(layer, weights, lambda parameter: parameter.grad)
    assert torch.equal(gradient_matrix(layer), weights)


def test_experts_and_conv1d():
    mixtral, gpt2 = MODELS["mixtral"]().double(), MODELS["gpt2"]().double()
    stacked = next(n for n, p in mixtral.named_parameters() if p.ndim == 3)
    (layer,) = select_layers(mixtral, [f"{stacked}.1"]).values()
    parameter = mixtral.get_parameter(stacked)
    others = parameter[[0, 2]].clone()
    matrix = torch.randn(layer.shape, dtype=torch.float64)
    write_matrix(layer, matrix)
    assert torch.equal(weight_matrix(layer), matrix) and torch.equal(parameter[[0, 2]], others)
    name = next(n for n, _ in gpt2.named_modules() if n.endswith("c_attn"))
    (layer,) = select_layers(gpt2, [name]).values()
    assert torch.equal(weight_matrix(layer), gpt2.get_submodule(name).weight.T)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_factors_of_adapters_are_what_peft_adds(model):
    adapted = make(model, "two")
    move(adapted)
    merged = merged_weights(adapted)
    name = next(n for n, _ in adapted.named_modules() if n.endswith(("q_proj.base_layer", "c_attn.base_layer")))
    (layer,) = select_layers(adapted, [name]).values()
    pairs = adapter_factors(adapted, name)
    whole = weight_matrix(layer) + sum(left @ right for left, right in pairs)
    expected = merged[f"{plain_name(name)}.weight"]
    assert len(pairs) == 2 and torch.allclose(whole, expected.T if model == "gpt2" else expected, atol=1e-12)
    with adapted.disable_adapter():
        assert adapter_factors(adapted, name) == []


def test_what_cannot_be_read_or_written_is_named():
    model = nn.Sequential(nn.Linear(3, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    (layer,) = select_layers(model, ["0"]).values()
    assert weight_matrix(layer).shape == (2, 3)
    with pytest.raises(ValueError, match="layer '0' is computed by a parametrisation"):
        write_matrix(layer, torch.ones(2, 3))
    with pytest.raises(ValueError, match="weight and bias together"):
        adapted = make()
        name = next(n for n, _ in adapted.named_modules() if n.endswith("q_proj.base_layer"))
        adapter_factors(adapted, f"{name}+bias")
    dora = make()
    wrapper = dora.get_submodule(name.removesuffix(".base_layer"))
    wrapper.lora_variant["default"] = object()
    with pytest.raises(ValueError, match="not scaling"):
        adapter_factors(dora, name)
