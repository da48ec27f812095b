"""The Fisher of a model's layers: a mapping from layer to operator, its algebra and its file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from fishergeo import _storage
from fishergeo._checks import check_choice
from fishergeo.accumulators import (
    ACCUMULATORS,
    SHARINGS,
    SIDES,
    STRUCTURES,
    UNITS,
    Accumulator,
    Layout,
    Made,
    Owned,
)
from fishergeo.capture import KINDS, REDUCTIONS, check_model, header_fields
from fishergeo.operators import SymmetricOperator


@dataclass(frozen=True)
class FisherHeader:
    """What a Fisher is of; stored in its file.

    Attributes:
        structure: one of ``STRUCTURES``.
        kind: where labels came from.
        unit: ``"sequence"`` or ``"token"``.
        side: ``"output"`` or ``"input"``; of meaning to gram and sketch.
        rank: columns of the sketch.
        seed: seed of the sketch's test matrices and of sampled labels.
        examples: N, examples with at least one supervised token (a weight sum after decay).
        tokens: supervised tokens.
        dtype: dtype of the sums.
        shapes: layer -> (p, q).
        fingerprint: fingerprint of the model's parameters when the estimate began.
        sharing: ``"expand"`` or ``"reduce"``; of meaning to kfac and ekfac.
        basis: how ekfac's eigenbases were fixed: ``"two-pass"``, ``"one-sweep"`` or ``"given"``.
        decay: in (0, 1], what every later example multiplied the weight of the earlier ones by.
        weighted: whether examples or tokens had weights of their own.
        probes: columns that the sketch held back to measure its error with.
        reduction: ``"mean"`` or ``"sum"``: what an example's objective makes of its supervised tokens.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.eye(3), torch.zeros(3, 2))]
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        ...
        >>> header = fg.estimate_fisher(model, batches, structure="gram", loss=loss).header
        >>> header.structure, header.unit, header.shapes
        ('gram', 'sequence', {'': (2, 3)})
    """

    structure: str
    kind: str
    unit: str
    side: str
    rank: int
    seed: int
    examples: float
    tokens: float
    dtype: str
    shapes: dict[str, tuple[int, int]]
    fingerprint: str
    sharing: str = "expand"
    basis: str = ""
    decay: float = 1.0
    weighted: bool = False
    probes: int = 0
    reduction: str = "mean"

    def layout(self, name: str) -> Layout:
        """What the sums of the layer ``name`` look like: shapes, dtype, options."""
        p, q = self.shapes[name]
        return Layout(name, p, q, self.unit, self.side, self.rank, self.sharing, self.seed, self.probes)

    @property
    def count(self) -> float:
        """The units that the sums are divided by: examples or supervised tokens."""
        return self.examples if self.unit == "sequence" else self.tokens


class Fisher(Mapping[str, SymmetricOperator]):
    """Layer name -> operator. Holds sums, so shards add up; an operator is built when first asked for.

    Args:
        header: description of the model and data that it is the Fisher of.
        accumulators: layer name -> sums, of the layers of the header.
        groups: layer name -> input group; by default those that the accumulators name.

    Attributes:
        header: description of the model and data that it is the Fisher of.
        accumulators: layer name -> sums; read from the file on demand after :meth:`load`.
        input_groups: layer name -> name of the first layer that holds the same input factor (KFAC) or input basis
            (EKFAC), as q, k and v do; its own where it shares none. What is shared is held, stored and sent once.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.eye(3), torch.zeros(3, 2))]
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        ...
        >>> fisher = fg.estimate_fisher(model, batches, structure="gram", loss=loss)
        >>> list(fisher), fisher[""].shape, fisher.header.examples
        ([''], (2, 2), 3.0)
        >>> fisher.merge(fisher).header.examples
        6.0
    """

    def __init__(
        self, header: FisherHeader, accumulators: Mapping[str, Accumulator], groups: Mapping[str, str] | None = None
    ) -> None:
        self.header = header
        self.accumulators = accumulators
        if groups is None:
            groups = {name: accumulator.group for name, accumulator in accumulators.items()}
        self.input_groups: Mapping[str, str] = groups
        self._operators: dict[str, SymmetricOperator] = {}
        self._made: Made = {}

    def __getitem__(self, name: str) -> SymmetricOperator:
        if name not in self.accumulators:
            known = ", ".join(list(self.accumulators)[:6])
            raise KeyError(f"no layer {name!r} in this Fisher; it has {known}{' ...' if len(self) > 6 else ''}")
        if name not in self._operators:
            if not self.header.count > 0:
                raise ValueError("this Fisher has seen no supervised token")
            self._operators[name] = self.accumulators[name].operator(self.header.count, self._made)
        return self._operators[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.accumulators)

    def __len__(self) -> int:
        return len(self.accumulators)

    def __contains__(self, name: object) -> bool:
        return name in self.accumulators  # the inherited test would build the operator

    def __repr__(self) -> str:
        h = self.header
        return f"Fisher({h.structure}, {h.kind}, unit={h.unit}, {len(self)} layers, N={h.examples:g})"

    def merge(self, other: Fisher) -> Fisher:
        """The Fisher of both data sets together: sums and counts add. Sketches must share their rank.

        Args:
            other: an estimate of the same layers with the same options.

        Raises:
            ValueError: if the two are not of the same structure, kind, unit, side, rank, dtype and layers, if they
                are EKFAC moments in different eigenbases, sketches whose probes have different seeds, or hold an input factor
                or basis once for other groups of layers.
        """
        free = {"examples", "tokens", "fingerprint", "seed"}
        ours, theirs = asdict(self.header), asdict(other.header)
        for key in ours:
            if key not in free and ours[key] != theirs[key]:
                raise ValueError(f"other differs in {key}: {ours[key]!r} here, {theirs[key]!r} there")
        self._check_groups(other)
        header = replace(
            self.header,
            examples=self.header.examples + other.header.examples,
            tokens=self.header.tokens + other.header.tokens,
        )
        done: dict[Owned, Tensor] = {}
        sums = {name: mine.merged(other.accumulators[name], done) for name, mine in self.accumulators.items()}
        return from_sums(header, sums, self.input_groups)

    def _check_groups(self, other: Fisher) -> None:
        """Refuse to add sums that one of the two holds once for several layers, and the other apart or for others."""
        for name, mine in self.accumulators.items():
            ours, theirs = (_group(one.input_groups, name) for one in (self, other))
            if mine.shared and mine.adds_shared and ours != theirs:
                raise ValueError(
                    f"layer {name!r} shares its input with {', '.join(sorted(ours - {name})) or 'no other'} here, with "
                    f"{', '.join(sorted(theirs - {name})) or 'no other'} there; estimate both with share_inputs=False"
                )

    def scaled(self, weight: float) -> Fisher:
        """The same estimate counting ``weight`` times as much in a later :meth:`merge`: exponential forgetting.

        Raises:
            ValueError: unless weight is positive and finite.
        """
        if not 0 < weight < math.inf:
            raise ValueError(f"weight={weight} must be positive and finite")
        header = replace(self.header, examples=self.header.examples * weight, tokens=self.header.tokens * weight)
        done: dict[Owned, Tensor] = {}
        sums = {name: accumulator.weighted(weight, done) for name, accumulator in self.accumulators.items()}
        return from_sums(header, sums, self.input_groups)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically, with the header in its metadata.

        Args:
            path: the file; one that is there is replaced.

        Raises:
            OSError: if it cannot be written; nothing half-written stays.
        """
        tensors, aliases = named_once(("", a, a.sums) for a in self.accumulators.values())
        keys = {name: list(a.sums) for name, a in self.accumulators.items()}
        _storage.write(path, tensors, {"fisher": asdict(self.header), "sums": keys}, aliases)

    def check_model(self, model: nn.Module, values: bool = True) -> None:
        """Checks that this is a Fisher of ``model``: the same layers, shapes and, with ``values``, fingerprint.

        Args:
            model: the model it is to be used with.
            values: compare fingerprints; pass False for a model that was wrapped, cast or trained since.

        Raises:
            ValueError: naming the first layer that does not fit, or the two fingerprints.
        """
        check_model(model, self.header.shapes, self.header.fingerprint, values)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        layers: Iterable[str] | None = None,
        device: str | torch.device = "cpu",
        lazy: bool = True,
    ) -> Fisher:
        """Opens a file of :meth:`save`; with ``layers``, only those layers.

        Only the header is read and checked here; a layer's tensors are read from the memory-mapped file, and held
        against their checksums, when the layer is first asked for. ``lazy=False`` reads and checks everything now.

        Args:
            path: the file.
            layers: names to load; all if None.
            device: device of the tensors.
            lazy: read a layer's tensors when it is asked for.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, is something else, or lacks a layer asked for. With ``lazy``, damage
                to a layer's own tensors is found when that layer is read.
        """
        file = _storage.TensorFile(path)
        try:
            header = FisherHeader(**header_fields(file.header.get("fisher")))
            keys = file.header.get("sums")
            if not isinstance(keys, dict) or not all(
                isinstance(value, list) and all(isinstance(key, str) for key in value) for value in keys.values()
            ):
                raise ValueError("no mapping of layers to sums")
            if set(keys) != set(header.shapes):
                raise ValueError("layers and sums differ")
            check_choice("structure", header.structure, STRUCTURES)
            check_choice("kind", header.kind, KINDS)
            check_choice("unit", header.unit, UNITS)
            check_choice("side", header.side, SIDES)
            check_choice("sharing", header.sharing, SHARINGS)
            check_choice("reduction", header.reduction, REDUCTIONS)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged Fisher header ({error})") from error
        chosen = list(keys) if layers is None else list(layers)
        missing = [name for name in chosen if name not in keys]
        if missing:
            raise ValueError(f"{path}: no layer {missing[0]!r} in it; it has {', '.join(list(keys)[:6])}")
        header = replace(header, shapes={name: header.shapes[name] for name in chosen})
        shared = ACCUMULATORS[header.structure].shared
        groups = _stored_groups(file, {name: [key for key in keys[name] if key in shared] for name in chosen})

        def build(name: str, read: Callable[[str], Tensor]) -> Accumulator:
            sums = {name: {key: read(f"{name}|{key}") for key in keys[name]}}
            return from_sums(header, sums, groups).accumulators[name]

        for name in chosen:
            try:
                blank = build(name, file.blank)
                if str(blank.dtype) != f"torch.{header.dtype}":
                    raise ValueError(f"layer {name!r} holds {blank.dtype}, the header says {header.dtype}")
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{path}: tensors do not fit the header ({error})") from error
        accumulators = _storage.LazyMapping(chosen, lambda name: build(name, lambda key: file.tensor(key, device)))
        return cls(header, accumulators if lazy else dict(accumulators), groups)


