"""Output folders that are never overwritten by accident, and models saved whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def check_output(output_dir: str | Path, overwrite: bool = False) -> Path:
    """Refuse an output folder that cannot be had; nothing is touched.

    Raises:
        FileExistsError: the folder holds something and ``overwrite`` is false.
        NotADirectoryError: a file stands at that path or above it.
        PermissionError: the folder cannot be written.
        ValueError: no path that the system would take.
    """
    path = Path(output_dir)
    try:
        place = next(one for one in (path, *path.absolute().parents) if one.exists())
    except (OSError, ValueError) as error:
        raise ValueError(f"output_dir {path!s:.80} is no path for a folder ({error})") from error
    if not place.is_dir():
        raise NotADirectoryError(f"output_dir {path}: {place} is a file; name a folder")
    if place == path and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"output_dir {path} is not empty; choose another or allow overwriting (--overwrite)")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"output_dir {path} cannot be written")
    return path


def claim_output(output_dir: str | Path, overwrite: bool = False) -> Path:
    """Make the output folder, refusing to touch what is there.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError, ValueError: as :func:`check_output`.
    """
    path = check_output(output_dir, overwrite)
    path.mkdir(parents=True, exist_ok=True)
    return path


def save_adapter(
    model: Any,
    target: Path,
    extra: Mapping[str, str] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Save an adapter, or a whole model, whole or not at all: written beside its place, then moved there.

    Args:
        model: anything with ``save_pretrained``.
        target: the folder.
        extra: more text files by name.
        finish: called with the folder before it is moved.

    Raises:
        OSError: the disk is full or not writable; the message names the folder.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        for stale in target.parent.glob(f".{target.name}.*"):  # of a run that was killed here
            shutil.rmtree(stale, ignore_errors=True)
        model.save_pretrained(str(temporary))
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        if finish is not None:
            finish(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk as its own error, with the system's words in it
        if isinstance(error, OSError) or "space left" in str(error):
            raise _save_error(target, error) from error
        raise
    return target


def _save_error(path: Path, error: Exception) -> OSError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "space left" in str(error)
    what = "no space is left on the disk" if full else str(error)
    return OSError(getattr(error, "errno", None) or errno.EIO, f"cannot write {path}: {what}")
