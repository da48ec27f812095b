"""What an estimate will take, before it is begun: bytes of state, peak memory, arithmetic and time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishergeo.accumulators import Accumulator, Owned, Structure
from fishergeo.capture import LayerFilter, select_layers
from fishergeo.estimation import DataKeywords, DataOptions, Fisher, chosen_options, estimate_fisher
from fishergeo.planning.calibration import calibrated, foretold, leading, lengths, parts_of, plain_pass
from fishergeo.planning.dryrun import DryRun, walk

SKETCHED = ("sketch", "kfac-sketch")

_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class LayerPlan:
    """One layer's share.

    Attributes:
        name: name of the module.
        shape: (p, q).
        state_bytes: bytes of sums that are kept; one shared with earlier layers is counted there.
        pass_bytes: bytes of sums and sketching matrices held between batches while the pass runs.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.eye(3), torch.zeros(3, 2))]
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        ...
        >>> fg.plan(model, "gram", batches=batches, loss=loss).layers[0].state_bytes  # 2·2 numbers of 4 bytes
        16
    """

    name: str
    shape: tuple[int, int]
    state_bytes: int
    pass_bytes: int


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found; ``str`` gives a table. Bytes are beyond the model and the batches themselves.

    Attributes:
        structure: structure of the estimate.
        examples: N.
        batches: number of batches.
        layers: layer by layer.
        state_bytes: bytes kept at the end: the size of the file, and of what travels in an all-reduce.
        pass_bytes: bytes held between batches at the end of the pass.
        peak_bytes: the most bytes alive at once: state, activations and scratch.
        flops: floating-point operations of the whole pass, the proof of its first batch included: products, attention,
            convolutions. Symmetric products, of which the CPU computes half, are counted whole; decompositions are not
            counted.
        plain_flops: operations of a plain forward and backward with these layers' weight gradients over these batches.
        seconds: predicted time of the pass, from a calibration or a rate; None without either.
        plain_seconds: predicted time of the plain pass.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.eye(3), torch.zeros(3, 2))]
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        ...
        >>> plan = fg.plan(model, "gram", batches=batches, loss=loss)
        >>> plan.structure, plan.examples, plan.state_bytes
        ('gram', 3, 16)
    """

    structure: str
    examples: int
    batches: int
    layers: tuple[LayerPlan, ...]
    state_bytes: int
    pass_bytes: int
    peak_bytes: int
    flops: int
    plain_flops: int
    seconds: float | None = None
    plain_seconds: float | None = None

    @property
    def ratio(self) -> float:
        """To a plain forward and backward: of times where they were calibrated, else of arithmetic."""
        if self.seconds is not None and self.plain_seconds is not None:
            return self.seconds / self.plain_seconds
        return self.flops / self.plain_flops

    def __str__(self) -> str:
        shown = {f"{e.name} {e.shape[0]}×{e.shape[1]}": e for e in self.layers}
        width = max(*map(len, shown), len("held between batches"))
        lines = [f"{label:<{width}}  {_size(entry.state_bytes):>9}" for label, entry in shown.items()]
        totals = {
            "all layers": _size(self.state_bytes),
            "held between batches": _size(self.pass_bytes),
            "peak beyond the model": _size(self.peak_bytes),
            "arithmetic": f"{self.flops:.3g} flop",
            "to forward and backward": f"{self.ratio:.2f}",
        }
        if self.seconds is not None:
            totals["predicted time"] = f"{self.seconds:.3g} s"
        head = f"{self.structure}, {len(self.layers)} layers, {self.examples} examples in {self.batches} batches"
        return "\n".join([head, *lines, *(f"{label:<{width}}  {value:>9}" for label, value in totals.items())])


