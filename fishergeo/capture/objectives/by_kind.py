"""One scalar objective per example, by the kind of Fisher asked for.

The Fisher of DESIGN-level definition needs G_i, the gradient of example i's own objective. Everything about where
labels come from lives here; nothing here knows about layers or hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fishergeo.capture.model_adapters import problem_type, unwrapped
from fishergeo.capture.objectives.labels import Alignment, Rows, logits_and_labels, on_labels
from fishergeo.capture.objectives.weights import FirstTokens

Kind = Literal["empirical", "mc", "type2", "ggn", "margin"]

KINDS: tuple[str, ...] = ("empirical", "mc", "type2", "ggn", "margin")

REDUCTIONS = ("mean", "sum")

LossFunction = Callable[[nn.Module, Any], Tensor]
"""``(model, batch) -> (n,)``: one loss an example, each depending on its own example only."""


@dataclass(frozen=True)
class Objective:
    """What is differentiated on one batch.

    Attributes:
        values: (n,) one objective an example, attached to the graph: the mean over its supervised tokens, or what a
            loss of the user's gives.
        counts: (n,) long, the supervised tokens of each example; an example with none is no datum.
        draws: number of objectives of this batch that make up its Fisher; the gradients' squares add up over them.
        token_scale: (n,) what turns the objective into that of the (weighted) sum over tokens; ``counts`` if None.
    """

    values: Tensor
    counts: Tensor
    draws: int = 1
    token_scale: Tensor | None = None


def example_objectives(
    model: nn.Module,
    batch: Any,
    kind: str = "empirical",
    loss: LossFunction | None = None,
    generator: torch.Generator | None = None,
    token_weights: Callable[[Any], Tensor] | None = None,
    draw: int = 0,
    max_draws: int = 256,
    alignment: Alignment | None = None,
) -> Objective:
    """Objectives of every example in a batch, from one batched forward pass.

    Args:
        model: a Hugging Face style model (``model(**batch).logits``), or anything at all with a ``loss``.
        batch: a dict with ``labels`` (−100 is ignored); anything the ``loss`` understands.
        kind: ``"empirical"``: cross-entropy at the labels of the data. ``"mc"``: cross-entropy at labels drawn from
            the model at every supervised position, contexts as in the data, one draw, so that the gradients'
            second moment is an unbiased estimate of the Fisher information. ``"type2"``: that information itself,
            the expectation over the classes of every supervised token; the objective of draw t·C + c is
            √p_c·(−log p_c) at the t-th supervised token, times the token's share, with p held fixed. ``"ggn"``: the
            generalised Gauss-Newton matrix of the example's own mean loss, the same with the square root of the
            share, hence equal to type2 for one token an example and T times it for T equally weighted ones; for the
            mean squared error over K outputs, draw k is √(2/K) times output k.
            ``"margin"``: log-sum-exp of the other logits minus the label's logit, whose gradient does not vanish
            where the model is sure. Floating-point labels mean the mean squared error, unless the model's
            ``config.problem_type`` is ``"multi_label_classification"`` (the mean binary cross-entropy over outputs,
            each an independent outcome of two) or ``"single_label_classification"`` (labels are distributions over
            the classes); integer labels mean it where that is ``"regression"``.
        loss: ``(model, batch) -> (n,)`` instead of the model's own; only with ``kind="empirical"``.
        generator: a CPU generator for ``"mc"``; draws are consumed in the order of the supervised tokens, so they
            do not depend on how the examples are batched or padded.
        token_weights: ``batch -> labels-shaped`` non-negative weights; an example's objective is then the weighted
            mean over its supervised tokens. One of weight zero is not supervised.
        draw: number of the objective of the batch, below ``draws``.
        max_draws: the most passes that type2 and ggn may take over one batch.
        alignment: from :func:`fishergeo.capture.objectives.labels.label_alignment`.

    Returns:
        Objective of n examples.

    Raises:
        ValueError: for an unknown kind, a batch without examples, missing labels, labels that are no classes, shapes that
            do not fit, or more draws than ``max_draws``.
        TypeError: if the batch is not a mapping or its labels no tensor, and no ``loss`` was given.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known; take one of {', '.join(KINDS)}")
    if loss is not None:
        if kind != "empirical":
            raise ValueError(f"kind={kind!r} needs the model's logits; leave out loss, or use kind='empirical' with it")
        if token_weights is not None:
            raise ValueError("token_weights apply to the built-in loss only; weight the tokens inside your loss")
        values = loss(model, batch)
        if not isinstance(values, Tensor) or values.ndim != 1:
            found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ValueError(f"loss returned {found}; it must return (n,), one value an example")
        if len(values) == 0:
            raise ValueError("a batch holds no example; leave it out")
        return Objective(values, _ones(values))
    logits, labels = logits_and_labels(model, batch, alignment)
    return objectives_of_outputs(
        unwrapped(model), logits, labels, batch, kind, generator, token_weights, draw, max_draws
    )


