"""Sketches of disjoint parts of the data, all from one pass: what an estimate would be on other data of the same kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fishergeo._arguments import check_choice, check_integer
from fishergeo.accumulators import Shared, SketchAccumulator
from fishergeo.capture import Capture, LayerFilter, Record, indexed, layer_shape, padding_mask, select_layers, to_device
from fishergeo.losses import KINDS, LossFunction, example_objectives
from fishergeo.operators import SymmetricOperator
from fishergeo.streaming import token_scale


def sketch_shards(
    model: nn.Module,
    batches: Iterable[Any],
    shards: int = 2,
    *,
    rank: int = 64,
    kind: str = "empirical",
    unit: str = "sequence",
    side: str = "output",
    layers: LayerFilter = None,
    loss: LossFunction | None = None,
    seed: int = 0,
) -> list[dict[str, SymmetricOperator]]:
    """One sketched Fisher for each part of the examples: example i goes to part i modulo ``shards``.

    One forward and backward pass serves them all. Compare a layer's parts with :func:`fishergeo.shard_agreement`.

    Args:
        model: any module; left exactly as it was.
        batches: iterable of batches, as for :func:`fishergeo.estimate_fisher`.
        shards: how many parts, at least 2.
        rank: eigenpairs of each sketch.
        kind: where labels come from.
        unit: ``"sequence"`` or ``"token"``.
        side: ``"output"`` or ``"input"``.
        layers: names, globs or a predicate.
        loss: ``(model, batch) -> (n,)``.
        seed: of sampled labels and test matrices.

    Returns:
        A list of ``shards`` mappings from layer name to operator.

    Raises:
        ValueError: for unknown choices, or a part without a supervised token.
        FloatingPointError: naming the batch.
    """
    check_integer("shards", shards, low=2)
    check_integer("rank", rank, low=1)
    check_choice("kind", kind, KINDS)
    check_choice("unit", unit, ("sequence", "token"))
    check_choice("side", side, ("output", "input"))
    chosen = select_layers(model, layers)
    parts: list[dict[str, SketchAccumulator]] = [{} for _ in range(shards)]
    for name, module in chosen.items():
        p, q = layer_shape(module)
        weight = cast(Tensor, module.weight)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        for number, part in enumerate(parts):
            # Test matrices of their own: parts that shared one would agree in what it happens to miss.
            mark = f"{name}/{number}"
            part[name] = SketchAccumulator.empty(p, q, unit, side, rank, seed, mark, dtype, weight.device)
    device = cast(Tensor, next(iter(chosen.values())).weight).device
    generator = torch.Generator().manual_seed(seed)
    totals, first = [0] * shards, 0
    with Capture(model, chosen) as capture:
        for number, batch in indexed(batches):
            batch = to_device(batch, device)
            shared = [Shared() for _ in range(shards)]

            def read(record: Record, first: int = first, shared: list[Shared] = shared) -> None:
                for index, group in enumerate(shared):
                    rows = slice((index - first) % shards, None, shards)
                    if len(record.inputs[rows]) == 0:
                        continue
                    mask = None if record.mask is None else record.mask[rows]
                    own = Record(record.name, record.inputs[rows], record.gradients[rows], mask, record.source)
                    parts[index][record.name].add(own, group)

            try:
                result = capture.pass_over(
                    lambda batch=batch: example_objectives(model, batch, kind, loss, generator),  # type: ignore[misc]
                    read,
                    padding_mask(batch),
                    token_scale if unit == "token" else None,
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"batch {number}: {error}") from error
            for index in range(shards):
                counts = result.counts[(index - first) % shards :: shards]
                totals[index] += int((counts > 0).sum() if unit == "sequence" else counts.sum())
            first += len(result.counts)
    if min(totals) == 0:
        raise ValueError(f"part {totals.index(0)} of {shards} has no example with a supervised token; use fewer shards")
    for part in parts:
        for accumulator in part.values():
            accumulator.finish()
    return [
        {name: accumulator.operator(total) for name, accumulator in part.items()}
        for part, total in zip(parts, totals, strict=True)
    ]
