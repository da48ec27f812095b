"""From the calls of a layer in one batch to the record that accumulators read."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fishergeo.capture.batches import by_example, packed
from fishergeo.capture.kinds.kind import Call
from fishergeo.capture.layers import Layer, Use


@dataclass(frozen=True)
class Record:
    """What one layer did on one batch: G_i = Σ_t gradients[i, t] inputs[i, t]ᵀ.

    Attributes:
        name: name of the layer.
        inputs: (n, T, q), zero at padding; the model's dtype.
        gradients: (n, T, p), of the batch's summed objective with respect to the layer's outputs; zero at padding.
        mask: (n, T) bool, False at padding, or None where every position counts.
        source: equal for layers whose ``inputs`` are one tensor in this batch, such as q, k and v.
        counted: (n,) bool, the examples that are data, or None if all are; one that is may have no position here.
        visits: (n, T') long, of an expert: how many of its rows stand for each position of the batch, −1 for padding; rows
            come in the order of the positions. None for layers that read positions without choosing.
    """

    name: str
    inputs: Tensor
    gradients: Tensor
    mask: Tensor | None
    source: int
    counted: Tensor | None = None
    visits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Arrived:
    """A call of a module whose gradient has come.

    Attributes:
        path: path of the module.
        call: its inputs and gradient.
        source: a number of :class:`Sources` for its input.
        tokens: (R,), of an expert: the tokens that its rows stand for.
        total: tokens of the batch, padding included, where ``tokens`` is given.
    """

    path: str
    call: Call
    source: int
    tokens: Tensor | None = None
    total: int = 0


class Sources:
    """Numbers that are equal for the same live tensor seen in the same way."""

    def __init__(self) -> None:
        self._count = itertools.count()
        self._known: dict[Hashable, list[tuple[weakref.ref[Tensor], int]]] = {}
        self._derived: dict[Hashable, int] = {}

    def of(self, tensor: Tensor, *view: Hashable) -> int:
        """The number of a tensor and what is made of it."""
        known = self._known.setdefault(view, [])
        for reference, number in reversed(known):  # layers that read one tensor run one after the other
            if reference() is tensor:
                return number
        known.append((weakref.ref(tensor), next(self._count)))
        return known[-1][1]

    def derived(self, source: int, what: str) -> int:
        """The number of something else made of the same."""
        return self._derived.setdefault((source, what), self.fresh())

    def fresh(self) -> int:
        """A number never given before."""
        return next(self._count)


@dataclass(frozen=True, eq=False)
class BatchShape:
    """How the present batch is laid out.

    Attributes:
        examples: n.
        mask: (n, T) bool, or None if nothing is padded.
        targets: (n, T) bool of a decoder's positions beside an encoder's, or None if there are none or none is padded.
        counted: (n,) bool, the examples that are data, or None if all are.
        lengths: numbers of positions, for layers that read (n·T, width).
    """

    examples: int
    mask: Tensor | None
    targets: Tensor | None
    counted: Tensor | None
    lengths: frozenset[int]


@torch.no_grad()
def record_of(
    layer: Layer, arrivals: Sequence[Arrived], layout: BatchShape, sources: Sources, routed: int = 0
) -> Record:
    """The record of a layer's calls: the gradients of several calls add up, so their tokens stand side by side.

    Args:
        layer: whose.
        arrivals: its calls; none for an expert that no token chose.
        layout: layout of the batch.
        sources: sources of the batch.
        routed: tokens of the batch, padding included, that an expert was chosen from.

    Raises:
        ValueError: if rows cannot be told apart by example.
    """
    uses = {use.path: use for use in layer.uses}
    visits = None
    if layer.expert is None:
        parts = [_terms(layer, uses[one.path], one, layout) for one in arrivals]
    else:
        of_inputs, of_gradients, filled, visits = _expert_terms(layer, arrivals, layout, routed)
        parts = [(of_inputs, of_gradients, filled)]
    a, g, valid = parts[0]
    source = _source(layer, uses, arrivals, sources)
    if len(parts) > 1:
        a, g = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)
        if any(part[2] is not None for part in parts):
            valid = torch.cat([_all(part[0]) if part[2] is None else part[2] for part in parts], 1)
    elif valid is None and (layout.mask is not None or layout.targets is not None):
        source = sources.derived(source, "unmasked")
    elif valid is not None and valid is layout.targets:
        source = sources.derived(source, "masked as targets")
    if layout.counted is not None:
        valid = layout.counted[:, None] & (_all(a) if valid is None else valid)
        visits = None if visits is None else visits.masked_fill(~layout.counted[:, None], -1)
    if valid is not None:
        # torch.where, not a product: what stands at padding may be NaN.
        a = torch.where(valid[..., None], a, 0)
        g = torch.where(valid[..., None], g, 0)
    return Record(layer.name, a.detach(), g.detach(), valid, source, layout.counted, visits)


def _source(layer: Layer, uses: Mapping[str, Use], arrivals: Sequence[Arrived], sources: Sources) -> int:
    if len(arrivals) != 1 or layer.part in ("bias", "expert") or uses[arrivals[0].path].flipped:
        return sources.fresh()
    (use,) = (uses[arrival.path] for arrival in arrivals)
    one, kind = arrivals[0].source, use.kind
    assert kind is not None
    return one if layer.part == "weight" else sources.derived(one, f"1/{kind.factor(arrivals[0].call)} appended")


def _terms(layer: Layer, use: Use, one: Arrived, layout: BatchShape) -> tuple[Tensor, Tensor, Tensor | None]:
    """(n, T, q), (n, T, p) and which positions count (None: all) of one call."""
    kind, module = use.kind, use.module
    assert kind is not None
    if layer.part == "bias":
        g = kind.output_gradient(one.call)
        a = torch.ones_like(g[..., :1])
    else:
        a, g = kind.terms(module, one.call)
        if layer.part == "weight+bias":
            a = torch.cat([a, torch.ones_like(a[..., :1]) / kind.factor(one.call)], -1)
    if use.flipped:
        a, g = g, a
    skipped = None if layer.part == "bias" else kind.skipped(module, one.call)
    a, g = (by_example(layer.name, x, layout.examples, layout.lengths) for x in (a, g))
    mask = _mask_of(a, g, layout) if kind.positions else None
    if skipped is not None:
        read = ~by_example(layer.name, skipped[..., None], layout.examples, layout.lengths)[..., 0]
        mask = read if mask is None else mask & read
    return a, g, mask


def _mask_of(a: Tensor, g: Tensor, layout: BatchShape) -> Tensor | None:
    """The mask of the sequence that a layer reads, told by its length and by its rows (n, T, q) and (n, T, p).

    Another sequence (of a decoder, of an image's patches) may be just as long: padding adds nothing to the gradient,
    tokens do. Where both masks leave out nothing, the one that leaves out more is the layer's own: the other has its
    padding elsewhere. Positions of another sequence that are read, and add nothing (of patches, all but the class token's in
    the last block), cannot be told from padding: a moment of inputs leaves out those that the mask happens to fall on.
    """
    fitting = [mask for mask in (layout.mask, layout.targets) if mask is not None and mask.shape == g.shape[:2]]
    return _least([mask for mask in fitting if not _add(a[~mask], g[~mask])])


def _least(masks: Sequence[Tensor]) -> Tensor | None:
    return min(masks, key=lambda mask: int(mask.sum()), default=None)


def _add(a: Tensor, g: Tensor) -> bool:
    """Whether rows (m, q) and (m, p) add to the gradient; NaN, which padding may hold, is taken for nothing."""
    sent = g.nan_to_num(0, 0, 0).any(-1)
    return bool(sent.any()) and bool((sent & a.nan_to_num(0, 0, 0).any(-1)).any())


def _expert_terms(
    layer: Layer, arrivals: Sequence[Arrived], layout: BatchShape, routed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n, R, q), (n, R, p), which of these rows there are, and :attr:`Record.visits`; no row where no token chose it."""
    n = layout.examples
    totals = {routed, *(one.total for one in arrivals)}
    if len(totals) > 1 or routed % n:
        raise ValueError(
            f"layer {layer.name!r} was routed {' and '.join(map(str, sorted(totals)))} tokens in a batch of {n} examples: "
            "they cannot be told apart by example; leave it out of layers, or use batches of one example"
        )
    runs = [(one.call.args[0], one.call.gradient, cast(Tensor, one.tokens)) for one in arrivals]
    a, g, tokens = (torch.cat(part) for part in zip(*(runs or [_no_rows(layer)]), strict=True))
    masks = [m for m in (layout.mask, layout.targets) if m is not None and m.numel() == routed]
    mask = _least([m for m in masks if not _add(*(x[~m.flatten()[tokens]] for x in (a, g)))])
    visits = torch.bincount(tokens, minlength=routed).view(n, routed // n)
    visits = visits if mask is None else visits.masked_fill(~mask.view(n, routed // n), -1)
    return *packed((a, g), tokens, routed, n, mask), visits


def _no_rows(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    p, q = layer.shape
    dtype, device = layer.weight.dtype, layer.weight.device
    a, g = (torch.zeros(0, width, dtype=dtype, device=device) for width in (q, p))
    return a, g, torch.zeros(0, dtype=torch.long, device=device)


def _all(a: Tensor) -> Tensor:
    return torch.ones(a.shape[:2], dtype=torch.bool, device=a.device)
