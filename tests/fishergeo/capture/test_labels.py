"""What labels mean to a model: its problem type, and at which logits they stand, held against the model's own loss."""

import types

import pytest
import torch
import transformers as hf
from peft import PromptTuningConfig, get_peft_model
from small_models import LAYERS, SmallLM, collate, make_examples
from torch import nn

import fishergeo as fg

IDS = torch.randint(5, 50, (5, 7), generator=torch.Generator().manual_seed(0))
BERT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = BERT | {"num_key_value_heads": 1}


def own_gram(model, layer, batch, weight=None):
    """The Gram matrix of every example's gradient of the model's own loss, example by example."""
    weight, total = model.get_submodule(layer).weight if weight is None else weight, 0
    flag, weight.requires_grad = weight.requires_grad, True
    for i in range(len(batch["labels"])):
        one = model(**{key: value[i : i + 1] for key, value in batch.items()})
        g = torch.autograd.grad(one.loss, weight)[0].double()
        total = total + g @ g.T / len(batch["labels"])
    weight.requires_grad = flag
    return total


def check(model, layer, batch, tolerance=1e-10):
    model = model.double().eval()
    got = fg.estimate_fisher(model, [batch], "gram", layers=layer)[layer].to_dense()
    want = own_gram(model, layer, batch)
    assert want.norm() > 1e-9 and (got - want).norm() <= tolerance * want.norm()


def bert_classifier(**more):
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**BERT, **more))


@pytest.mark.parametrize("said", [{"problem_type": "multi_label_classification"}, {}])
def test_floating_labels_of_a_classifier_are_independent_outcomes(said):
    labels = torch.randint(0, 2, (5, 3), generator=torch.Generator().manual_seed(1)).double()
    check(bert_classifier(num_labels=3, **said), "classifier", {"input_ids": IDS, "labels": labels})
    check(bert_classifier(num_labels=3, **said), "classifier", {"input_ids": IDS, "labels": 0.9 * labels + 0.05})


@pytest.mark.parametrize("labels", [torch.zeros(5).long(), torch.arange(5), torch.randn(5).double()])
def test_labels_of_one_output_are_regressed_on_even_if_they_are_integers(labels):
    check(bert_classifier(num_labels=1), "classifier", {"input_ids": IDS, "labels": labels.double()})
    model = bert_classifier(num_labels=1).double().eval()
    found = fg.estimate_fisher(model, [{"input_ids": IDS, "labels": labels}], "gram", layers="classifier")
    want = own_gram(model, "classifier", {"input_ids": IDS, "labels": labels.double()})
    assert torch.allclose(found["classifier"].to_dense(), want)
    assert model.config.problem_type in (None, "regression")


