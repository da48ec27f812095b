"""What of the data a Fisher is made of, as one value or as keywords of the functions that estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch

from fishergeo._checks import check_choice, check_integer, check_number
from fishergeo.accumulators import UNITS
from fishergeo.capture import KINDS, REDUCTIONS, LossFunction, WeightSource, content_mark


@dataclass(frozen=True)
class DataOptions:
    r"""What of the data a Fisher is made of: whose labels, what a datum is, and how much each one counts.

    :func:`fishergeo.estimate_fisher`, :class:`fishergeo.StreamingFisher`, :func:`fishergeo.sketch_shards` and
    :func:`fishergeo.plan` take it as ``data=``, or its fields as keywords. For example i, L_i is its objective and G_i
    the gradient of L_i with respect to a layer's weight (p, q).

    ``unit="token"``: every position of a layer is a datum of its own, with the gradient g_t of the *sum* over the
    supervised tokens and G_t = g_t a_tᵀ, and sums are divided by the number M of supervised tokens in place of N.
    Gradients that reach one position from several tokens are not told apart. With a ``loss`` of your own, or with
    one token an example, the two units coincide.

    Args:
        kind: whose labels an objective has. ``"empirical"``: those of the data. ``"mc"``: one draw from the model at
            every supervised token, an unbiased estimate of the Fisher information. ``"type2"``: every class at every
            supervised token, weighted with its probability: that information itself. ``"ggn"``: the same for the
            generalised Gauss-Newton matrix of the example's mean loss, and for the squared error of floating-point
            labels (Martens 2020, arXiv 1412.1193, on all four). ``"margin"``: log-sum-exp of the other logits less the
            label's logit, whose gradient does not vanish where the model is sure.
        unit: what a datum is: an example (``"sequence"``) or a supervised token (``"token"``).
        loss: function ``(model, batch) -> (n,)`` of one loss an example, in place of the model's own; with
            ``kind="empirical"`` only.
        reduction: ``"mean"`` or ``"sum"`` over an example's supervised tokens in L_i. With the sum F is that of whole
            responses, and ½ tr(ΔWᵀFΔW) a divergence in nats a response. A ``loss`` reduces as it likes.
        token_weights: key of the batch, or function ``batch -> tensor`` of the labels' shape (n, T): weights of an
            example's tokens in L_i, not negative; see :class:`fishergeo.FirstTokens`. None weighs all alike. L_i is
            Σ_t w_t ℓ_t / Σ_t w_t, of which the scale of the weights is no part, or with ``reduction="sum"`` Σ_t w_t ℓ_t, of
            which it is. A token of weight zero is none: weights of zero and one do what labels of −100 elsewhere do.
        example_weights: key of the batch, or function ``batch -> (n,)``: example i counts w_i times, and N is Σ w_i.
            None counts each once.
        decay: factor in (0, 1] by which each example multiplies the weight of all examples before it.
        max_draws: largest number of passes over one batch that type2 and ggn may take.
        seed: seed of the labels that are drawn, and of a sketch's test matrices.

    Raises:
        ValueError: for a choice that is not known, or a number out of range.
        TypeError: if ``max_draws`` or ``seed`` is no integer, or ``decay`` no number.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> data = fg.DataOptions(loss=lambda model, batch: model(batch).square().sum(1), decay=0.9)
        >>> fisher = fg.estimate_fisher(model, [torch.eye(3)], "gram", data=data)
        >>> fisher.header.decay, round(fisher.header.examples, 2)  # 1 + 0.9 + 0.81
        (0.9, 2.71)
        >>> fg.plan(model, "gram", batches=[torch.eye(3)], data=data).examples
        3
    """

    kind: str = "empirical"
    unit: str = "sequence"
    loss: LossFunction | None = None
    reduction: str = "mean"
    token_weights: WeightSource = None
    example_weights: WeightSource = None
    decay: float = 1.0
    max_draws: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("unit", self.unit, UNITS)
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_integer("max_draws", self.max_draws, low=1)
        check_integer("seed", self.seed, low=-(2**63), high=2**64 - 1)
        if check_number("decay", self.decay, high=1.0) <= 0:
            raise ValueError(f"decay={self.decay} must lie in (0, 1]")


def option_facts(options: DataOptions) -> dict[str, Any]:
    """What a resumed computation must have in common with the one that was cut off: functions by their contents."""
    values = {one.name: getattr(options, one.name) for one in fields(options)}
    return {key: content_mark(value) if callable(value) else value for key, value in values.items()}


def check_sums_dtype(dtype: torch.dtype | None) -> None:
    """Refuses a dtype of sums in which small terms are lost.

    Raises:
        ValueError: unless it is None, float32 or float64.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype} must be torch.float32 or torch.float64: sums in less lose their small terms")


class DataKeywords(TypedDict, total=False):
    """The fields of :class:`DataOptions` but its first, as keyword arguments."""

    unit: str
    loss: LossFunction | None
    reduction: str
    token_weights: WeightSource
    example_weights: WeightSource
    decay: float
    max_draws: int
    seed: int


def chosen_options(
    function: str, data: DataOptions | None, kind: str | None, keywords: Mapping[str, Any]
) -> DataOptions:
    """The data options of a call: ``data``, or those that its keywords make.

    Args:
        function: the caller's name, for the message.
        data: what was passed as ``data=``.
        kind: what was passed as ``kind=``; None if nothing was.
        keywords: the other keywords.

    Raises:
        TypeError: for a keyword that is no field of DataOptions, or a ``data`` that is no DataOptions.
        ValueError: for a keyword beside ``data``, or one out of range.
    """
    given = dict(keywords) if kind is None else {"kind": kind, **keywords}
    known = [field.name for field in fields(DataOptions)]
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    if data is None:
        return DataOptions(**given)
    if not isinstance(data, DataOptions):
        raise TypeError(f"data must be a DataOptions, got {type(data).__name__}")
    if given:
        name = next(iter(given))
        raise ValueError(f"{name}= and data= are both given; set it in data: DataOptions({name}=...)")
    return data
