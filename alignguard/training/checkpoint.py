"""Checkpoints that are whole or not there: the guard's state in them, and a marker that lists every file."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from alignguard.files import write_text
from alignguard.guard import FORMAT

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

STAGING = ".unfinished"

MARKER = "alignguard_complete.json"


def _mark(file: Path) -> list[int]:
    """Size and checksum of a file."""
    checksum = 0
    with file.open("rb") as handle:
        while part := handle.read(1 << 22):
            checksum = zlib.crc32(part, checksum)
    return [file.stat().st_size, checksum]


def seal(written: Path, place: Path) -> None:
    """Sync every file of a finished folder, list them in its marker, and move it to its place if it is elsewhere.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    marks = {}
    for file in sorted(path for path in written.rglob("*") if path.is_file()):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
        marks[file.relative_to(written).as_posix()] = _mark(file)
    write_text(written / MARKER, json.dumps({"format": FORMAT, "files": marks}))
    if written == place:
        return
    if place.exists():
        shutil.rmtree(place)
    os.replace(written, place)


def check_complete(folder: Path) -> None:
    """Refuse a checkpoint that is not whole, or that holds too little to go on from.

    Args:
        folder: folder of the checkpoint.

    Raises:
        ValueError: no marker, a file that it lists is missing or is not what was written, or the model alone was kept
            (``save_only_model``).
    """
    try:
        marks = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder} is not a complete checkpoint: its {MARKER} is missing or unreadable") from error
    for name, mark in marks:
        file = folder / name
        if not file.is_file() or file.stat().st_size != mark[0]:
            raise ValueError(f"{folder} is not a complete checkpoint: {name} is missing or cut short")
        if _mark(file) != mark:
            raise ValueError(f"{folder} is not a complete checkpoint: {name} is not what was written there")
    # Of all that goes with the model the random state alone has one name under every engine, but for the process's number.
    if not any(name.startswith("rng_state") for name, _ in marks):
        raise ValueError(
            f"{folder} holds the model alone (save_only_model): without optimizer, schedule and random state the run would "
            "not go on but begin anew from these weights"
        )


def latest_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint of a run; one that was never finished is passed over.

    Args:
        folder: that holds ``checkpoint-N`` folders; it need not exist.

    Returns:
        The one with the largest N, or None.

    Raises:
        ValueError: the only checkpoints that were finished have been damaged since.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", path.name):
            found.append((int(match[1]), path))
    damaged = None
    for _, path in sorted(found, reverse=True):
        try:
            check_complete(path)
        except ValueError as error:
            logger.warning("%s; it is passed over", error)
            damaged = damaged or (error if (path / MARKER).exists() else None)
            continue
        return path
    if damaged is not None:
        raise ValueError(f"resume: {damaged}, and there is no other; start anew in another folder, or with overwrite")
    return None