def test_a_vision_model_that_regresses_on_several_outputs():
    config = hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8,
                          patch_size=4, num_labels=3, problem_type="regression")  # fmt: skip
    batch = {"pixel_values": torch.randn(4, 3, 8, 8).double(), "labels": torch.randn(4, 3).double()}
    check(hf.ViTForImageClassification(config), "classifier", batch)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_an_encoder_decoder_that_classifies_reads_no_labels(kind, several):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "d_model": 16,
        "num_labels": 3,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "dropout_rate": 0.0,
    }
    if kind == "T5":
        config = hf.T5Config(**sizes, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
        model = hf.T5ForSequenceClassification(config)
    else:
        parts = {f"{part}_{what}": n for part in ("encoder", "decoder")
                 for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
        model = hf.BartForSequenceClassification(
            hf.BartConfig(**sizes, **parts, dropout=0.0, max_position_embeddings=32)
        )
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (5, 3), generator=generator).double() if several else torch.tensor([0, 1, 2, 1, 0])
    if several:
        model.config.problem_type = "multi_label_classification"
    ids = torch.cat([IDS, torch.full((5, 1), 2)], 1)  # the end, at which both read
    check(model, "classification_head.out_proj", {"input_ids": ids, "labels": labels})


def test_labels_that_are_no_probabilities_are_refused():
    model = bert_classifier(num_labels=3).double()
    with pytest.raises(ValueError, match=r"multi-label.*\[0, 1\]"):
        fg.estimate_fisher(model, [{"input_ids": IDS, "labels": torch.full((5, 3), 2.0)}], "gram", layers="classifier")
    model.config.problem_type = "single_label_classification"
    with pytest.raises(ValueError, match="distributions"):
        fg.estimate_fisher(model, [{"input_ids": IDS, "labels": torch.full((5, 3), 0.5)}], "gram", layers="classifier")


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


def test_a_model_whose_own_loss_does_not_shift_is_not_shifted():
    torch.manual_seed(0)
    model = hf.XLMWithLMHeadModel(hf.XLMConfig(vocab_size=50, emb_dim=16, n_layers=1, n_heads=2))
    check(model, "transformer.ffns.0.lin1", {"input_ids": IDS, "labels": IDS.clone()})


@pytest.mark.parametrize("wrap", [Wrapped, lambda m: torch.compile(m, backend="eager"), lambda m: m])
def test_a_token_classifier_is_one_in_any_wrapper(wrap):
    torch.manual_seed(0)
    model = wrap(hf.BertForTokenClassification(hf.BertConfig(**BERT, num_labels=3)))
    name = next(n for n, _ in model.named_modules() if n.endswith("classifier"))
    check(model, name, {"input_ids": IDS, "labels": IDS % 3})


def test_a_tagger_of_ones_own_says_by_its_loss_how_labels_stand():
    class Tagger(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift, self.embed, self.out = shift, nn.Embedding(50, 6), nn.Linear(6, 4)

        def forward(self, input_ids, labels=None):
            logits = self.out(torch.tanh(self.embed(input_ids)))
            if labels is None:
                return {"logits": logits}
            rows, targets = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
            return types.SimpleNamespace(
                logits=logits, loss=nn.functional.cross_entropy(rows.flatten(0, 1), targets.flatten())
            )

    for shift in (True, False):
        torch.manual_seed(0)
        check(Tagger(shift), "out", {"input_ids": IDS, "labels": IDS % 4})


def test_a_loss_that_is_no_cross_entropy_of_the_logits_is_refused_by_name():
    config = hf.Wav2Vec2Config(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                               conv_dim=(8, 8), conv_kernel=(4, 4), conv_stride=(2, 2), num_feat_extract_layers=2,
                               num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, ctc_loss_reduction="mean")  # fmt: skip
    batch = {"input_values": torch.randn(3, 200), "labels": torch.randint(1, 12, (3, 6))}
    with pytest.raises(ValueError, match=r"Wav2Vec2ForCTC: its own loss .* pass\s+loss="):
        fg.estimate_fisher(hf.Wav2Vec2ForCTC(config), [batch], "gram", layers="lm_head")


@pytest.mark.parametrize("virtual", [1, 3])
def test_the_first_token_is_supervised_from_the_last_virtual_one(virtual):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)).double().eval()
    name, batch = "base_model.model.layers.0.mlp.down_proj", {"input_ids": IDS, "labels": IDS}
    found = fg.estimate_fisher(model, [batch], "gram", layers=[name])
    want = own_gram(model, name, batch)
    assert found.header.tokens == IDS.numel()
    assert (found[name].to_dense() - want).norm() <= 1e-5 * want.norm()  # transformers' loss is in float32


def test_the_probe_is_one_example_and_leaves_random_states_and_settings():
    torch.manual_seed(0)
    model, seen = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), []
    model.register_forward_hook(lambda m, a, k, out: seen.append(len(out.logits)), with_kwargs=True)
    state = torch.get_rng_state()
    fg.estimate_fisher(model, [{"input_ids": IDS, "labels": IDS}] * 3, "gram", layers="*down_proj", verify=False)
    assert seen == [1, 5, 5, 5] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrap", [Wrapped, lambda m: Wrapped(Wrapped(m)), lambda m: torch.compile(m, backend="eager"),
                                  lambda m: Wrapped(torch.compile(m, backend="eager"))])  # fmt: skip
