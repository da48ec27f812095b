"""The state of runs of the eigensolver in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fishergeo import _storage
from fishergeo.krylov import KrylovRun

STATE = ("basis", "image", "pending", "partial", "projected", "values", "rotation", "found")


def _described(run: KrylovRun) -> dict[str, Any]:
    plan = run.plan
    return {
        "size": run.size, "k": plan.k, "block": plan.block, "basis": plan.basis, "tol": plan.tol, "which": plan.which,
        "energy": plan.energy, "recheck": plan.recheck, "seed": plan.seed,
        "dtype": str(run.tensors["basis"].dtype),
    }  # fmt: skip


def write_checkpoint(path: Path, runs: Mapping[str, KrylovRun]) -> None:
    """Writes the state of all runs, atomically.

    Args:
        path: the file.
        runs: layer -> run.
    """
    tensors = {f"{name}|{key}": run.tensors[key] for name, run in runs.items() for key in STATE}
    header = {name: {"plan": _described(run), "numbers": run.numbers} for name, run in runs.items()}
    _storage.write(path, tensors, {"lanczos": header})


def read_checkpoint(path: Path, runs: Mapping[str, KrylovRun]) -> None:
    """Sets runs to a state that :func:`write_checkpoint` wrote.

    Args:
        path: the file.
        runs: layer -> run, freshly made with the same settings.

    Raises:
        ValueError: if the file is damaged, or of a run with other layers, sizes or settings.
    """
    file = _storage.TensorFile(path)
    header = file.header.get("lanczos")
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a checkpoint of lanczos")
    if set(header) != set(runs):
        raise ValueError(f"{path}: a checkpoint of the layers {sorted(header)}, not of {sorted(runs)}")
    tensors = {f"{name}|{key}": file.tensor(f"{name}|{key}", "cpu") for name in runs for key in STATE}
    for name, run in runs.items():
        try:
            saved, numbers = header[name]["plan"], header[name]["numbers"]
            differing = [key for key, value in _described(run).items() if saved[key] != value]
            complete = set(numbers) == set(run.numbers)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged checkpoint ({error})") from error
        if differing:
            key = differing[0]
            raise ValueError(
                f"{path}: a checkpoint of another run, with {key}={saved[key]!r} and not {_described(run)[key]!r}; "
                "delete the file or pass another"
            )
        if not complete:
            raise ValueError(f"{path}: damaged checkpoint (its counters are {sorted(numbers)})")
        _check_shapes(path, {key: tensors[f"{name}|{key}"] for key in STATE}, run.size)
        for key in STATE:
            # clone: memory of our own alignment, or the products' rounding could differ from that of an unbroken run.
            run.tensors[key] = tensors[f"{name}|{key}"].clone().to(run.tensors[key].device)
        run.numbers = dict(numbers)
        run.reopen()


def _check_shapes(path: Path, state: Mapping[str, Tensor], size: int) -> None:
    kept, done = state["values"].numel(), state["partial"].shape[-1]
    expected = {
        "basis": (size, kept), "image": (size, kept), "projected": (kept, kept), "values": (kept,),
        "rotation": (kept, kept), "partial": (size, done),
    }  # fmt: skip
    wrong = [key for key, shape in expected.items() if tuple(state[key].shape) != shape]
    if wrong or state["pending"].ndim != 2 or len(state["pending"]) != size or state["pending"].shape[1] < done:
        key = wrong[0] if wrong else "pending"
        raise ValueError(f"{path}: damaged checkpoint ({key} has shape {tuple(state[key].shape)})")
