"""Scripts that make testbeds: a mixture of experts that begins by saying what its dense model says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPTS = Path(__file__).parent.parent / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("experts", "chosen", "tied"), [(2, 1, True), (4, 2, False), (3, 3, True)])
def test_an_upcycled_mixture_says_what_the_dense_model_says(experts, chosen, tied):
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()
    mixture = script("upcycle").upcycled(dense, experts, chosen, seed=0)
    ids = torch.randint(0, 50, (3, 11))
    torch.testing.assert_close(mixture(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-6)
    assert mixture.config.num_local_experts == experts and mixture.config.num_experts_per_tok == chosen
    # and only because the experts are one: another expert is another answer
    with torch.no_grad():
        mixture.model.layers[0].mlp.experts.down_proj[0] += 1.0
    assert not torch.allclose(mixture(ids).logits, dense(ids).logits, atol=1e-2)
