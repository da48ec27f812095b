"""Text, tensors and logs in files that are whole or not there, and one named error for those that cannot be read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

OWN_ANSWERS = "own_answers.jsonl"  # stands in an output folder before the run begins that it was made for


def write_text(path: str | Path, text: str) -> None:
    """Write to a neighbour of ``path`` and rename it over, so that a reader sees the old file or the new one.

    Nothing half-written stays behind, whatever stops it.

    Raises:
        OSError: the folder is missing or full; the message names the file.
        ValueError: half a surrogate pair, which no file of UTF-8 holds; the message names the file.
    """
    path = Path(path).expanduser()
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise type(error)(error.errno, f"cannot write {path}: {error.strerror}") from error
        if isinstance(error, UnicodeEncodeError):
            raise ValueError(
                f"cannot write {path}: half a surrogate pair, {text[error.start]!r}, is no text"
            ) from error
        raise


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, one a row, as :func:`write_text` does.

    Raises:
        OSError: the folder is missing or full.
    """
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class ResumableLog:
    """JSON lines that an interrupted run goes on from: a head that says what they depend on, then a line an entry.

    Args:
        path: the file; made where it is not there, with its folder.
        head: JSON-able; a file of another head is refused, so that two runs never mix.
        fields: names that every entry has; the last line may be torn, and reading ends at the first that lacks one.
        what: contents and what they depend on, for the error.
        overwrite: begin a file of another head anew in place of refusing it.

    Attributes:
        entries: the lines after the head.

    Raises:
        ValueError: the file has another head.
    """

    def __init__(
        self, path: str | Path, head: Mapping[str, Any], fields: Iterable[str], what: str, overwrite: bool = False
    ) -> None:
        self.path = Path(path).expanduser()
        self.entries: list[dict[str, Any]] = []
        wanted = set(fields)
        kept = [json.dumps(head, sort_keys=True)]
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").split("\n")
            if any(map(str.strip, lines)) and lines[0] != kept[0]:
                if not overwrite:
                    raise ValueError(f"{self.path} holds {what}; give another place, or delete this file to start anew")
                lines = []
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # cut off in the middle of a line: what came before it is whole
                if not isinstance(entry, dict) or not wanted <= set(entry):
                    break
                self.entries.append(entry)
                kept.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Rewritten without the torn line, so that the next one is not glued to it.
        write_text(self.path, "\n".join(kept) + "\n")

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append entries, and bring them to the disk."""
        added = [dict(entry) for entry in entries]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, sort_keys=True) + "\n" for entry in added)
            file.flush()
            os.fsync(file.fileno())
        self.entries += added


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as :func:`write_text` writes text; tensors on any device, laid out contiguously.

    Raises:
        OSError: the folder is missing or full; the message names the file.
    """
    path = Path(path).expanduser()
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
        path = path.expanduser()
        place = next(one for one in (path, *path.absolute().parents) if one.exists())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of nobody here
        raise ValueError(f"output_dir {path!s:.80} is no path for a folder ({error})") from error
    if not place.is_dir():
        raise NotADirectoryError(f"output_dir {path}: {place} is a file; name a folder")
    if place == path and any(entry.name != OWN_ANSWERS for entry in path.iterdir()) and not overwrite:
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
