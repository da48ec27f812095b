"""Files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write to a neighbour of ``path`` and rename it over, so that a reader sees the old file or the new one.

    Raises:
        OSError: the folder is missing or full; the message names the file, and nothing half-written stays behind.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror}") from error
