"""Scripts: a mixture of experts that begins by saying what its dense model says, and the prose of pages and docstrings."""

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


def test_prose_is_what_is_left_of_a_page_without_code_and_stays_on_its_line():
    page = "One `code` word.\n\n```python\nvery = 1\n```\n\n| a table | very |\nSee [this](very.md) \\(very\\) and\n  ```sh\n  very\n  ```\nend."
    left = script("prose").prose(page).split("\n")
    assert left[0] == "One X word." and left[7] == "See [thisX X and" and left[11] == "end."
    assert not any("very" in line for line in left) and len(left) == page.count("\n") + 1


def test_docstrings_stay_on_their_lines():
    code = '"""Module."""\nx = "very"\n\n\ndef f():\n    """First.\n\n    Second.\n    """\n    return "very"\n'
    left = script("prose").docstrings(code).split("\n")
    assert (left[0], left[5].strip(), left[7].strip()) == ("Module.", "First.", "Second.") and "very" not in "".join(
        left
    )