def test_left_padding_counts_for_nothing_in_a_wrapped_gpt2(wrap):
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    model = hf.GPT2LMHeadModel(config).double().eval()
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[1, :3] = 0
    labels = torch.where(mask > 0, ids, -100)
    labels[1, 3] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    alone = [{key: value[i : i + 1, 3 * (i == 1) :] for key, value in batch.items()} for i in range(len(ids))]
    one = fg.estimate_fisher(model, alone, "gram", layers="*h.0.mlp.c_fc")
    two = fg.estimate_fisher(wrap(model), [batch], "gram", layers="*h.0.mlp.c_fc")
    (want,), (got,) = (list(f.values()) for f in (one, two))
    assert torch.allclose(got.to_dense(), want.to_dense(), rtol=1e-10, atol=1e-18)


# Labels that cannot be read end in a name.


@pytest.mark.parametrize(("labels", "error", "words"), [
    (IDS.tolist(), TypeError, "labels of a batch are a list"),
    (torch.full_like(IDS, -1), ValueError, "−100.*range from -1 to -1"),
    (torch.full_like(IDS, 77), ValueError, "range from 77 to 77"),
    (torch.tensor(3), ValueError, "scalar"),
    (None, ValueError, "has no 'labels'"),
])  # fmt: skip
def test_labels_that_are_none_are_named(labels, error, words):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))
    with pytest.raises(error, match=words):
        fg.estimate_fisher(model, [{"input_ids": IDS, "labels": labels}], "gram", layers="*down_proj")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integer_labels_of_any_width_are_the_same(dtype):
    model = SmallLM()
    batch = collate(make_examples([4, 4]))
    batch["labels"] = batch["input_ids"]
    want = fg.estimate_fisher(model, [batch], "gram", layers=list(LAYERS))
    got = fg.estimate_fisher(model, [batch | {"labels": batch["labels"].to(dtype)}], "gram", layers=list(LAYERS))
    assert all(torch.equal(got[name].to_dense(), want[name].to_dense()) for name in LAYERS)


def test_outputs_without_logits_and_batches_without_examples_are_named():
    model = hf.BertForPreTraining(hf.BertConfig(**BERT))
    with pytest.raises(ValueError, match="BertForPreTraining has no logits"):
        fg.estimate_fisher(model, [{"input_ids": IDS, "labels": IDS}], "gram", layers="*.output.dense")
    linear, x = nn.Linear(3, 4), torch.randn(4, 3)
    for batches in ([x, x[:0]], [x[:0]]):
        with pytest.raises(ValueError, match="holds no example"):
            fg.estimate_fisher(linear, batches, "gram", loss=lambda m, b: m(b).square().mean(1))


# Soft and binary labels, every kind, against the definition.


class Classifier(nn.Module):
    """Two layers and a config that says what labels are."""

    def __init__(self, outputs, problem):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, outputs).double()
        self.config = types.SimpleNamespace(problem_type=problem)

    def forward(self, x):
        return {"logits": self.b(torch.tanh(self.a(x)))}


