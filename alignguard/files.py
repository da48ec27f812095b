"""Text and tensors in files that are written whole or not at all, and one named error for those that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


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


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as :func:`write_text` writes text; tensors on any device, laid out contiguously.

    Raises:
        OSError: the folder is missing or full; the message names the file.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise OSError(getattr(error, "errno", None) or 5, f"cannot write {path}: {error}") from error


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file into memory of torch's own.

    The file's memory is not aligned as torch's is, and matrix products round by alignment: what is computed from copies
    is the same, bit by bit, as what was computed from the tensors that were written.

    Raises:
        ValueError: missing or damaged; the message names the file.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


@contextmanager
def readable(what: str, advice: str) -> Iterator[None]:
    """Turn whatever a library says about a file into one error that names it.

    Args:
        what: the file or folder, as people know it.
        advice: what to do.

    Raises:
        ValueError: in place of the library's error; running out of memory stays what it is.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every library below has its own kinds
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what} cannot be read ({words[:300]}); {advice}") from error