def objectives_of_outputs(
    model: nn.Module,
    logits: Tensor,
    labels: Tensor,
    batch: Any,
    kind: str,
    generator: torch.Generator | None = None,
    token_weights: Callable[[Any], Tensor] | None = None,
    draw: int = 0,
    max_draws: int = 256,
) -> Objective:
    """The built-in objectives, of logits and the labels that stand against them; arguments as :func:`example_objectives`.

    Args:
        model: unwrapped.
        logits: (n, ..., classes).
        labels: (n, ...).
        batch: that they are of, for token weights.
        kind: the kind.
        generator: of sampled labels.
        token_weights: weights of tokens.
        draw: number of the objective.
        max_draws: the most of them.

    Raises:
        ValueError: as :func:`example_objectives`.
    """
    if len(labels) == 0:
        raise ValueError("a batch holds no example; leave it out")
    problem, floating = problem_type(model, logits, labels), labels.is_floating_point()
    if problem == "regression" or (problem is None and floating):
        if token_weights is not None:
            raise ValueError(f"token_weights need the labels of a classifier, got {labels.dtype} ones to regress on")
        return _regression(logits, labels, kind, draw, max_draws)
    weights = None
    if type(token_weights) is FirstTokens:
        # Among the labels that are predicted, to which a causal model's first does not belong.
        weights = token_weights({"labels": labels})
    elif token_weights is not None:
        weights = on_labels(token_weights(batch), batch, labels)
    if problem == "multi_label_classification" or floating:
        if weights is not None:
            raise ValueError(f"token_weights need integer labels of one token each, got {labels.dtype} {problem}")
        rows = (Rows.of_bits if problem == "multi_label_classification" else Rows.of_probabilities)(logits, labels)
    else:
        rows = Rows.of(logits, labels, weights)
    if kind in ("type2", "ggn"):
        return _class_draw(rows, kind, draw, max_draws)
    return _categorical(rows, kind, generator)


def _regression(logits: Tensor, labels: Tensor, kind: str, draw: int, max_draws: int) -> Objective:
    """The mean squared error over an example's outputs."""
    outputs = (logits.float() if logits.dtype != torch.float64 else logits).reshape(len(labels), -1)
    if kind == "ggn":
        width = outputs.shape[1]
        _check_draws(kind, width, max_draws, f"{width} outputs")
        values = outputs[:, draw] * (2.0 / width) ** 0.5
        return Objective(values, _ones(values), draws=width)
    if kind != "empirical":
        raise ValueError(
            f"kind={kind!r} needs the labels of a classifier, got {labels.dtype} ones to regress on, of which 'ggn' and "
            "'empirical' make something; soft or binary labels are told by the model's config.problem_type"
        )
    targets = labels.reshape(len(labels), -1)
    if targets.shape != outputs.shape:
        raise ValueError(f"outputs {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}; pass loss=")
    values = (outputs - targets).square().mean(1)
    return Objective(values, _ones(values))


def _ones(values: Tensor) -> Tensor:
    return torch.ones(len(values), dtype=torch.long, device=values.device)


def _categorical(rows: Rows, kind: str, generator: torch.Generator | None) -> Objective:
    targets = sample_categorical(rows.logits.detach(), generator) if kind == "mc" else rows.targets
    if kind == "margin":
        if targets.ndim != 1:
            raise ValueError("kind='margin' needs labels that are classes, not distributions over them")
        hit = torch.zeros_like(rows.logits, dtype=torch.bool).scatter_(1, targets[:, None], True)
        others = rows.logits.masked_fill(hit, -torch.inf)
        per_token = torch.logsumexp(others, 1) - rows.logits.gather(1, targets[:, None])[:, 0]
    else:
        per_token = nn.functional.cross_entropy(rows.logits, targets, reduction="none")
    return Objective(rows.summed(per_token * rows.share, rows.example), rows.tokens, token_scale=rows.total)


def _class_draw(rows: Rows, kind: str, draw: int, max_draws: int) -> Objective:
    """One class at one supervised token of every example.

    Σ_c p_c ∇(−log p_c) ∇(−log p_c)ᵀ is the Fisher of one token; labels of different tokens are drawn independently
    and scores have mean zero, so the terms between tokens vanish.
    """
    classes = rows.logits.shape[1]
    longest = int(rows.counts.max()) if len(rows.counts) else 0
    draws = max(1, longest * classes)
    _check_draws(kind, draws, max_draws, f"{classes} classes at up to {longest} supervised tokens an example")
    token, label = divmod(draw, classes)
    starts = rows.counts.cumsum(0) - rows.counts
    chosen = torch.arange(len(rows.example), device=rows.example.device) - starts[rows.example] == token
    log_p = rows.logits[chosen].log_softmax(1)[:, label]
    share = rows.share[chosen] if kind == "type2" else rows.share[chosen].sqrt()
    values = rows.summed(-log_p * (0.5 * log_p.detach()).exp() * share, rows.example[chosen])
    # A draw past an example's last token leaves it out; the sum still has to hang on the graph.
    values = values + 0.0 * rows.logits[:1].sum()
    scale = (rows.tokens if rows.total is None else rows.total).to(values.dtype)
    return Objective(values, rows.tokens, draws, scale if kind == "type2" else scale.sqrt())


def _check_draws(kind: str, draws: int, most: int, what: str) -> None:
    if draws > most:
        raise ValueError(
            f"kind={kind!r} takes a pass for each of {what}: {draws} for this batch, more than max_draws={most}; "
            "kind='mc' estimates the same from one, or raise max_draws"
        )


def sample_categorical(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws one class a row by inversion of one uniform variate each, the same on every device.

    Args:
        logits: (m, classes).
        generator: CPU generator; the default one if None.

    Returns:
        (m,) long.
    """
    uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64).to(logits.device, logits.dtype)
    cumulative = logits.softmax(1).cumsum(1)
    index = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    return index[:, 0].clamp_max(logits.shape[1] - 1)
