"""What is mended stays found: with each mending switched off, the proof of the first batch names the layer.

Mendings of the objective itself (what labels mean, where they stand) are none of these: autograd differentiates the same
objective. They are held against the model's own loss, here and in ``tests/fishergeo/capture/test_labels.py``.
"""

import pytest
import torch
import transformers as hf
from peft import PromptTuningConfig, get_peft_model
from torch import nn

import fishergeo as fg
from fishergeo.capture import hooks, records
from fishergeo.capture.kinds import convolutions, known, norms
from fishergeo.capture.objectives import by_kind, labels
from fishergeo.estimation import sweep

X = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))


def square(model, batch):
    return model(batch).flatten(1).square().mean(1)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = self.b(torch.tanh(self.a(x)))
        h[:, 3:] = 0.0
        return h


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 0.25, self.bias)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(torch.tanh(x + self.embed(torch.arange(x.shape[1]))))


class Choices(nn.Module):
    """Several rows an example, flattened."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.flatten(0, 1)))).view(*x.shape[:2], 2)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


def hooked():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    model[0].register_forward_hook(lambda module, args, output: 3.0 * output)
    return model


def left_padded(_):
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    ids = torch.where(mask > 0, IDS, 2)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask > 0, ids, -100)}
    batch["labels"][1, 3] = -100
    model = Wrapper(hf.GPT2LMHeadModel(config).double().eval())
    return fg.estimate_fisher(model, [batch], "gram", layers="*mlp.c_fc")


def decoder(_):
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    target = torch.where(torch.arange(7) < torch.tensor([[7], [3], [5]]), IDS, -100)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": target}
    model = hf.T5ForConditionalGeneration(config).double().eval()
    return fg.estimate_fisher(model, [batch], "kfac", layers="decoder*SelfAttention.q")


def over(model, x=X, layers=None):
    def run(_):
        torch.manual_seed(0)
        return fg.estimate_fisher(model().double(), [x], "gram", layers=layers, loss=square)

    return run


def images(n, channels, size):
    return torch.randn(n, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def time_major(name, tensor, examples, lengths):
    return tensor.reshape(-1, examples, tensor.shape[-1]).transpose(0, 1)


def last(patch):
    """A user's hook first, as they were registered."""
    kept = nn.Module.register_forward_hook
    patch.setattr(
        nn.Module, "register_forward_hook", lambda self, hook, prepend=False, **more: kept(self, hook, **more)
    )


MENDINGS = {
    "outputs changed in place": (over(InPlace), lambda p: p.setattr(hooks, "unaliased", lambda output: output)),
    "hooks of the user's": (over(hooked), last),
    "a derived class": (over(lambda: nn.Sequential(Scaled(3, 4), nn.Tanh(), nn.Linear(4, 2))),
                        lambda p: p.setattr(known, "linear_scale", lambda *a: 1.0)),
    "shared positions": (over(Positions, X[:, :4], ["embed", "out"]), None),
    "several rows": (over(Choices), lambda p: p.setattr(records, "by_example", time_major)),
    "groups": (over(lambda: nn.Conv2d(4, 4, 2, groups=2), images(3, 4, 4), ""),
               lambda p: p.setattr(convolutions, "_apart", lambda rows, groups: rows.repeat_interleave(groups, 1))),
    "transposed convolution": (over(lambda: nn.ConvTranspose2d(3, 2, 2, padding=1, stride=2), images(3, 3, 4), ""),
                               lambda p: p.setattr(convolutions.TransposedConvolution, "terms", unpadded_terms)),
    "channel norm": (over(lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh()), images(3, 4, 4), "0"),
                     lambda p: p.setattr(norms, "run_with", lambda module, args, kwargs, *scales: args[0])),
    "a wrapper's left padding": (left_padded, lambda p: p.setattr(labels, "unwrapped", lambda model: model)),
    "a decoder's padding": (decoder, lambda p: p.setattr(sweep, "target_mask", lambda model, batch: None)),
}  # fmt: skip