def _group(groups: Mapping[str, str], name: str) -> set[str]:
    """Layers that share the input of this one."""
    return {other for other, group in groups.items() if group == groups[name]}


def from_sums(header: FisherHeader, sums: Mapping[str, dict[str, Tensor]], groups: Mapping[str, str]) -> Fisher:
    """A Fisher around existing sums.

    Args:
        header: description of what they are the sums of.
        sums: layer -> name -> tensor; layers of one input group have their shared tensors in common.
        groups: layer -> input group.

    Raises:
        ValueError: if a layer lacks a sum, or one has a shape that does not fit the header.
    """
    accumulators = {}
    for name, tensors in sums.items():
        accumulators[name] = ACCUMULATORS[header.structure](header.layout(name), tensors)
        accumulators[name].group = groups[name]
    return Fisher(header, accumulators)


def named_once(
    parts: Iterable[tuple[str, Accumulator, Mapping[str, Tensor]]],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors for a file, those that an input group holds in common under the name of its first layer alone.

    Args:
        parts: (prefix, accumulator, its tensors by name); a tensor is named ``prefix + layer + "|" + name``. Input groups
            under different prefixes have nothing in common.

    Returns:
        (name -> tensor, name that stands for another -> that name).
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    held: dict[tuple[str, Owned], str] = {}
    for prefix, accumulator, named in parts:
        for key, tensor in named.items():
            name = f"{prefix}{accumulator.layout.name}|{key}"
            first = held.setdefault((prefix, accumulator.owned(key)), name)
            if first == name:
                tensors[name] = tensor
            else:
                aliases[name] = first
    return tensors, aliases


def _stored_groups(file: _storage.TensorFile, shared: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Layer -> the first layer whose ``shared`` sums are stored under the same names."""
    first: dict[tuple[str, ...], str] = {}
    stored = {name: tuple(file.stored_as(f"{name}|{key}") for key in keys) for name, keys in shared.items()}
    return {name: first.setdefault(names or (name,), name) for name, names in stored.items()}
