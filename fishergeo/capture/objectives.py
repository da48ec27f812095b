"""One scalar objective per example, by the kind of Fisher asked for.

The Fisher of DESIGN-level definition needs G_i, the gradient of example i's own objective. Everything about where
labels come from lives here; nothing here knows about layers or hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fishergeo.capture.model_adapters import forward_arguments, is_encoder_decoder, shifts_labels, unwrapped

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
        draws: how many objectives of this batch make up its Fisher; the gradients' squares add up over them.
        token_scale: (n,) what turns the objective into that of the sum over tokens; ``counts`` if None.
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
            share, hence equal to type2 for one token an example and T times it for T equally weighted ones; with
            floating-point labels, for the mean squared error over K outputs, draw k is √(2/K) times output k.
            ``"margin"``: log-sum-exp of the other logits minus the label's logit, whose gradient does not vanish
            where the model is sure.
        loss: ``(model, batch) -> (n,)`` instead of the model's own; only with ``kind="empirical"``.
        generator: a CPU generator for ``"mc"``; draws are consumed in the order of the supervised tokens, so they
            do not depend on how the examples are batched or padded.
        token_weights: ``batch -> labels-shaped`` non-negative weights; an example's objective is then the weighted
            mean over its supervised tokens.
        draw: which objective of the batch, below ``draws``.
        max_draws: the most passes that type2 and ggn may take over one batch.

    Returns:
        Objective of n examples.

    Raises:
        ValueError: for an unknown kind, missing labels, shapes that do not fit, or more draws than ``max_draws``.
        TypeError: if the batch is not a mapping and no ``loss`` was given.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known; take one of {', '.join(KINDS)}")
    if loss is not None:
        if kind != "empirical":
            raise ValueError(f"kind={kind!r} needs the model's logits; leave out loss, or use kind='empirical' with it")
        if token_weights is not None:
            raise ValueError("token_weights apply to the built-in loss only; weight the tokens inside your loss")
        values = loss(model, batch)
        if values.ndim != 1:
            raise ValueError(f"loss returned shape {tuple(values.shape)}; it must return (n,), one value an example")
        return Objective(values, _ones(values))
    logits, labels = _supervised(model, batch)
    if not labels.is_floating_point():
        rows = _Rows.of(logits, labels, None if token_weights is None else token_weights(batch))
        if kind in ("type2", "ggn"):
            return _class_draw(rows, kind, draw, max_draws)
        return _categorical(rows, kind, generator)
    outputs = (logits.float() if logits.dtype != torch.float64 else logits).reshape(len(labels), -1)
    if token_weights is not None:
        raise ValueError(f"token_weights need integer labels, got {labels.dtype}")
    if kind == "ggn":
        width = outputs.shape[1]
        _check_draws(kind, width, max_draws, f"{width} outputs")
        values = outputs[:, draw] * (2.0 / width) ** 0.5
        return Objective(values, _ones(values), draws=width)
    if kind != "empirical":
        raise ValueError(f"kind={kind!r} needs integer labels, got {labels.dtype}; 'ggn' and 'empirical' take these")
    values = (outputs - labels.reshape(len(labels), -1)).square().mean(1)
    return Objective(values, _ones(values))


def _ones(values: Tensor) -> Tensor:
    return torch.ones(len(values), dtype=torch.long, device=values.device)


def _supervised(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits and the labels that stand against them, before any shift."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches must yield dicts such as input_ids, attention_mask, labels; got {type(batch).__name__}. "
            "Pass loss=(model, batch) -> (n,) for any other structure"
        )
    if batch.get("labels") is None:
        raise ValueError(f"a batch has no 'labels' (it has {', '.join(map(str, batch))}); add them or pass loss=")
    labels = cast(Tensor, batch["labels"])
    inner = unwrapped(model)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    accepted = forward_arguments(inner)
    if "use_cache" in accepted:
        inputs.setdefault("use_cache", False)
    if is_encoder_decoder(inner):
        prepare = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
        if "decoder_input_ids" not in inputs and prepare is not None:
            inputs["decoder_input_ids"] = prepare(labels=labels)
        elif "decoder_input_ids" not in inputs:
            inputs["labels"] = labels
    else:
        mask = inputs.get("attention_mask")
        left_padded = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
        if left_padded and "position_ids" in accepted and "position_ids" not in inputs and shifts_labels(inner):
            # Models with learned positions count from the left edge: give every example the positions it has alone.
            inputs["position_ids"] = (cast(Tensor, mask).long().cumsum(1) - 1).clamp_min(0)
    output = model(**inputs)
    logits = output["logits"] if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError("the model's output has no logits; pass loss=(model, batch) -> (n,)")
    if labels.ndim == 2 and logits.ndim == 3 and shifts_labels(inner):
        if logits.shape[1] < labels.shape[1]:
            raise ValueError(f"logits of shape {tuple(logits.shape)} do not cover labels {tuple(labels.shape)}")
        logits, labels = logits[:, -labels.shape[1] : -1], labels[:, 1:]
    return logits, labels


@dataclass(frozen=True)
class _Rows:
    """The supervised tokens of a batch, one row each, in the order of the examples.

    Attributes:
        logits: (m, classes), float32 or float64.
        targets: (m,) long.
        example: (m,) long, ascending.
        share: (m,) each token's part of its example's mean; they sum to one over an example.
        counts: (n,) long.
    """

    logits: Tensor
    targets: Tensor
    example: Tensor
    share: Tensor
    counts: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, weights: Tensor | None) -> _Rows:
        if logits.shape[:-1] != labels.shape:
            raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}; pass loss=")
        count = len(labels)
        valid = labels != -100
        example = torch.arange(count, device=labels.device).view(-1, *[1] * (labels.ndim - 1)).expand_as(labels)[valid]
        # Only supervised rows are widened to float32: prompts would otherwise pay for a vocabulary-wide copy. A view is
        # cheaper than a selection, whose gradient is scattered back.
        rows = logits.flatten(0, -2) if bool(valid.all()) else logits[valid]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        counts = torch.bincount(example, minlength=count)
        if weights is None:
            share = (1.0 / counts.clamp_min(1).to(rows.dtype))[example]
        else:
            chosen = _aligned(weights, labels)[valid].to(rows.dtype)
            if bool((chosen < 0).any()) or not bool(torch.isfinite(chosen).all()):
                raise ValueError("token_weights must be finite and non-negative")
            total = torch.zeros(count, dtype=rows.dtype, device=rows.device).index_add(0, example, chosen)
            share = chosen / total.clamp_min(torch.finfo(rows.dtype).tiny)[example]
        return cls(rows, labels[valid], example, share, counts)

    def summed(self, per_token: Tensor, example: Tensor) -> Tensor:
        """(n,) sums of token values by example."""
        return torch.zeros(len(self.counts), dtype=per_token.dtype, device=per_token.device).index_add(
            0, example, per_token
        )


def _categorical(rows: _Rows, kind: str, generator: torch.Generator | None) -> Objective:
    targets = sample_categorical(rows.logits.detach(), generator) if kind == "mc" else rows.targets
    if kind == "margin":
        hit = torch.zeros_like(rows.logits, dtype=torch.bool).scatter_(1, targets[:, None], True)
        others = rows.logits.masked_fill(hit, -torch.inf)
        per_token = torch.logsumexp(others, 1) - rows.logits.gather(1, targets[:, None])[:, 0]
    else:
        per_token = nn.functional.cross_entropy(rows.logits, targets, reduction="none")
    return Objective(rows.summed(per_token * rows.share, rows.example), rows.counts)


def _class_draw(rows: _Rows, kind: str, draw: int, max_draws: int) -> Objective:
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
    scale = rows.counts.to(values.dtype)
    return Objective(values, rows.counts, draws, scale if kind == "type2" else scale.sqrt())


def _check_draws(kind: str, draws: int, most: int, what: str) -> None:
    if draws > most:
        raise ValueError(
            f"kind={kind!r} takes a pass for each of {what}: {draws} for this batch, more than max_draws={most}; "
            "kind='mc' estimates the same from one, or raise max_draws"
        )


def _aligned(weights: Tensor, labels: Tensor) -> Tensor:
    """Token weights on the positions of (possibly shifted) labels."""
    if weights.shape == labels.shape:
        return weights
    if weights.ndim == 2 and weights.shape == (len(labels), labels.shape[1] + 1):
        return weights[:, 1:]
    raise ValueError(f"token_weights returned {tuple(weights.shape)}; it must have the shape of the batch's labels")


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


WeightSource = str | Callable[[Any], Tensor] | None
"""A key of the batch, or ``batch -> tensor``."""


def take_weights(batch: Any, source: WeightSource, argument: str) -> tuple[Any, Tensor | None]:
    """The batch without its weights, and the weights.

    Args:
        batch: any batch; a key is only known to a mapping.
        source: see :data:`WeightSource`; None gives None.
        argument: its name, for the message.

    Raises:
        ValueError: if the key is not in the batch.
    """
    if source is None:
        return batch, None
    if callable(source):
        return batch, source(batch)
    if not isinstance(batch, Mapping) or source not in batch:
        known = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"{argument}={source!r} is no key of the batch ({known})")
    return {key: value for key, value in batch.items() if key != source}, batch[source]


def checked_example_weights(weights: Tensor, examples: int) -> Tensor:
    """(n,) float64.

    Raises:
        ValueError: if they are not n finite, non-negative numbers.
    """
    if weights.shape != (examples,):
        raise ValueError(
            f"example_weights have shape {tuple(weights.shape)}; a batch of {examples} needs ({examples},)"
        )
    weights = weights.double()
    if bool((weights < 0).any()) or not bool(torch.isfinite(weights).all()):
        raise ValueError("example_weights must be finite and non-negative")
    return weights


class FirstTokens:
    """Token weights under which an example's first supervised tokens count ``factor`` times as much as the rest.

    A refusal is decided in the first few tokens of a response (Qi et al. 2024, arXiv 2406.05946); a step of two levels is
    this project's own way to heed it. Pass an instance as ``token_weights``.

    Args:
        tokens: how many, at least 1.
        factor: at least 0.

    Raises:
        ValueError: if one of them is out of range.

    Examples:
        >>> batch = {"labels": torch.tensor([[-100, 5, 6, 7]])}
        >>> fg.FirstTokens(2, 3.0)(batch).tolist()
        [[1.0, 3.0, 3.0, 1.0]]
    """

    def __init__(self, tokens: int, factor: float) -> None:
        if tokens < 1 or not factor >= 0:
            raise ValueError(f"FirstTokens(tokens={tokens}, factor={factor}): tokens >= 1 and factor >= 0 are needed")
        self.tokens = tokens
        self.factor = factor

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """(n, T), of the shape of the labels. The token at position 0 is counted only if it is supervised."""
        supervised = batch["labels"] != -100
        early = supervised & (supervised.long().cumsum(1) <= self.tokens)
        return torch.where(early, self.factor, 1.0)