X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def expected(model, labels, kind, binary):
    """(layer -> Fisher of vec(W)) by a sum over every outcome, or over those drawn."""
    total, generator = dict.fromkeys("ab", 0), torch.Generator().manual_seed(0)

    def add(value, weight=1.0):
        for name in "ab":
            g = torch.autograd.grad(value, getattr(model, name).weight, retain_graph=True)[0].flatten()
            total[name] = total[name] + weight * torch.outer(g, g) / len(X)

    for x, y in zip(X, labels, strict=True):
        z = model(x[None])["logits"][0]
        # For each outcome variable, its log-probabilities: one of many classes, or one of two for each output.
        logs = (
            [torch.stack([-z_k.exp().add(1).log(), z_k - z_k.exp().add(1).log()]) for z_k in z]
            if binary
            else [z.log_softmax(0)]
        )
        wanted = [torch.stack([1 - y_k, y_k]) for y_k in y.reshape(-1)] if binary else [y]
        share = 1 / len(logs)
        if kind in ("type2", "ggn"):
            for log in logs:
                for c in range(len(log)):
                    add(-log[c], float(log[c].detach().exp()) * (share**2 if kind == "type2" else share))
        elif kind == "mc":
            draws = torch.rand(len(logs), generator=generator, dtype=torch.float64)
            add(sum(-log[int((log.exp().cumsum(0) <= u).sum())] * share for log, u in zip(logs, draws, strict=True)))
        else:
            add(sum(-(w * log).sum() * share for w, log in zip(wanted, logs, strict=True)))
    return total


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("kind", ["empirical", "mc", "type2", "ggn"])
@pytest.mark.parametrize("form", ["bits", "chances", "one", "soft"])
def test_soft_and_binary_labels_of_every_kind(form, kind, unit):
    generator = torch.Generator().manual_seed(3)
    model = Classifier(
        1 if form == "one" else 3, "single_label_classification" if form == "soft" else "multi_label_classification"
    )
    labels = torch.rand(6, 3, dtype=torch.float64, generator=generator)
    labels = {"bits": labels.round(), "chances": labels, "one": labels[:, 0].round().long(), "soft": labels.softmax(1)}[
        form
    ]
    want = expected(model, labels.double(), kind, form != "soft")
    found = fg.estimate_fisher(model, [{"x": X[:4], "labels": labels[:4]}, {"x": X[4:], "labels": labels[4:]}], "exact",
                               kind=kind, unit=unit)  # fmt: skip
    assert found.header.examples == found.header.tokens == 6
    for name in "ab":
        assert (found[name].to_dense() - want[name]).norm() <= 1e-10 * want[name].norm()


def test_a_margin_needs_classes():
    model = Classifier(3, "single_label_classification")
    with pytest.raises(ValueError, match="margin"):
        fg.estimate_fisher(model, [{"x": X, "labels": torch.rand(6, 3).softmax(1)}], "gram", kind="margin")
    with pytest.raises(ValueError, match="one class"):
        fg.estimate_fisher(Classifier(1, None), [{"x": X, "labels": torch.zeros(6).long()}], "gram")


# The model's own loss where labels are not of tokens, and taggers that say nothing.


class Own(nn.Module):
    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.out, self.loss = nn.Linear(3, 4), loss

    def forward(self, x, labels=None):
        logits = self.out(x)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": self.loss(logits, labels)}


POINTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
CLASSES, TARGETS = torch.tensor([0, 0, 2, 1]), torch.randn(4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("loss", "labels", "name"),
    [
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0, 1.0])), CLASSES, "cross-entropy"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0, 1.0])), torch.tensor([-100, 2, 2, 2]), "cross-entropy"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0, 1.0])), torch.tensor([2]), "cross-entropy"),
        (nn.CrossEntropyLoss(label_smoothing=0.2), CLASSES, "cross-entropy"),
        (nn.MultiMarginLoss(), CLASSES, "cross-entropy"),
        (nn.L1Loss(), TARGETS, "squared error"),
        (nn.HuberLoss(delta=0.1), TARGETS, "squared error"),
        (lambda z, y: 0.5 * nn.functional.mse_loss(z, y), TARGETS, "squared error"),
    ],
)
def test_another_loss_of_the_models_own_is_refused_by_name(loss, labels, name):
    batch = {"x": POINTS[: len(labels)], "labels": labels}
    with pytest.raises(ValueError, match=rf"Own gives a loss of its own.*{name}.*pass loss="):
        fg.estimate_fisher(Own(loss), [batch], "gram")
    fg.estimate_fisher(Own(loss), [batch], "gram", verify=False)
    if labels.is_floating_point():
        with pytest.raises(ValueError, match="kind='ggn' is of that alone"):
            fg.estimate_fisher(Own(loss), [batch], "gram", kind="ggn")
    else:  # whose Fisher is of the probabilities, whatever the loss
        for kind in ("type2", "ggn"):
            fg.estimate_fisher(Own(loss), [batch], "gram", kind=kind)

    def own(model, batch):
        outputs = model.out(batch["x"])
        return torch.stack([loss(outputs[i : i + 1], y[None]) for i, y in enumerate(batch["labels"].clamp_min(0))])

    fg.estimate_fisher(Own(loss), [batch], "gram", loss=own)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_over_all_that_is_supervised_is_the_built_in_one(reduction):
    class Pixels(Own):
        def forward(self, x, labels=None):
            found = super().forward(x)
            if labels is not None:
                rows = found["logits"].flatten(0, 2)
                found["loss"] = nn.functional.cross_entropy(rows, labels.flatten(), reduction=reduction)
            return found

    labels = torch.randint(0, 4, (3, 5, 5), generator=torch.Generator().manual_seed(0))
    labels[0, :3], labels[2, 1:] = -100, -100
    x = torch.randn(3, 5, 5, 3, generator=torch.Generator().manual_seed(1))
    fg.estimate_fisher(Pixels(None), [{"x": x, "labels": labels}], "gram", reduction=reduction)


