"""One Fisher out of those that several processes estimated on their shards of the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fishergeo.accumulators import Accumulator, Owned
from fishergeo.estimation.fisher import Fisher, FisherHeader, from_sums

_FREE = {"examples", "tokens", "seed"}


@dataclass(frozen=True)
class _Layout:
    """What one process holds, without its tensors: enough to take part in the exchange with nothing in hand.

    Attributes:
        header: description of its Fisher.
        additive: whether sums add up; else whole states are gathered and merged.
        places: layer -> sum -> index into ``tensors``; layers that share a sum have the same index.
        tensors: (shape, dtype) of every tensor.
        counts: index -> value of the tensors that are one number.
        groups: layer -> input group.
    """

    header: FisherHeader
    additive: bool
    places: dict[str, dict[str, int]]
    tensors: list[tuple[tuple[int, ...], torch.dtype]]
    counts: dict[int, float]
    groups: dict[str, str]


def all_reduce(fisher: Fisher | None, group: dist.ProcessGroup | None = None) -> Fisher:
    """The Fisher of all processes' data together, the same on every process.

    Call it once, at the end, on every process: ``fisher = fg.all_reduce(fg.estimate_fisher(model, shard, ...))``.
    Shards may be of any size. A process whose shard is empty passes None.

    Sums (gram, diagonal, KFAC) travel in one flat all-reduce a dtype and equal those of one process over all the data
    up to the order of additions; sums that layers share travel once and stay shared. Counts, KFAC's tokens among them,
    travel as Python numbers with the header, so they are exact, and KFAC takes one all-reduce. The other structures are no plain sums: every process gathers all states and
    merges them in the order of the ranks as :meth:`Fisher.merge` does. A merged sketch never exceeds F, its trace is
    exact, and it equals F where no process had to drop anything; EKFAC needs the same bases everywhere
    (``basis=fg.all_reduce(kfac)``). Memory: one copy of the sums, or one a process where states are gathered.

    Args:
        fisher: this process's estimate; None if it had no data.
        group: processes that take part; all by default.

    Returns:
        Fisher: on the device of this process's sums. ``seed`` is that of the first process with data.

    Raises:
        RuntimeError: if torch.distributed is not initialised.
        ValueError: on every process alike, if no process has data, if two differ in anything but counts and seed,
            naming the ranks and the field, or if their EKFAC bases differ.

    Examples:
        >>> import tempfile, torch.distributed as dist
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        ...     model = torch.nn.Linear(3, 2)
        ...     fisher = fg.estimate_fisher(
        ...         model, [torch.eye(3)], structure="gram", loss=lambda model, batch: model(batch).square().sum(1)
        ...     )
        ...     whole = fg.all_reduce(fisher)
        ...     dist.destroy_process_group()
        ...
        >>> whole.header.examples
        3.0
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("all_reduce needs torch.distributed; call torch.distributed.init_process_group first")
    tensors: list[Tensor] = []
    layout = None
    if fisher is not None:
        layout, tensors = _describe(fisher)
    layouts: list[_Layout | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(layouts, layout, group=group)
    known = {rank: one for rank, one in enumerate(layouts) if one is not None}
    if not known:
        raise ValueError("no process has a Fisher; every one passed None")
    first = next(iter(known.values()))
    _check_alike(known)
    device = tensors[0].device if tensors else torch.device("cpu")
    transport = device
    if dist.get_backend(group) == "nccl":
        transport = torch.device("cuda", torch.cuda.current_device())
        device = device if tensors else transport
    if not first.additive:
        shards = [
            from_sums(one.header, _named(one, states), one.groups)
            for one, states in zip(known.values(), _gather(tensors, known, transport, group, device), strict=True)
        ]
        return reduce(Fisher.merge, shards)
    if not tensors:
        tensors = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in first.tensors]
    total = _summed(tensors, list(known.values()), transport, group)
    header = replace(
        first.header,
        examples=sum(one.header.examples for one in known.values()),
        tokens=sum(one.header.tokens for one in known.values()),
    )
    return from_sums(header, _named(first, total), first.groups)


