"""Fisher files that name the model and data they came from, and refuse a model that does not match."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import torch

import fishergeo as fg
from alignguard.data import as_source, check_fits, encode_source, pad_id, pad_rows, rows_digest
from alignguard.files import write_text
from alignguard.guard import GuardConfig
from alignguard.objective import base_model, model_kind

logger = logging.getLogger(__name__)


def origin_path(path: str | Path) -> Path:
    """The JSON beside a Fisher file that says what it is of."""
    return Path(f"{path}.json").expanduser()


def write_fisher(
    path: str | Path, model: Any, tokenizer: Any, data: Any, config: GuardConfig, *, name: str, progress: bool = False
) -> fg.Fisher:
    """Estimate the Fisher of alignment data at a model's present weights and write it with its origin.

    Args:
        path: the file; ``path`` + ``.json`` names model and data.
        model: without an adapter.
        tokenizer: its tokenizer.
        data: alignment rows, all of them are read.
        config: structure, kind, sketch_rank, batch_size, max_length and seed are read.
        name: what the model is called.
        progress: show a bar.

    Returns:
        The estimate that was written.

    Raises:
        FileNotFoundError, TypeError, ValueError: bad rows, or a model without layers to capture.
        OSError: the file cannot be written.
    """
    kind = model_kind(model)
    rows = encode_source(data, "data", tokenizer, kind, config.max_length)
    pad, size = pad_id(tokenizer), config.batch_size
    check_fits(model, rows, "data", pad)
    for note in rows.notes:
        logger.warning("%s", note)
    rows.sort(key=lambda row: len(row["input_ids"]))
    fisher = fg.estimate_fisher(
        model,
        [pad_rows(rows[i : i + size], pad, kind) for i in range(0, len(rows), size)],
        structure=config.structure,
        kind=config.kind,
        rank=config.sketch_rank,
        reduction="sum",
        progress=progress,
        seed=config.seed,
    )
    origin = {
        "model": name,
        "fingerprint": fisher.header.fingerprint,
        "data": str(as_source(data)),
        "data_sha256": rows_digest(rows),
        "examples": len(rows),
        "structure": config.structure,
        "kind": config.kind,
        "versions": {n: importlib.metadata.version(n) for n in ("fishergeo", "torch", "transformers")},
    }
    fisher.save(Path(path).expanduser())
    write_text(origin_path(path), json.dumps(origin, indent=1))
    return fisher


def file_digest(path: str | Path) -> str:
    """SHA-256 of a Fisher file, by which a resumed run is told from one with another."""
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_fisher(path: str | Path, model: Any, config: GuardConfig) -> fg.Fisher:
    """Read a Fisher file for a model that it must match.

    Args:
        path: the file.
        model: before an adapter is put on it.
        config: what the guard expects of it.

    Returns:
        The whole estimate, on the model's device.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of another structure, labels or reduction than the guard's, weighted, or of a model with other layers, shapes or weights.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"fisher: no such file: {path}")
    base = base_model(model)
    whole = fg.Fisher.load(path, device=next(base.parameters()).device, lazy=False)
    header = whole.header
    if header.structure != config.structure or header.side != "output":
        raise ValueError(
            f"fisher: {path} is a {header.structure!r} of the {header.side} side, the guard asks for "
            f"structure={config.structure!r}; estimate it again, or give structure={header.structure!r}"
        )
    # What the guard itself would estimate: of whole responses, labels as configured, every example for one.
    wanted: dict[str, Any] = {
        "reduction": "sum", "unit": "sequence", "sharing": "expand", "kind": config.kind, "weighted": False, "decay": 1.0,
    }  # fmt: skip
    for name, value in wanted.items():
        if (found := getattr(header, name)) != value:
            raise ValueError(
                f"fisher: {path} was estimated with {name}={found!r}, the guard asks for {name}={value!r}; estimate it again "
                "with `alignguard fisher`" + (f", or give kind={found!r}" if name == "kind" else "")
            )
    try:
        whole.check_model(base, values=base is model)
    except ValueError as error:
        raise ValueError(
            f"fisher: {path} is of another model: {error}; estimate it with `alignguard fisher`"
        ) from error
    _check_values(path, whole)
    return whole


def _check_values(path: str | Path, fisher: fg.Fisher) -> None:
    """Refuse sums that no estimate can have: NaN, infinity, and negative squares."""
    for name, accumulator in fisher.accumulators.items():
        for key, tensor in accumulator.sums.items():
            advice = "estimate it again with `alignguard fisher`"
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"fisher: {path}: the {key} of {name} is not finite; {advice}")
            squares = fisher.header.structure in ("gram", "kfac") and tensor.ndim == 2
            if squares and bool((tensor.diagonal() < 0).any()):
                raise ValueError(f"fisher: {path}: the {key} of {name} has a negative diagonal; {advice}")
            if tensor.numel() == 1 and float(tensor) < 0:  # a trace, or a weight
                raise ValueError(f"fisher: {path}: the {key} of {name} is negative; {advice}")
