"""The Fisher information of a model's layers, estimated in one pass over batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fishergeo import storage
from fishergeo.accumulators import (
    Accumulator,
    DiagonalAccumulator,
    GramAccumulator,
    KfacAccumulator,
    Shared,
    SketchAccumulator,
)
from fishergeo.capture import (
    Capture,
    LayerFilter,
    Record,
    indexed,
    layer_shape,
    padding_mask,
    select_layers,
    sized,
    to_device,
)
from fishergeo.losses import KINDS, LossFunction, Objective, example_objectives
from fishergeo.operators import SymmetricOperator
from fishergeo.sketch import PsdSketch

STRUCTURES = ("sketch", "gram", "diagonal", "kfac")
UNITS = ("sequence", "token")
SIDES = ("output", "input")


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
            ValueError: if the two are not of the same structure, kind, unit, side, rank, dtype and layers.
        """
        free = {"examples", "tokens", "fingerprint", "seed"}
        mine, theirs = asdict(self.header), asdict(other.header)
        for key in mine:
            if key not in free and mine[key] != theirs[key]:
                raise ValueError(f"other differs in {key}: {mine[key]!r} here, {theirs[key]!r} there")
        header = replace(
            self.header,
            examples=self.header.examples + other.header.examples,
            tokens=self.header.tokens + other.header.tokens,
        )
        # Layers that share a sum (the input factor of q, k and v) go on sharing it.
        done: dict[int, Tensor] = {}
        sums: dict[str, dict[str, Tensor]] = {}
        for name, mine_sums in self.accumulators.items():
            theirs_sums = other.accumulators[name]
            if isinstance(mine_sums, SketchAccumulator):
                sums[name] = mine_sums.merged(theirs_sums)
                continue
            sums[name] = {}
            for key, tensor in mine_sums.sums.items():
                if id(tensor) not in done:
                    done[id(tensor)] = tensor + theirs_sums.sums[key].to(tensor.device)
                sums[name][key] = done[id(tensor)]
        return _assemble(header, sums)

    def scaled(self, weight: float) -> Fisher:
        """The same estimate counting ``weight`` times as much in a later :meth:`merge`: exponential forgetting.

        Raises:
            ValueError: unless weight > 0.
        """
        if not weight > 0:
            raise ValueError(f"weight={weight} must be positive")
        header = replace(self.header, examples=self.header.examples * weight, tokens=self.header.tokens * weight)
        done: dict[int, Tensor] = {}
        sums: dict[str, dict[str, Tensor]] = {}
        for name, accumulator in self.accumulators.items():
            if isinstance(accumulator, SketchAccumulator):
                sums[name] = accumulator.weighted(weight)
                continue
            sums[name] = {key: done.setdefault(id(t), t * weight) for key, t in accumulator.sums.items()}
        return _assemble(header, sums)

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
            _check_choice("structure", header.structure, STRUCTURES)
            _check_choice("unit", header.unit, UNITS)
            _check_choice("side", header.side, SIDES)
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
            return _assemble(header, {name: {key: tensors[f"{name}|{key}"] for key in keys[name]} for name in chosen})
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: tensors do not fit the header ({error})") from error


def _assemble(header: FisherHeader, sums: dict[str, dict[str, Tensor]]) -> Fisher:
    """Accumulators around existing sums."""
    accumulators: dict[str, Accumulator] = {}
    for name, tensors in sums.items():
        p, q = header.shapes[name]
        size = p if header.side == "output" else q
        expected: dict[str, tuple[int | None, ...]] = {
            "gram": {"gram": (size, size)},
            "diagonal": {"squares": (p, q)},
            "kfac": {"output": (p, p), "input": (q, q), "tokens": (1,)},
            "sketch": {"factor": (size, None), "trace": (1,)},
        }[header.structure]  # type: ignore[assignment]
        for key, shape in expected.items():
            if key not in tensors or not _fits(tuple(tensors[key].shape), shape):
                raise ValueError(f"layer {name!r} needs {key} of shape {shape}")
        if header.structure == "gram":
            accumulators[name] = GramAccumulator(tensors, header.unit, header.side)
        elif header.structure == "diagonal":
            accumulators[name] = DiagonalAccumulator(tensors, header.unit)
        elif header.structure == "kfac":
            accumulators[name] = KfacAccumulator(tensors, header.unit)
        else:
            factor = tensors["factor"]
            sketch = PsdSketch(size, header.rank, header.seed, name, factor.dtype, factor.device, factor)
            accumulators[name] = SketchAccumulator(tensors, header.unit, header.side, header.rank, sketch)
    return Fisher(header, accumulators)


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(e is None or s == e for s, e in zip(shape, expected, strict=True))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; take one of {', '.join(choices)}")


