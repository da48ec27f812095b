"""The Fisher of a model's layers: a mapping from layer to operator, its algebra and its file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from fishergeo import storage
from fishergeo.accumulators import Accumulator, Layout
from fishergeo.structures import ACCUMULATORS, SHARINGS, SIDES, STRUCTURES, UNITS, check_choice
from fishergeo.symmetric_operator import SymmetricOperator


@dataclass(frozen=True)
class FisherHeader:
    """What a Fisher is of; stored in its file.

    Attributes:
        structure: one of ``STRUCTURES``.
        kind: where labels came from.
        unit: ``"sequence"`` or ``"token"``.
        side: ``"output"`` or ``"input"``; of meaning to gram and sketch.
        rank: columns of the sketch.
        seed: of the sketch's test matrices and of sampled labels.
        examples: N, examples with at least one supervised token (a weight sum after decay).
        tokens: supervised tokens.
        dtype: of the sums.
        shapes: layer -> (p, q).
        fingerprint: of the model's parameters when the estimate began.
        sharing: ``"expand"`` or ``"reduce"``; of meaning to kfac and ekfac.
        basis: how ekfac's eigenbases were fixed: ``"two-pass"``, ``"one-sweep"`` or ``"given"``.
        decay: what every later example multiplied the weight of the earlier ones by.
        weighted: whether examples or tokens had weights of their own.
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

    def layout(self, name: str) -> Layout:
        """Of one layer's sums."""
        p, q = self.shapes[name]
        return Layout(name, p, q, self.unit, self.side, self.rank, self.sharing, self.seed)

    @property
    def count(self) -> float:
        """The units that the sums are divided by: examples or supervised tokens."""
        return self.examples if self.unit == "sequence" else self.tokens


class Fisher(Mapping[str, SymmetricOperator]):
    """Layer name -> operator. Holds sums, so shards add up; an operator is built when first asked for.

    Attributes:
        header: what it is the Fisher of.
        accumulators: layer name -> sums.
    """

    def __init__(self, header: FisherHeader, accumulators: dict[str, Accumulator]) -> None:
        self.header = header
        self.accumulators = accumulators
        self._operators: dict[str, SymmetricOperator] = {}

    def __getitem__(self, name: str) -> SymmetricOperator:
        if name not in self.accumulators:
            known = ", ".join(list(self.accumulators)[:6])
            raise KeyError(f"no layer {name!r} in this Fisher; it has {known}{' ...' if len(self) > 6 else ''}")
        if name not in self._operators:
            if not self.header.count > 0:
                raise ValueError("this Fisher has seen no supervised token")
            self._operators[name] = self.accumulators[name].operator(self.header.count)
        return self._operators[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.accumulators)

    def __len__(self) -> int:
        return len(self.accumulators)

    def __repr__(self) -> str:
        h = self.header
        return f"Fisher({h.structure}, {h.kind}, unit={h.unit}, {len(self)} layers, N={h.examples:g})"

    def merge(self, other: Fisher) -> Fisher:
        """The Fisher of both data sets together: sums and counts add. Sketches must share their rank.

        Raises:
            ValueError: if the two are not of the same structure, kind, unit, side, rank, dtype and layers, or if
                they are EKFAC moments in different eigenbases.
        """
        free = {"examples", "tokens", "fingerprint", "seed"}
        ours, theirs = asdict(self.header), asdict(other.header)
        for key in ours:
            if key not in free and ours[key] != theirs[key]:
                raise ValueError(f"other differs in {key}: {ours[key]!r} here, {theirs[key]!r} there")
        header = replace(
            self.header,
            examples=self.header.examples + other.header.examples,
            tokens=self.header.tokens + other.header.tokens,
        )
        # Layers that share a sum (the input factor of q, k and v) go on sharing it.
        done: dict[int, Tensor] = {}
        sums = {name: mine.merged(other.accumulators[name], done) for name, mine in self.accumulators.items()}
        return from_sums(header, sums)

    def scaled(self, weight: float) -> Fisher:
        """The same estimate counting ``weight`` times as much in a later :meth:`merge`: exponential forgetting.

        Raises:
            ValueError: unless weight > 0.
        """
        if not weight > 0:
            raise ValueError(f"weight={weight} must be positive")
        header = replace(self.header, examples=self.header.examples * weight, tokens=self.header.tokens * weight)
        done: dict[int, Tensor] = {}
        sums = {name: accumulator.weighted(weight, done) for name, accumulator in self.accumulators.items()}
        return from_sums(header, sums)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically, with the header in its metadata."""
        tensors = {f"{name}|{key}": t for name, a in self.accumulators.items() for key, t in a.sums.items()}
        keys = {name: list(a.sums) for name, a in self.accumulators.items()}
        storage.write(path, tensors, {"fisher": asdict(self.header), "sums": keys})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], layers: Iterable[str] | None = None, device: str | torch.device = "cpu"
    ) -> Fisher:
        """Reads a file of :meth:`save`; with ``layers``, only those layers' tensors.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, is something else, or lacks a layer asked for.
        """
        raw = storage.read_header(path)
        try:
            fields = dict(raw["fisher"])
            fields["shapes"] = {name: (int(p), int(q)) for name, (p, q) in fields["shapes"].items()}
            header = FisherHeader(**fields)
            keys: dict[str, list[str]] = raw["sums"]
            if set(keys) != set(header.shapes):
                raise ValueError("layers and sums differ")
            check_choice("structure", header.structure, STRUCTURES)
            check_choice("unit", header.unit, UNITS)
            check_choice("side", header.side, SIDES)
            check_choice("sharing", header.sharing, SHARINGS)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: damaged Fisher header ({error})") from error
        chosen = list(keys) if layers is None else list(layers)
        missing = [name for name in chosen if name not in keys]
        if missing:
            raise ValueError(f"{path}: no layer {missing[0]!r} in it; it has {', '.join(list(keys)[:6])}")
        header = replace(header, shapes={name: header.shapes[name] for name in chosen})
        wanted = [f"{name}|{key}" for name in chosen for key in keys[name]]
        tensors = storage.read_tensors(path, wanted, raw, device)
        try:
            return from_sums(header, {name: {key: tensors[f"{name}|{key}"] for key in keys[name]} for name in chosen})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: tensors do not fit the header ({error})") from error


def from_sums(header: FisherHeader, sums: Mapping[str, dict[str, Tensor]]) -> Fisher:
    """A Fisher around existing sums.

    Raises:
        ValueError: if a layer lacks a sum, or one has a shape that does not fit the header.
    """
    kind = ACCUMULATORS[header.structure]
    return Fisher(header, {name: kind(header.layout(name), tensors) for name, tensors in sums.items()})


def fingerprint(model: nn.Module) -> str:
    """A short hash of parameter names, shapes, dtypes and a few of their values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta" and parameter.numel():
            flat = parameter.detach().reshape(-1)
            digest.update(flat[:: max(1, flat.numel() // 8)][:8].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