def plan(
    model: nn.Module,
    structure: str | Structure = "sketch",
    *,
    batches: Iterable[Any] | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    examples: int | None = None,
    kind: str | None = None,
    data: DataOptions | None = None,
    layers: LayerFilter = None,
    rank: int = 64,
    side: str = "output",
    sharing: str = "expand",
    probes: int = 0,
    basis: Fisher | None = None,
    basis_examples: int | None = None,
    share_inputs: bool = True,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    flop_rate: float | None = None,
    calibrate: bool = False,
    **keywords: Unpack[DataKeywords],
) -> Plan:
    """Plans an :func:`estimate_fisher` without running it: the same code is run on a batch of blank tensors.

    The model may be on the meta device. Give either ``batches`` or the three sizes of a language model's. Memory is
    that of the largest batch; arithmetic and time go by the number of elements of each. Every position counts as
    supervised and none as padded, so both are upper bounds for padded data.

    Args:
        model: any module that estimate_fisher takes.
        structure: name of a structure, or a :class:`fishergeo.Structure`; one at a time.
        batches: list or loader of batches, gone through once for their sizes.
        batch_size: number of examples in a batch.
        sequence_length: number of tokens in an example.
        examples: number N of examples.
        kind: whose labels an objective has, a field of :class:`fishergeo.DataOptions`; ``"empirical"`` by default.
        data: options of the data; by default those that ``kind`` and ``keywords`` make.
        layers: names, globs or a predicate ``(name, module) -> bool``, as for :func:`fishergeo.estimate_fisher`.
        rank: number of eigenpairs of a sketch, at least 1.
        side: ``"output"`` or ``"input"``, for gram and sketch.
        sharing: ``"expand"`` or ``"reduce"``, for kfac, kfac-sketch and ekfac.
        probes: number of columns that a sketch holds back to measure its error with.
        basis: Fisher of structure kfac or ekfac whose eigenbases ekfac takes.
        basis_examples: number of examples that fix ekfac's eigenbases in one sweep.
        share_inputs: whether KFAC holds one input factor for layers that read the same tensor.
        dtype: dtype of the sums, float32 or float64; by default float64 for float64 models, else float32.
        verify: whether the estimate proves itself on its first batch, which costs about one batch more.
        flop_rate: floating-point operations a second that the machine reaches on such products, to predict time.
        calibrate: whether time is predicted by running estimates of a few passes over the largest batch (as a rule
            three times two and four) and as few plain passes. The model must be on a real device; it is left as it was.
        **keywords: fields of :class:`fishergeo.DataOptions` (``unit``, ``loss``, ``seed``, ...), in place of ``data``.

    Returns:
        Plan.

    Raises:
        ValueError: if neither or both descriptions of the data are given, a size is not positive, the batches can be
            gone through only once, calibration is asked of a model on the meta device, the model's shapes depend on
            values, or a field of the data options stands beside ``data``.
        TypeError: for an unknown keyword.

    Examples:
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(4096, 4096)
        ...
        >>> plan = fg.plan(
        ...     model, "gram", batches=[torch.empty(2, 4096)], loss=lambda model, batch: model(batch).square().sum(1)
        ... )
        >>> plan.state_bytes == 4 * 4096**2
        True
    """
    sample, rows, sizes = _data(model, batches, batch_size, sequence_length, examples)
    if flop_rate is not None and not flop_rate > 0:
        raise ValueError(f"flop_rate={flop_rate} must be positive")
    if flop_rate is not None and calibrate:
        raise ValueError("flop_rate and calibrate both predict the time; take one")
    chosen = select_layers(model, layers)
    if calibrate and any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError("calibrate=True needs a model on a real device; give flop_rate for one on the meta device")
    options: dict[str, Any] = {
        "structure": structure,
        "data": chosen_options("plan", data, kind, keywords),
        "layers": list(chosen),
        "rank": rank,
        "side": side,
        "sharing": sharing,
        "probes": probes,
        "basis": basis,
        "basis_examples": basis_examples,
        "share_inputs": share_inputs,
        "dtype": dtype,
        "verify": verify,
    }
    decay, objective = options["data"].decay, (options["data"].kind, options["data"].loss)
    parts = parts_of(options, rows, sizes)
    dry = DryRun(model)
    blank = walk(sample, dry.blank)
    # What the first batch leaves behind (rows that wait to be multiplied) is alive while the second runs forward. Of a
    # sketch and of kept rows it is known by formula.
    name = structure if isinstance(structure, str) else structure.name
    times = [1 if name in (*SKETCHED, "exact") or part.number == 1 else 2 for part in parts]
    flops, peak = 0.0, 0
    options["verify"] = False
    if len(parts) > 1:
        # A blank batch counts as one example, so that many of them fix the bases; under decay the second counts less.
        times[0] = times[0] if decay == 1 else 1
        options |= leading(structure, times[0])
        latest: dict[str, Any] = {}
        for part in parts:
            with dry.metered() as meter:
                latest = {"basis": estimate_fisher(dry.model, [blank], **(part.options | latest | {"verify": False}))}
            flops += meter.flops * part.share
    with dry.metered() as meter:
        fisher = estimate_fisher(dry.model, [blank] * sum(times), **options)
    share = sum(sizes) / max(sizes)
    flops = flops or meter.flops / sum(times) * share
    if verify:
        again, peak = _proof(dry, blank, {**parts[0].options, "verify": True})
        flops += again * sizes[0] / max(sizes)
    with dry.metered() as plain_meter:
        plain_pass(dry.model, list(chosen), blank, *objective)
    entries, later, joined = _layers(fisher, _rows(sample) * sum(times), sum(rows), share / sum(times))
    seconds = plain_seconds = None
    if flop_rate is not None:
        seconds, plain_seconds = flops / flop_rate, plain_meter.flops * share / flop_rate
    if calibrate:
        seconds = sum(calibrated(model, sample, parts, lengths(_rows(sample), name in SKETCHED)))

        def plain(count: int) -> None:
            for _ in range(count):
                plain_pass(model, list(chosen), sample, *objective)

        plain_seconds = foretold(plain, 1, 3, share)
    return Plan(
        structure=fisher.header.structure,
        examples=sum(rows),
        batches=len(sizes),
        layers=tuple(entries),
        state_bytes=sum(entry.state_bytes for entry in entries),
        pass_bytes=sum(entry.pass_bytes for entry in entries),
        peak_bytes=max(meter.peak + later, joined, peak),
        flops=round(flops),
        plain_flops=round(plain_meter.flops * share),
        seconds=seconds,
        plain_seconds=plain_seconds,
    )


