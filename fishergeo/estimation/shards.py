"""Sketches of disjoint parts of the data, all from one pass: what an estimate would be on other data of the same kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fishergeo._checks import check_choice, check_integer
from fishergeo.accumulators import SIDES, Accumulator, Layout, Shared, SketchAccumulator
from fishergeo.capture import LayerFilter, Record, select_layers
from fishergeo.estimation.options import DataKeywords, DataOptions, chosen_options
from fishergeo.estimation.sweep import Sweep
from fishergeo.operators import SymmetricOperator


@dataclass
class Part:
    """Which examples a sketch takes.

    Attributes:
        number: takes the examples whose place in the stream is this, modulo ``parts``.
        parts: number of parts.
        first: place of the present batch's first example.
        units: examples with a supervised token taken in earlier batches.
        size: size of the present batch.
        fresh: examples with a supervised token taken of it.
    """

    number: int
    parts: int
    first: int = 0
    units: int = 0
    size: int = 0
    fresh: int = 0

    @property
    def rows(self) -> slice:
        """Those of the present batch."""
        return slice((self.number - self.first) % self.parts, None, self.parts)

    def see(self, size: int, counted: Tensor | None) -> None:
        """Takes the size of the present batch, and which of its examples are data (None: all), from whichever layer."""
        if self.size == 0:
            self.size = size
            self.fresh = len(range(size)[self.rows]) if counted is None else int(counted[self.rows].sum())

    def next_batch(self) -> None:
        """Counts the present batch."""
        self.first, self.units = self.first + self.size, self.units + self.fresh
        self.size = self.fresh = 0


class PartAccumulator(SketchAccumulator):
    """A sketch that sees every batch and takes the rows of its part."""

    def __init__(self, layout: Layout, sums: dict[str, Tensor], part: Part) -> None:
        super().__init__(layout, sums)
        self.part = part

    def add(self, record: Record, shared: Shared) -> None:
        """Adds this part's rows of one batch."""
        rows = self.part.rows
        parts = (record.inputs, record.gradients, record.mask, record.counted, record.visits)
        a, d, *others = (None if each is None else each[rows] for each in parts)
        assert a is not None and d is not None
        own = replace(record, inputs=a, gradients=d, mask=others[0], counted=others[1], visits=others[2])
        self.part.see(len(record.inputs), record.counted)
        if len(own.inputs):
            super().add(own, Shared(shared.number, shared.draw))

    def miss(self, counted: Tensor, shared: Shared) -> None:
        """Counts a batch that did not reach the layer."""
        self.part.see(len(counted), counted)


def sketch_shards(
    model: nn.Module,
    batches: Iterable[Any],
    shards: int = 2,
    *,
    kind: str | None = None,
    data: DataOptions | None = None,
    rank: int = 64,
    side: str = "output",
    layers: LayerFilter = None,
    progress: bool = False,
    verify: bool = True,
    **keywords: Unpack[DataKeywords],
) -> list[dict[str, SymmetricOperator]]:
    """One sketched Fisher for each part of the examples: example i goes to part i modulo ``shards``.

    The sketches are those of :func:`fishergeo.estimate_fisher` (Tropp et al. 2017). One forward and backward pass serves
    them all. Compare a layer's parts with :func:`fishergeo.shard_agreement`.

    Args:
        model: any module; left exactly as it was.
        batches: iterable of batches, as for :func:`fishergeo.estimate_fisher`.
        shards: number of parts, at least 2.
        kind: whose labels an objective has, a field of :class:`fishergeo.DataOptions`; ``"empirical"`` by default.
        data: options of the data; by default those that ``kind`` and ``keywords`` make. A datum is an example here, and
            each counts once.
        rank: number of eigenpairs of each sketch, at least 1.
        side: ``"output"`` or ``"input"``.
        layers: names, globs or a predicate ``(name, module) -> bool``, as for :func:`fishergeo.estimate_fisher`.
        progress: whether a progress bar over batches is shown.
        verify: hold captured gradients against autograd's, as :func:`fishergeo.estimate_fisher` does.
        **keywords: fields of :class:`fishergeo.DataOptions` (``loss``, ``seed``, ...), in place of ``data``.

    Returns:
        A list of ``shards`` mappings from layer name to operator.

    Raises:
        TypeError: if ``shards`` or ``rank`` is not an int, or for an unknown keyword.
        ValueError: for unknown choices, a field of the data options beside ``data``, units of tokens, decay or example
            weights, or a part without a supervised token.
        RuntimeError: if ``verify`` finds gradients that are not autograd's, naming the layers and likely causes.
        FloatingPointError: naming the batch.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.eye(3), torch.zeros(3, 2))]
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        ...
        >>> halves = fg.sketch_shards(model, batches, 2, rank=2, loss=loss)
        >>> len(halves), halves[0][""].shape
        (2, (2, 2))
    """
    check_integer("shards", shards, low=2)
    check_integer("rank", rank, low=1)
    check_choice("side", side, SIDES)
    options = chosen_options("sketch_shards", data, kind, keywords)
    for name in ("unit", "decay", "example_weights"):
        if getattr(options, name) != getattr(DataOptions(), name):
            raise ValueError(
                f"{name}={getattr(options, name)!r}: every example counts once in sketch_shards; leave it out"
            )
    chosen = select_layers(model, layers)
    parts = [Part(number, shards) for number in range(shards)]
    groups: dict[str, dict[str, Accumulator]] = {}
    for part in parts:
        group = groups.setdefault(str(part.number), {})
        for name, layer in chosen.items():
            dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
            # Test matrices of their own: parts that shared one would agree in what it happens to miss.
            layout = Layout(f"{name}/{part.number}", *layer.shape, "sequence", side, rank, seed=options.seed)
            group[name] = PartAccumulator(
                layout, SketchAccumulator.empty(layout, dtype, layer.weight.device).sums, part
            )

    def after() -> None:
        for part in parts:
            part.next_batch()

    Sweep(model, chosen, groups, options, verify=verify, optional=layers is None).run(batches, progress, after)
    for part in parts:
        if part.units == 0:
            raise ValueError(f"part {part.number} of {shards} has no example with a supervised token; use fewer shards")
    return [
        {name: one.operator(part.units) for name, one in group.items()}
        for part, group in zip(parts, groups.values(), strict=True)
    ]