def unpadded_terms(self, module, call):
    padded = nn.functional.pad(call.gradient, [2, 0, 2, 0])
    return call.args[0].flatten(2).mT, convolutions._patches(padded, module, call.args[0].shape[2:])


@pytest.mark.parametrize("what", [name for name, (_, off) in MENDINGS.items() if off is not None])
def test_the_proof_finds_what_a_switched_off_mending_lets_through(what, monkeypatch):
    run, off = MENDINGS[what]
    run(None)
    if what == "channel norm":  # the probe of the scales would name it first
        monkeypatch.setattr(norms.Norm, "examine", lambda *a: 1.0)
    off(monkeypatch)
    with pytest.raises(RuntimeError, match=r"not autograd's|counts .* positions"):
        run(None)


def test_the_proof_finds_positions_that_are_taken_for_examples(monkeypatch):
    monkeypatch.setattr(hooks.Capture, "_each_its_own", lambda self, path, ids, output: output)
    with pytest.raises(RuntimeError, match=r"'embed'.*rows"):
        over(Positions, X[:, :4], ["embed", "out"])(None)


# Where the proof is the mending: without it a number comes, and it is another.


def penalised():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))

    def loss(m, b):
        z = b.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(m(z).sum(), z, create_graph=True)
        return m(b)[:, 0] + 10 * (g.norm(dim=1) - 1).square()

    return model, X[:, 0], loss, "0"


def time_first():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 1)
    x = torch.randn(5, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, x, lambda m, b: m(b.transpose(0, 1))[..., :3].square().mean((0, 2)), "layers.0.linear1"


@pytest.mark.parametrize("fault", [penalised, time_first])
def test_without_the_proof_a_wrong_number_comes(fault):
    torch.manual_seed(0)
    model, batch, loss, name = fault()
    model = model.double()
    with pytest.raises((RuntimeError, ValueError), match=name):
        fg.estimate_fisher(model, [batch], "gram", layers=name, loss=loss)
    try:
        got = fg.estimate_fisher(model, [batch], "gram", layers=name, loss=loss, verify=False)[name].to_dense()
    except RuntimeError as error:  # not all of it depends on the proof
        assert "differentiates inside" in str(error)
        return
    model.eval()
    want = 0
    for i in range(len(batch)):
        (g,) = torch.autograd.grad(loss(model, batch[i : i + 1]).sum(), model.get_submodule(name).weight)
        want = want + g @ g.T / len(batch)
    assert (got - want).norm() > 1e-3 * want.norm()


def test_without_the_proof_statistics_of_the_batch_depend_on_the_batching():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    model, x = nn.Sequential(nn.Linear(3, 6), norm, nn.Tanh(), nn.Linear(6, 4)).double(), X[:, 0]
    with pytest.raises(RuntimeError, match="'0'"):
        fg.estimate_fisher(model, [x], "gram", layers="0", loss=square)
    one, two = (
        fg.estimate_fisher(model, batches, "gram", layers="0", loss=square, verify=False)["0"].to_dense()
        for batches in ([x], [x[:2], x[2:]])
    )
    assert (one - two).norm() > 1e-3 * one.norm()


def test_without_the_proof_as_many_images_as_examples_are_taken_for_one_each():
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = hf.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=59,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = hf.LlavaForConditionalGeneration(config).double().eval()
    ids = torch.randint(1, 50, (2, 14))
    ids[0, :10] = 59  # two images in the first example, none in the second
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": images(2, 3, 8),
        "labels": torch.where(ids == 59, -100, ids),
    }
    name = "model.multi_modal_projector.linear_1"
    with pytest.raises((RuntimeError, ValueError), match=r"linear_1|examples"):
        fg.estimate_fisher(model, [batch], "diagonal", layers=[name])
    got = fg.estimate_fisher(model, [batch], "diagonal", layers=[name], verify=False)[name].diagonal()
    first = {key: value if key == "pixel_values" else value[:1] for key, value in batch.items()}
    (g,) = torch.autograd.grad(model(**first).loss, model.get_submodule(name).weight)
    want = (g.square() / 2).flatten()  # the example of text alone adds nothing
    assert (got - want).norm() > 1e-3 * want.norm()


