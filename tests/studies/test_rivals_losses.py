"""Rivals that hold the model to the base's outputs, against dense float64 computations of their formulas."""

import itertools

import pytest
import torch
from architectures import t5 as small_t5
from peft import LoraConfig, get_peft_model

from alignguard.data import collate, encode_example
from studies.rivals import ConstrainedSFT, Rival, Run, StoredLogits, TaskKL, make_rival, train_rival

TARGETS = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture
def run(tiny_llama, tokenizer, alignment_rows):
    """A run on a model with a non-zero adapter, in float64."""
    model = get_peft_model(tiny_llama(torch.float64), LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    fill(model, 0.6)
    rows = [encode_example(tokenizer, r["prompt"], r["response"]) for r in alignment_rows]
    return Run(model.train(), rows, 0, seed=5)


def fill(model, size):
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = size * torch.randn(p.shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def batch(tokenizer, task_rows):
    return collate([encode_example(tokenizer, r["prompt"], r["response"]) for r in task_rows[:3]], 0)


def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]


def by_token(run, batch):
    """(place in its response, base's distribution, the model's, token) of each supervised token, by a plain loop."""
    with torch.no_grad(), run.model.disable_adapter():
        base = logits(run.model, batch).softmax(-1)
    present = logits(run.model, batch).softmax(-1)
    for row, labels in enumerate(batch["labels"][:, 1:].tolist()):
        place = 0
        for column, token in enumerate(labels):
            if token != -100:
                yield place, base[row, column], present[row, column], token
                place += 1


def check_losses(rival, run, batch, expected):
    """The losses, and the gradient of their sum."""
    losses = rival.token_losses(run, batch)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-9, atol=1e-9)
    parameters = run.parameters()
    ours = torch.autograd.grad(losses.sum(), parameters, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(sum(expected), parameters, retain_graph=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    return ours


def test_constrained_sft_weighs_tokens_by_place_and_by_what_they_gained(run, batch):
    rival = ConstrainedSFT(first=0.5, early=2.0, later=0.1, length=5)
    beta = lambda place: 0.5 if place == 0 else 2.0 if place < 5 else 0.1
    tokens = list(by_token(run, batch))
    assert max(place for place, *_ in tokens) > 5
    expected = [
        -2 / beta(place) * (1 / (1 + (-beta(place) * (p[t] / b[t]).log()).exp())).log() for place, b, p, t in tokens
    ]
    gradient = check_losses(rival, run, batch, expected)
    # the cross entropy's gradient, each token's times 2 sigmoid(-beta log ratio)
    weights = [2 / (1 + (beta(place) * (p[t] / b[t]).log()).exp()) for place, b, p, t in tokens]
    assert min(weights) < 1 < max(weights) and max(weights) - min(weights) > 0.05
    weighted = sum(-w.detach() * p[t].log() for w, (_, _, p, t) in zip(weights, tokens, strict=True))
    for a, b in zip(gradient, torch.autograd.grad(weighted, run.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_constrained_sft_has_the_cross_entropys_gradient_at_the_base(run, batch):
    for name, p in run.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    ours = torch.autograd.grad(ConstrainedSFT().token_losses(run, batch).sum(), run.parameters())
    plain = -sum(p[t].log() for _, _, p, t in by_token(run, batch))
    for a, b in zip(ours, torch.autograd.grad(plain, run.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_task_kl_is_cross_entropy_and_the_divergence_from_the_base(run, batch, weighted):
    expected = [
        -(p[t].detach() if weighted else 1.0) * p[t].log() + 0.7 * (b * (b / p).log()).sum()
        for _, b, p, t in by_token(run, batch)
    ]
    check_losses(TaskKL(strength=0.7, weighted=weighted), run, batch, expected)


def test_stored_logits_are_the_bases_and_the_error_is_squared(run):
    rival = StoredLogits(strength=0.3, batch=2, examples=3)
    kept = {n: p.detach().clone() for n, p in run.model.named_parameters() if "lora_B" in n}
    for name, p in run.model.named_parameters():
        if name in kept:
            p.data.zero_()
    rival.start(run)
    for name, p in run.model.named_parameters():
        if name in kept:
            p.data.copy_(kept[name])
    assert len(rival.buffer) == 3 and run.examples_read == 3
    for step, places in ((0, (0, 1)), (1, (2, 0))):
        batch = collate([run.alignment[i] for i in places], 0)
        keep = batch["labels"][:, 1:] != -100
        with torch.no_grad(), run.model.disable_adapter():
            stored = logits(run.model, batch)[keep]
        error = logits(run.model, batch)[keep] - stored
        expected = torch.autograd.grad(0.3 * (error**2).sum() / error.numel(), run.parameters())
        for p in run.parameters():
            p.grad = torch.ones_like(p)
        rival.gradients(run, step)
        for p, g in zip(run.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad - 1, g, rtol=1e-7, atol=1e-9)
    assert run.examples_read == 7


LOSSES = {"constrained-sft": {}, "task-kl": {"weighted": True}, "stored-logits": {"batch": 2}}


def updates(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.fixture
def trained(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    counter = itertools.count()

    def train(rival, model=None, **training):
        targets = TARGETS if model is None else ["q", "wo"]
        return train_rival(
            rival, tiny_llama() if model is None else model, task_rows, alignment_rows, tmp_path / str(next(counter)),
            tokenizer=tokenizer, lora={"r": 2, "target_modules": targets},
            training={"max_steps": 3, "per_device_train_batch_size": 4, **training},
        )  # fmt: skip

    return train


def t5():
    torch.manual_seed(0)
    return small_t5()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_each_trains_and_differs_from_plain(trained, name, kind):
    make = (lambda: None) if kind == "causal" else t5
    rival = make_rival(name, LOSSES[name])
    result = trained(rival, make())
    assert len(result.step_seconds) == 3 and (result.examples_read > 0) == rival.reads_alignment
    plain = updates(trained(Rival(), make()).model)
    ours = updates(result.model)
    assert all(p.isfinite().all() for p in ours.values())
    assert any(not torch.equal(p, plain[n]) for n, p in ours.items())


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_an_own_loss_is_averaged_as_the_models_is(trained, kind):
    """With no weight on the KL the loss is the cross entropy: the same steps as plain, accumulated or not."""
    make = (lambda: None) if kind == "causal" else t5
    for training in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        plain, ours = (trained(rival, make(), **training) for rival in (Rival(), TaskKL(strength=0.0)))
        for name, p in updates(plain.model).items():
            torch.testing.assert_close(updates(ours.model)[name], p, rtol=1e-4, atol=1e-6)
        assert [e["loss"] for e in ours.history] == pytest.approx([e["loss"] for e in plain.history], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("constrained-sft", {"first": 0}, "first must lie above 0"),
        ("constrained-sft", {"later": float("nan")}, "later must lie in"),
        ("constrained-sft", {"length": 0}, "length"),
        ("task-kl", {"strength": -1}, "strength"),
        ("task-kl", {"weighted": 2}, "weighted"),
        ("stored-logits", {"strength": -0.1}, "strength"),
        ("stored-logits", {"examples": 0}, "examples"),
        ("stored-logits", {"batch": 1.5}, "batch"),
    ],
)
def test_settings_out_of_range_are_named(name, settings, words):
    with pytest.raises(ValueError, match=words):
        make_rival(name, settings)