def fingerprint(model: nn.Module) -> str:
    """A short hash of parameter names, shapes, dtypes and a few of their values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta" and parameter.numel():
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 8)][:8].double()
            sample = sample.full_tensor() if hasattr(sample, "full_tensor") else sample  # a sharded parameter (FSDP2)
            digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    structure: str = "sketch",
    kind: str = "empirical",
    unit: str = "sequence",
    rank: int = 64,
    side: str = "output",
    layers: LayerFilter = None,
    loss: LossFunction | None = None,
    progress: bool = False,
    seed: int = 0,
    share_inputs: bool = True,
) -> Fisher:
    r"""Estimates the Fisher of every chosen layer's weight in one pass, without forming a weight gradient.

    For example i let L_i be its own objective, the mean over its supervised tokens, D_i (T, p) the gradients of L_i
    with respect to the layer's outputs, A_i (T, q) the layer's inputs and G_i = D_iᵀ A_i, what
    ``model(**example).loss.backward()`` leaves in ``W.grad``. With N the number of examples:

    ========== ==================================================================================================
    structure  operator
    ========== ==================================================================================================
    gram       1/N Σ G_i G_iᵀ (side output, (p, p)) or 1/N Σ G_iᵀ G_i (side input, (q, q))
    sketch     the same, known through its ``rank`` leading eigenpairs; ``full_trace`` is exact
    diagonal   1/N Σ G_i∘G_i, on vec(W) row-major
    kfac       kron(S, A), S = 1/N Σ_i D_iᵀ D_i, A = Σ_i A_iᵀ A_i / Σ_i T_i, T_i the positions that are not padding
    ========== ==================================================================================================

    The KFAC scale: vec(G) vec(G)ᵀ = Σ_{t,t'} g_t g_t'ᵀ ⊗ a_t a_t'ᵀ; taking tokens as uncorrelated leaves the terms
    t = t', taking g and a as independent replaces a aᵀ by its mean (Eschenhagen et al. 2023, "expand"; Martens and
    Grosse 2015). It is exact for one example of one token.

    ``unit="token"``: every position of a layer is a datum of its own, with the gradient g_t of the *sum* over the
    supervised tokens and G_t = g_t a_tᵀ, and sums are divided by the number M of supervised tokens in place of N.
    Gradients that reach one position from several tokens are not told apart. With a ``loss`` of your own, or with
    one token an example, the two units coincide.

    Args:
        model: any module; dict batches and Hugging Face outputs if ``loss`` is left out. Frozen parameters, any
            device, any float dtype, adapters from peft. It is run in eval mode and left exactly as it was.
        batches: iterable of batches of any sizes, padded on either side (``attention_mask`` says where).
        structure: see the table.
        kind: ``"empirical"``, ``"mc"`` or ``"margin"``; see :func:`fishergeo.losses.example_objectives`.
        unit: ``"sequence"`` or ``"token"``.
        rank: eigenpairs of the sketch.
        side: ``"output"`` or ``"input"``, for gram and sketch.
        layers: names, globs or a predicate ``(name, module) -> bool``; by default every nn.Linear except the output
            embedding and LoRA's halves. ``"m.bias"`` is a bias, ``"m+bias"`` weight and bias, ``"m.experts.w.3"`` an
            expert; see "What can be captured" in the reference.
        loss: ``(model, batch) -> (n,)``, one loss an example.
        progress: a progress bar over batches.
        seed: of test matrices and sampled labels.
        share_inputs: KFAC holds one A for layers that read the same tensor (q, k, v).

    Returns:
        Fisher: a mapping from layer name to operator. Sums are float64 for float64 models, else float32.

    Raises:
        ValueError: for unknown choices, patterns that match nothing, batches without labels, no supervised token.
        FloatingPointError: if a NaN or Inf appears, naming the batch and the layer.
    """
    _check_choice("structure", structure, STRUCTURES)
    _check_choice("kind", kind, KINDS)
    _check_choice("unit", unit, UNITS)
    _check_choice("side", side, SIDES)
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    chosen = select_layers(model, layers)
    shapes = {name: layer_shape(module) for name, module in chosen.items()}
    accumulators: dict[str, Accumulator] = {}
    for name, (p, q) in shapes.items():
        weight = cast(Tensor, chosen[name].weight)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if structure == "gram":
            accumulators[name] = GramAccumulator.empty(p, q, unit, side, dtype, weight.device)
        elif structure == "diagonal":
            accumulators[name] = DiagonalAccumulator.empty(p, q, unit, dtype, weight.device)
        elif structure == "kfac":
            accumulators[name] = KfacAccumulator.empty(p, q, unit, dtype, weight.device)
        else:
            accumulators[name] = SketchAccumulator.empty(p, q, unit, side, rank, seed, name, dtype, weight.device)
    mark = fingerprint(model)
    generator = torch.Generator().manual_seed(seed)
    examples, tokens, seen = 0, 0, set[str]()
    device = cast(Tensor, next(iter(chosen.values())).weight).device
    with Capture(model, chosen) as capture:
        stream = tqdm(indexed(batches), total=sized(batches), desc="fisher", disable=not progress)
        for number, batch in stream:
            batch = to_device(batch, device)
            shared = Shared()
            groups: dict[int, KfacAccumulator] = {}

            def read(record: Record, number: int = number, shared: Shared = shared, groups: Any = groups) -> None:
                seen.add(record.name)
                accumulator = accumulators[record.name]
                if isinstance(accumulator, KfacAccumulator):
                    if number == 0 and share_inputs and record.source in groups:
                        accumulator.join(groups[record.source])
                    groups.setdefault(record.source, accumulator)
                    accumulator.add(record, shared, number)
                else:
                    accumulator.add(record, shared)

            try:
                result = capture.pass_over(
                    lambda batch=batch: example_objectives(model, batch, kind, loss, generator),  # type: ignore[misc]
                    read,
                    padding_mask(batch),
                    _token_scale if unit == "token" else None,
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"batch {number}: {error}") from error
            examples += int((result.counts > 0).sum())
            tokens += int(result.counts.sum())
            _check_finite(accumulators, number)
    for accumulator in accumulators.values():
        accumulator.finish()
    if examples == 0:
        raise ValueError("batches held no example with a supervised token")
    unseen = [name for name in chosen if name not in seen]
    if unseen:
        raise ValueError(f"layers {unseen[:4]} received no gradient in any batch; leave them out")
    header = FisherHeader(
        structure=structure,
        kind=kind,
        unit=unit,
        side=side,
        rank=rank,
        seed=seed,
        examples=examples,
        tokens=tokens,
        dtype=str(next(iter(accumulators.values())).dtype).removeprefix("torch."),
        shapes=shapes,
        fingerprint=mark,
    )
    return Fisher(header, accumulators)


def _token_scale(objective: Objective) -> Tensor:
    return objective.counts.to(objective.values.dtype)


def _check_finite(accumulators: dict[str, Accumulator], number: int) -> None:
    for name, accumulator in accumulators.items():
        for tensor in accumulator.sums.values():
            # A sum is finite only if its terms are; one reduction a tensor.
            if not bool(torch.isfinite(tensor.sum())):
                raise FloatingPointError(f"batch {number}, layer {name!r}: NaN or Inf in the gradients or inputs")
