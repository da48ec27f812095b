"""A guard's state in files: plain values as JSON, tensors as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from alignguard.files import read_tensors, write_tensors, write_text

if TYPE_CHECKING:
    from alignguard.guard.guard import Guard

COUNTERS = "alignguard_guard.json"

TENSORS = "alignguard_guard.safetensors"

FORMAT = 5

TENSOR = "$tensor"  # key of a tensor's name in the plain values


def save_guard(folder: Path, guard: Guard | None, extra: dict[str, Any]) -> None:
    """Write a guard's state into a folder.

    Args:
        folder: an existing folder.
        guard: None writes ``extra`` alone.
        extra: JSON-able, returned by :func:`load_guard`.

    Raises:
        OSError: the folder cannot be written.
        TypeError: a curvature that is not made of tensors, such as one passed to :meth:`Guard.use_fisher`.
    """
    values: dict[str, Any] = {"format": FORMAT, "extra": extra, "guard": None}
    if guard is not None:
        tensors: dict[str, Tensor] = {}
        values["guard"] = _without_tensors(guard.state_dict(), "", tensors, {})
        write_tensors(folder / TENSORS, tensors)
    write_text(folder / COUNTERS, json.dumps(values))


def _without_tensors(state: Any, path: str, tensors: dict[str, Tensor], written: dict[int, str]) -> Any:
    """The state with every tensor replaced by its name in the file; q, k and v share theirs, which are written once."""
    if isinstance(state, Tensor):
        name = written.setdefault(id(state), path)
        tensors[name] = state
        return {TENSOR: name}
    if isinstance(state, Mapping):
        return {
            key: _without_tensors(value, f"{path}|{key}" if path else key, tensors, written)
            for key, value in state.items()
        }
    if isinstance(state, list):
        return [_without_tensors(value, f"{path}|{place}", tensors, written) for place, value in enumerate(state)]
    return state


def _with_tensors(values: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`_without_tensors`."""
    if isinstance(values, list):
        return [_with_tensors(value, tensors) for value in values]
    if not isinstance(values, dict):
        return values
    if set(values) == {TENSOR}:
        return tensors[values[TENSOR]]
    return {key: _with_tensors(value, tensors) for key, value in values.items()}


def load_guard(folder: Path, guard: Guard | None) -> dict[str, Any]:
    """Put a guard back where :func:`save_guard` found it; for None only check that there was none.

    Args:
        folder: folder that was written.
        guard: a new one on the same model, with the same configuration; or None.

    Returns:
        What was passed as ``extra``.

    Raises:
        ValueError: files damaged or missing, of another configuration, or of another model.
    """
    try:
        values = json.loads((folder / COUNTERS).read_text(encoding="utf-8"))
        extra: dict[str, Any] = values["extra"]
        kept, version = values["guard"], values["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}: no readable {COUNTERS}, so the guard cannot go on from there ({error})") from error
    if isinstance(version, bool) or not isinstance(version, int) or version > FORMAT:
        raise ValueError(f"{folder}: written in format {version}, this alignguard reads up to {FORMAT}; upgrade it")
    if version < FORMAT:
        raise ValueError(f"{folder}: written in format {version}, this alignguard reads {FORMAT}; start anew")
    if (kept is None) != (guard is None):
        raise ValueError(f"{folder}: written by a run {'without' if kept is None else 'with'} a guard; resume it so")
    if guard is None:
        return extra
    device = next(guard.model.parameters()).device
    tensors = {key: tensor.to(device) for key, tensor in read_tensors(folder / TENSORS).items()}
    try:
        guard.load_state_dict(_with_tensors(kept, tensors))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder}: damaged {COUNTERS} or {TENSORS} ({type(error).__name__}: {error})") from error
    return extra