def _proof(dry: DryRun, blank: Any, options: dict[str, Any]) -> tuple[int, int]:
    """Arithmetic of the proof of one batch alone, and the most bytes alive in an estimate of it with its proof."""
    with dry.metered() as plain:
        estimate_fisher(dry.model, [blank], **{**options, "verify": False})
    with dry.metered() as proven:
        estimate_fisher(dry.model, [blank], **options)
    return proven.flops - plain.flops, proven.peak


def _data(
    model: nn.Module,
    batches: Iterable[Any] | None,
    batch_size: int | None,
    sequence_length: int | None,
    examples: int | None,
) -> tuple[Any, list[int], list[int]]:
    """The largest batch, the examples of every batch, the elements of every batch."""
    named = {"batch_size": batch_size, "sequence_length": sequence_length, "examples": examples}
    if batches is None:
        for name, value in named.items():
            if value is None or value < 1:
                raise ValueError(f"{name}={value}; give batches, or batch_size, sequence_length and examples ≥ 1")
        assert batch_size is not None and sequence_length is not None and examples is not None
        rows = min(batch_size, examples)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        ids = torch.zeros(rows, sequence_length, dtype=torch.long, device=device)
        whole, rest = divmod(examples, rows)
        counts = [rows] * whole + [rest] * (rest > 0)
        return {"input_ids": ids, "labels": ids.clone()}, counts, [2 * count * sequence_length for count in counts]
    given = [name for name, value in named.items() if value is not None]
    if given:
        raise ValueError(f"batches and {given[0]} both describe the data; take one")
    if isinstance(batches, Iterator):
        raise ValueError("batches can be gone through only once and would be used up; pass a list or a loader")
    largest: Any = None
    counts, sizes = [], []
    for batch in batches:
        sizes.append(_elements(batch))
        counts.append(_rows(batch))
        if sizes[-1] == max(sizes):
            largest = batch
    if not sizes or max(sizes) == 0:
        raise ValueError("batches hold no tensor")
    return largest, counts, sizes


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(walk(batch, lambda tensor: tensor)) if isinstance(leaf, Tensor)]


def _elements(batch: Any) -> int:
    return sum(tensor.numel() for tensor in _tensors(batch))


def _rows(batch: Any) -> int:
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), 0)


def _layers(fisher: Fisher, first: int, examples: int, share: float) -> tuple[list[LayerPlan], int, int]:
    """Every layer's plan, and what one batch does not show.

    Args:
        fisher: of the first batch, blank.
        first: examples in it.
        examples: N.
        share: all elements over those of the first batch.

    Returns:
        (plans, bytes held in the course of the pass beyond those of the first batch, bytes alive when the rows kept by
        one layer after another are joined at the end).
    """
    seen: set[Owned] = set()
    entries, later, kept, widest = [], 0, 0, 0
    for name, accumulator in fisher.accumulators.items():
        state = rows = 0
        for key, tensor in accumulator.sums.items():
            if accumulator.owned(key) in seen:
                continue
            seen.add(accumulator.owned(key))
            size = tensor.numel() * tensor.element_size()
            if _grows(accumulator, key):
                whole = round(size * share)
                later, rows, size = later + whole - size, rows + whole, whole
            state += size
        kept, widest, held = kept + rows, max(widest, rows), state
        for sketch in accumulator.sketches:
            column = len(sketch.factor) * sketch.factor.element_size()
            (before, _), (during, after) = sketch.widths(first), sketch.widths(examples)
            state += column * (after - sketch.factor.shape[1])
            held += column * (during - sketch.factor.shape[1] + accumulator.layout.probes)
            later += column * max(during - before, 0)
        entries.append(LayerPlan(name, fisher.header.shapes[name], state, held))
    return entries, later, kept + widest


def _grows(accumulator: Accumulator, key: str) -> bool:
    """Whether a sum has a row for every row of the data."""
    return accumulator.expected(accumulator.layout)[key][0] is None


def _size(count: int) -> str:
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"
