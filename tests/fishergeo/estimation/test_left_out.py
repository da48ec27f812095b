"""What layers=None leaves out, with one warning that lists it, and what it must not."""

import warnings

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

import fishergeo as fg

IDS = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0))
LM = {"input_ids": IDS, "labels": IDS}
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=1))


def adapted(model, task="CAUSAL_LM", **options):
    return get_peft_model(model, LoraConfig(task_type=task, r=2, **options))


def square(model, batch):
    return model(batch).flatten(1).square().mean(1)


def found(model, batches, structure="gram", **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fg.estimate_fisher(model, batches, structure, **options)
    return result, [str(w.message) for w in caught if "layers=None" in str(w.message)]


def models():
    torch.manual_seed(0)
    bert = hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3))
    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1))
    return {
        "classifier": (
            adapted(bert, "SEQ_CLS", target_modules=["query"]),
            LM | {"labels": IDS[:, 0] % 3},
            "original_module",
        ),
        "mamba": (mamba, LM, "dt_proj"),
    }


@pytest.mark.parametrize("name", ["classifier", "mamba"])
@pytest.mark.parametrize("structure", ["gram", "ekfac"])
def test_modules_that_are_never_called_are_left_out_with_one_warning(name, structure):
    model, batch, missing = models()[name]
    fisher, said = found(model, [batch] * 2, structure)
    assert len(said) == 1 and missing in said[0] and not any(missing in layer for layer in fisher)
    assert set(fisher.header.shapes) == set(fisher) and len(fisher) > 0
    named, _ = found(model, [batch] * 2, structure, layers=list(fisher))
    for layer in fisher:
        assert torch.equal(named[layer].to_dense(), fisher[layer].to_dense())


def test_a_layer_that_is_named_and_never_called_is_an_error():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model.forward = lambda x: model["a"](x)
    loss = lambda m, b: m["a"](b).square().sum(1)
    with pytest.raises(ValueError, match=r"'b'.*received no gradient"):
        fg.estimate_fisher(model.double(), [X], "gram", layers=["a", "b"], loss=loss)
    fisher, said = found(model, [X], loss=loss)
    assert list(fisher) == ["a"] and len(said) == 1
    halves = fg.sketch_shards(model, [X], 2, rank=2, loss=loss)
    assert [list(half) for half in halves] == [["a"], ["a"]]


def test_the_checkpoint_of_a_pass_that_leaves_out_goes_on(tmp_path):
    model, batch, missing = models()["classifier"]
    path, want = tmp_path / "pass.safetensors", found(model, [batch] * 4, "ekfac")[0]
    reads = []

    def batches():
        for number in range(4):
            reads.append(number)
            if len(reads) == 7:
                raise KeyboardInterrupt
            yield batch

    class Twice:
        def __iter__(self):
            return batches()

    with pytest.raises(KeyboardInterrupt):
        fg.estimate_fisher(model, Twice(), "ekfac", checkpoint=path, checkpoint_every=1)
    got = fg.estimate_fisher(model, [batch] * 4, "ekfac", checkpoint=path, checkpoint_every=1)
    assert set(got) == set(want) and not any(missing in layer for layer in got)
    for layer in got:
        assert torch.equal(got[layer].to_dense(), want[layer].to_dense())


def test_tied_modules_are_one_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    model[2].weight = model[0].weight
    fisher, said = found(model, [X], loss=square)
    assert list(fisher) == ["0", "4"] and len(said) == 1 and "'0' and '2' are one tied parameter" in said[0]
    want = 0
    for i in range(4):
        (g,) = torch.autograd.grad(square(model, X[i : i + 1]).sum(), model[0].weight)
        want = want + g @ g.T / 4
    assert torch.allclose(fisher["0"].to_dense(), want, rtol=1e-10)
    with pytest.raises(ValueError, match="one tied parameter"):
        fg.estimate_fisher(model, [X], "gram", layers=["0", "2"], loss=square)


def test_a_linear_tied_to_what_cannot_be_captured_is_left_out():
    class Odd(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return x @ self.weight

    first = nn.Linear(3, 3)
    model = nn.Sequential(first, Odd(first.weight), nn.Linear(3, 2)).double()
    fisher, said = found(model, [X], loss=square)
    assert list(fisher) == ["2"] and len(said) == 1 and "'1' (Odd)" in said[0]


@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_the_output_embedding_is_left_out_under_an_adapter(options):
    fisher, said = found(adapted(llama(), **options), [LM])
    assert len(fisher) == 7 and not any("lm_head" in name for name in fisher) and not said


def test_an_encoder_of_torchs_own():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    fisher, said = found(model, [x], loss=lambda m, b: m(b)[..., 0].square().mean(1))
    assert {"layers.0.linear1", "layers.0.linear2"} <= set(fisher) and len(said) <= 1


def test_a_stream_multiplies_what_is_never_called_by_zero_and_says_so_once():
    model, batch, missing = models()["classifier"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stream = fg.StreamingFisher(model, [batch])
        blocks = {name: torch.ones(size, 2, dtype=stream.dtype) for name, size in stream.sizes.items()}
        products, again = stream.multi_matmul(blocks), stream.multi_matmul(blocks)
    assert len([w for w in caught if "layers=None" in str(w.message)]) == 1
    fisher, _ = found(model, [batch])
    idle = set(stream) - set(fisher)
    assert idle and all(missing in name for name in idle)
    for name, product in products.items():
        want = torch.zeros_like(product) if name in idle else fisher[name] @ blocks[name]
        assert torch.allclose(product, want, rtol=1e-4, atol=1e-7) and torch.equal(product, again[name])
    name = min(idle)
    assert not stream.multi_matmul({name: blocks[name]})[name].any() and stream.passes == 2


def test_a_stream_refuses_weights_that_are_read_without_a_call():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model.forward = lambda x: model["a"](x) @ model["b"].weight
    stream = fg.StreamingFisher(model.double(), [X], loss=square)
    blocks = {name: torch.ones(size, 1, dtype=torch.float64) for name, size in stream.sizes.items()}
    with pytest.warns(UserWarning, match="layers=None"), pytest.raises(RuntimeError, match=r"'b'.*not called"):
        stream.multi_matmul(blocks)
