"""."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fishergeo as fg
from alignguard.files import read_tensors, write_tensors, write_text
from alignguard.guard.curvature import curvatures

if TYPE_CHECKING:
    from alignguard.guard.guard import Guard

COUNTERS = "alignguard_guard.json"

TENSORS = "alignguard_guard.safetensors"

RUNNING = "alignguard_fisher.safetensors"

FORMAT = 2


def save_guard(folder: Path, guard: Guard | None, extra: dict[str, Any]) -> None:
    """Write a guard's curvature, references and counters into a folder.

    Args:
        folder: an existing folder.
        guard: None writes ``extra`` alone.
        extra: JSON-able, returned by :func:`load_guard`.

    Raises:
        OSError: the folder cannot be written.
        TypeError: a curvature of a kind that has no file form, such as one passed to :meth:`Guard.use_fisher`.
    """
    counters: dict[str, Any] = {"format": FORMAT, "extra": extra, "guard": None}
    if guard is not None:
        tensors: dict[str, Tensor] = {}
        kinds: dict[str, str] = {}
        written: dict[int, str] = {}
        aliases: dict[str, str] = {}  # q, k and v share their input factor, which is written once
        for name, layer in guard.layers.items():
            kinds[name] = type(layer.operator).__name__
            for role, tensor in _operator_tensors(layer.operator).items():
                key = f"layer|{name}|{role}"
                first = written.setdefault(id(tensor), key)
                if first == key:
                    tensors[key] = tensor
                else:
                    aliases[key] = first
        tensors |= {f"reference|{name}": tensor for name, tensor in guard.updates.references().items()}
        counters["guard"] = {
            "config": guard.config.to_dict(),
            "layers": kinds,
            "aliases": aliases,
            "step": guard.step,
            "examples_read": guard.examples_read,
            "refreshes": guard.refreshes,
            "estimated_at": guard._estimated_at,
            "samples": next((layer.samples for layer in guard.layers.values()), None),
            "scales": guard._scales,
            "budget": None if guard.budget is None else guard.budget.state(),
            "freshness": None if guard.freshness is None else guard.freshness.state(),
        }
        write_tensors(folder / TENSORS, tensors)
        if guard.running is not None:
            guard.running.save(folder / RUNNING)
    write_text(folder / COUNTERS, json.dumps(counters))


def _operator_tensors(operator: Any) -> dict[str, Tensor]:
    if isinstance(operator, fg.KroneckerOperator):
        return {"output_factor": operator.output_factor, "input_factor": operator.input_factor}
    if isinstance(operator, fg.SpectralKroneckerOperator):
        return _spectral_tensors(operator.output_factor, "output_") | _spectral_tensors(operator.input_factor, "input_")
    if isinstance(operator, fg.SpectralOperator):
        return _spectral_tensors(operator, "")
    if isinstance(operator, fg.DenseOperator):
        return {"matrix": operator.matrix}
    raise TypeError(f"a curvature of kind {type(operator).__name__} cannot be saved")


def _spectral_tensors(operator: fg.SpectralOperator, side: str) -> dict[str, Tensor]:
    trace = {} if operator.full_trace is None else {f"{side}full_trace": operator.full_trace}
    rest = {f"{side}rest": torch.tensor(operator.rest, dtype=torch.float64)} if operator.rest else {}
    return {f"{side}eigenvalues": operator.values, f"{side}eigenvectors": operator.vectors, **trace, **rest}


def _operator(kind: str, parts: dict[str, Tensor]) -> Any:
    if kind == "KroneckerOperator":
        return fg.KroneckerOperator(parts["output_factor"], parts["input_factor"])
    if kind == "SpectralKroneckerOperator":
        return fg.SpectralKroneckerOperator(_spectral(parts, "output_", "output"), _spectral(parts, "input_", "input"))
    if kind == "SpectralOperator":
        return _spectral(parts, "", "output")
    return fg.DenseOperator(parts["matrix"])


def _spectral(parts: dict[str, Tensor], prefix: str, side: str) -> fg.SpectralOperator:
    rest = float(parts[f"{prefix}rest"]) if f"{prefix}rest" in parts else 0.0
    vectors, trace = parts[f"{prefix}eigenvectors"], parts.get(f"{prefix}full_trace")
    return fg.SpectralOperator(parts[f"{prefix}eigenvalues"], vectors, trace, side, rest)


def load_guard(folder: Path, guard: Guard | None) -> dict[str, Any]:
    """Put a guard back where :func:`save_guard` found it; for None only check that there was none.

    Args:
        folder: that was written.
        guard: a new one on the same model, with the same configuration; or None.

    Returns:
        What was passed as ``extra``.

    Raises:
        ValueError: files damaged or missing, of another configuration, or of another model.
    """
    try:
        counters = json.loads((folder / COUNTERS).read_text(encoding="utf-8"))
        kept, extra, version = counters["guard"], counters["extra"], counters["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}: no readable {COUNTERS}, so the guard cannot go on from there ({error})") from error
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(f"{folder}: written in format {version}, this alignguard reads up to {FORMAT}; upgrade it")
    if (kept is None) != (guard is None):
        raise ValueError(f"{folder}: written by a run {'without' if kept is None else 'with'} a guard; resume it so")
    if guard is None:
        return extra
    try:
        _restore(folder, guard, kept)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: damaged {COUNTERS} or {TENSORS} ({type(error).__name__}: {error})") from error
    return extra


def _restore(folder: Path, guard: Guard, kept: dict[str, Any]) -> None:
    ours = json.loads(json.dumps(guard.config.to_dict()))
    if differ := sorted(name for name in ours if kept["config"].get(name) != ours[name]):
        raise ValueError(f"{folder}: written with other settings of {differ}; resume with the same, or start anew")
    for name in ("step", "examples_read", "refreshes"):
        if isinstance(kept[name], bool) or not isinstance(kept[name], int):
            raise ValueError(f"{folder}: damaged {COUNTERS}: {name} is {kept[name]!r}")
    for name in ("estimated_at", "samples"):
        if kept[name] is not None and (isinstance(kept[name], bool) or not isinstance(kept[name], int)):
            raise ValueError(f"{folder}: damaged {COUNTERS}: {name} is {kept[name]!r}")
    scales = {str(name): float(value) for name, value in kept["scales"].items()}
    device = next(guard.model.parameters()).device
    grouped: dict[str, dict[str, Tensor]] = {}
    references: dict[str, Tensor] = {}
    tensors = {key: tensor.to(device) for key, tensor in read_tensors(folder / TENSORS).items()}
    aliases = kept.get("aliases", {})  # none in format 1
    for key, tensor in (tensors | {key: tensors[first] for key, first in aliases.items()}).items():
        group, rest = key.split("|", 1)
        if group == "reference":
            references[rest] = tensor
        else:
            name, role = rest.rsplit("|", 1)
            grouped.setdefault(name, {})[role] = tensor
    operators = {name: _operator(kept["layers"][name], parts) for name, parts in grouped.items()}
    try:
        matrices, samples = guard.updates.matrices.values(), kept["samples"]
        layers = curvatures(operators, matrices, guard.config, samples) if operators else {}
        guard.updates.restore(references)
    except ValueError as error:
        raise ValueError(f"{folder}: of another model ({error})") from error
    guard.layers = layers
    guard.step, guard._estimated_at, guard.refreshes = kept["step"], kept["estimated_at"], kept["refreshes"]
    guard.examples_read, guard._scales = kept["examples_read"], scales
    for part, state in ((guard.budget, kept["budget"]), (guard.freshness, kept["freshness"])):
        for name in () if part is None else part.state():
            setattr(part, name, float(state[name]) if isinstance(getattr(part, name), float) else int(state[name]))
    guard.running = fg.Fisher.load(folder / RUNNING, device=device, lazy=False) if guard.config.averaging else None