def _describe(fisher: Fisher) -> tuple[_Layout, list[Tensor]]:
    tensors: list[Tensor] = []
    index: dict[Owned, int] = {}
    places: dict[str, dict[str, int]] = {}
    additive = True
    for name, accumulator in fisher.accumulators.items():
        additive = additive and type(accumulator).merged is Accumulator.merged
        places[name] = {}
        for key, tensor in accumulator.sums.items():
            owned = accumulator.owned(key)
            if owned not in index:
                index[owned] = len(tensors)
                tensors.append(tensor)
            places[name][key] = index[owned]
    shapes = [(tuple(t.shape), t.dtype) for t in tensors]
    counts = {i: float(tensor) for i, tensor in enumerate(tensors) if tensor.shape == (1,)}
    return _Layout(fisher.header, additive, places, shapes, counts, dict(fisher.input_groups)), tensors


def _check_alike(known: dict[int, _Layout]) -> None:
    (first_rank, first), *rest = known.items()
    mine = asdict(first.header)
    for rank, other in rest:
        theirs = asdict(other.header)
        for field in mine:
            if field not in _FREE and mine[field] != theirs[field]:
                raise ValueError(
                    f"ranks {first_rank} and {rank} differ in {field}: {mine[field]!r} and {theirs[field]!r}"
                )
        if first.additive and (first.places, first.tensors) != (other.places, other.tensors):
            raise ValueError(f"ranks {first_rank} and {rank} share sums between other layers; pass share_inputs=False")


def _named(layout: _Layout, tensors: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    return {name: {key: tensors[i] for key, i in keys.items()} for name, keys in layout.places.items()}


def _dtypes(layout: _Layout) -> list[torch.dtype]:
    return list(dict.fromkeys(dtype for _, dtype in layout.tensors))


def _flat(tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    parts = [t.detach().reshape(-1).to(device) for t in tensors if t.dtype == dtype]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype, device=device)


def _unflatten(flat: Tensor, layout: list[tuple[tuple[int, ...], torch.dtype]], out: list[Any]) -> None:
    """Cuts ``flat`` into its dtype's places in ``out``."""
    start = 0
    for i, (shape, dtype) in enumerate(layout):
        if dtype == flat.dtype:
            stop = start + torch.Size(shape).numel()
            out[i] = flat[start:stop].reshape(shape).clone()
            start = stop


def _summed(
    tensors: list[Tensor], layouts: list[_Layout], transport: torch.device, group: dist.ProcessGroup | None
) -> list[Tensor]:
    total: list[Any] = [None] * len(tensors)
    for i in layouts[0].counts:
        total[i] = torch.full_like(tensors[i], sum(layout.counts[i] for layout in layouts))
    large = [i for i in range(len(tensors)) if total[i] is None]
    summed: list[Any] = [None] * len(large)
    shapes = [layouts[0].tensors[i] for i in large]
    for dtype in dict.fromkeys(dtype for _, dtype in shapes):
        flat = _flat([tensors[i] for i in large], dtype, transport)
        dist.all_reduce(flat, group=group)
        _unflatten(flat.to(tensors[0].device), shapes, summed)
    for i, tensor in zip(large, summed, strict=True):
        total[i] = tensor
    return total


def _gather(
    tensors: list[Tensor],
    known: dict[int, _Layout],
    transport: torch.device,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> list[list[Tensor]]:
    """The tensors of every process with data, by one padded gather a dtype."""
    states: dict[int, list[Any]] = {rank: [None] * len(one.tensors) for rank, one in known.items()}
    for dtype in _dtypes(next(iter(known.values()))):
        sizes = [sum(torch.Size(s).numel() for s, d in one.tensors if d == dtype) for one in known.values()]
        mine = _flat(tensors, dtype, transport)
        padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))
        everyone = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, padded, group=group)
        for rank, one in known.items():
            _unflatten(everyone[rank].to(device), one.tensors, states[rank])
    return list(states.values())