def test_a_classifier_keeps_its_config():
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=4)).double().eval()
    floats = {"input_ids": IDS, "labels": nn.functional.one_hot(IDS[:, 0] % 4, 4).double()}
    whole = {"input_ids": IDS, "labels": IDS[:, 0] % 4}
    trace = lambda batch: float(fg.estimate_fisher(model, [batch], "gram", layers="classifier")["classifier"].trace())
    alone = trace(floats)
    trace(whole)
    assert trace(floats) == alone and model.config.problem_type is None


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (nn.CrossEntropyLoss(), CLASSES),
        (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
        (nn.MSELoss(), TARGETS),
        (nn.MSELoss(), 1e4 * TARGETS),
    ],
)
def test_the_loss_that_is_differentiated_is_no_other(loss, labels, count):
    fg.estimate_fisher(Own(loss), [{"x": POINTS[:count], "labels": labels[:count]}], "gram")


class Silent(nn.Module):
    """Logits for every token, and no loss."""

    def __init__(self, classes, config=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(50, 6), nn.Linear(6, classes)
        if config is not None:
            self.config = config

    def forward(self, input_ids):
        return {"logits": self.out(torch.tanh(self.embed(input_ids)))}


def test_labels_of_a_module_that_says_nothing_are_its_own_tokens_or_refused():
    labels = torch.where(IDS % 5 == 0, -100, IDS)
    found = fg.estimate_fisher(Silent(50), [{"input_ids": IDS, "labels": labels}], "gram", layers="out")
    assert found.header.tokens == int((labels[:, 1:] != -100).sum())
    for wrong in (IDS % 4, torch.cat([IDS[:, 1:], torch.full_like(IDS[:, :1], -100)], 1)):  # a tagger's, shifted ones
        for config in (None, {"hidden": 6}, types.SimpleNamespace(hidden=6)):
            with pytest.raises(ValueError, match=r"Silent are none of the batch's own tokens.*pass loss="):
                fg.estimate_fisher(Silent(50, config), [{"input_ids": IDS, "labels": wrong}], "gram", layers="out")

    class Renamed(Silent):
        def forward(self, tokens):
            return super().forward(tokens)

    found = fg.estimate_fisher(Renamed(50), [{"tokens": IDS, "labels": labels}], "gram", layers="out")
    assert found.header.tokens == int((labels[:, 1:] != -100).sum())
    with pytest.raises(ValueError, match=r"logits \(4, 4\) do not fit labels \(4, 1\)"):
        fg.estimate_fisher(Own(None), [{"x": POINTS, "labels": CLASSES[:, None]}], "gram")


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_first_tokens_are_the_first_that_are_predicted(tokens):
    batch = {"input_ids": IDS, "labels": IDS.clone()}  # all of them supervised, the first of a sequence too
    estimate = lambda weights: fg.estimate_fisher(
        Silent(50), [batch], "gram", layers="out", token_weights=weights, reduction="sum"
    )["out"]
    by_hand = torch.ones(IDS.shape)
    by_hand[:, 1 : 1 + tokens] = 3.0
    weightings = (fg.FirstTokens(tokens, 3.0), lambda b: by_hand, None)
    found, want, plain = (estimate(weights).to_dense() for weights in weightings)
    torch.testing.assert_close(found, want)
    assert (found - plain).norm() > 0.1 * plain.norm()