def llama():
    config = hf.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).double().eval()


def own_loss_gram(model, batch, name):
    want = 0
    for i in range(len(batch["labels"])):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        (g,) = torch.autograd.grad(model(**one).loss, model.get_submodule(name).weight)
        want = want + g @ g.T / len(batch["labels"])
    return want


def test_padding_that_is_supervised_is_refused_and_without_the_proof_counts_as_the_models_loss_has_it():
    torch.manual_seed(0)
    model, name = llama(), "model.layers.0.mlp.down_proj"
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    ids = torch.where(mask > 0, IDS, 0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}  # pads are labels too, by mistake
    with pytest.raises(RuntimeError, match="padding counts"):
        fg.estimate_fisher(model, [batch], "gram", layers=[name])
    got = fg.estimate_fisher(model, [batch], "gram", layers=[name], verify=False)[name].to_dense()
    torch.testing.assert_close(got, own_loss_gram(model, batch, name))


def unshifted():
    config = hf.XLMConfig(vocab_size=50, emb_dim=16, n_layers=1, n_heads=2)
    return hf.XLMWithLMHeadModel(config).double().eval(), "transformer.ffns.0.lin1"


def virtual():
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).double().eval()
    name = "base_model.model.layers.0.mlp.down_proj"
    model.get_submodule(name).weight.requires_grad_(True)
    return model, name


@pytest.mark.parametrize("fault", [unshifted, virtual])
def test_without_the_models_own_loss_labels_stand_where_the_class_name_says(fault, monkeypatch):
    torch.manual_seed(0)
    model, name = fault()
    batch = {"input_ids": IDS, "labels": IDS.clone()}

    def error():
        got = fg.estimate_fisher(model, [batch], "gram", layers=[name])[name].to_dense()
        want = own_loss_gram(model, batch, name)
        return float((got - want).norm() / want.norm())

    assert error() < 1e-5
    monkeypatch.setattr(sweep, "label_alignment", lambda model, batch: "next")
    assert error() > 1e-3


def test_without_the_models_problem_type_floating_labels_are_regressed_on(monkeypatch):
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3,
        problem_type="multi_label_classification",
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config).double().eval()
    batch = {"input_ids": IDS, "labels": torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]]).double()}

    def error():
        got = fg.estimate_fisher(model, [batch], "gram", layers="classifier")["classifier"].to_dense()
        want = own_loss_gram(model, batch, "classifier")
        return float((got - want).norm() / want.norm())

    assert error() < 1e-10
    monkeypatch.setattr(by_kind, "problem_type", lambda *a: "regression")
    with pytest.raises(ValueError, match="a loss of its own"):
        error()
    monkeypatch.setattr(sweep, "check_own_loss", lambda *a: None)
    assert error() > 1e-3


@pytest.mark.parametrize("inside", ["grad", "backward", "jacobian"])
def test_a_loss_that_differentiates_inside_is_refused_by_name(inside):
    def loss(m, b):
        x = b.clone().requires_grad_(True)
        if inside == "jacobian":
            g = torch.autograd.functional.jacobian(lambda z: m(z).sum(0), x, create_graph=True).sum(0)
        elif inside == "backward":
            m(x).sum().backward(create_graph=True)
            g = x.grad
        else:
            (g,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return (g[:, 0] + m(x)[:, 0]).square()

    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    for verify in (True, False):
        with pytest.raises(RuntimeError, match=r"layer '.': the loss differentiates inside"):
            fg.estimate_fisher(model, [X[:, 0]], "gram", loss=loss, verify=verify)
