"""What a run is: written before it starts, compared before it is resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignguard.files import check_output, claim_output, write_text

RECORD = "run.json"


def record_of(*, model: Any, task: Sequence[Any], alignment: Sequence[Any], **rest: Any) -> dict[str, Any]:
    """A run as JSON: the model's name, digests of the encoded data, and settings as they are.

    Args:
        model: a path or name, or a loaded model, which is recorded by its own name.
        task: encoded task rows.
        alignment: encoded alignment rows.
        **rest: settings.
    """
    name = str(model) if isinstance(model, (str, Path)) else str(getattr(model, "name_or_path", type(model).__name__))
    record = {"model": name, "task_data": _digest(task), "alignment_data": _digest(alignment), **rest}
    return json.loads(json.dumps(record, default=_plain))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _digest(rows: Sequence[Any]) -> dict[str, Any]:
    text = json.dumps([dict(row) for row in rows], sort_keys=True)
    return {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_record(path: Path) -> dict[str, Any]:
    """The record of an earlier run.

    Raises:
        ValueError: damaged.
    """
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"resume: {path} is damaged ({error}); start anew in another folder") from error
    if not isinstance(there, dict):
        raise ValueError(f"resume: {path} is damaged (no mapping); start anew in another folder")
    return there


def check_run(output_dir: Path, *, overwrite: bool, resume: bool) -> None:
    """What can be known of :func:`claim_run` before anything is loaded; nothing is touched.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError, ValueError: as :func:`claim_run`.
    """
    there = resume and (output_dir / RECORD).is_file()
    check_output(output_dir, overwrite or there)
    if there:
        read_record(output_dir / RECORD)


def claim_run(output_dir: str | Path, record: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Path:
    """Make or take over the output folder of a run and write its record there.

    Raises:
        FileExistsError: the folder holds something else, and ``overwrite`` is false.
        ValueError: ``resume``, and the folder holds another run; the settings that differ are named.
        NotADirectoryError, PermissionError: as :func:`alignguard.files.claim_output`.
    """
    path = Path(output_dir) / RECORD
    if resume and path.is_file():
        there = read_record(path)
        differ = sorted(name for name in record.keys() | there.keys() if record.get(name) != there.get(name))
        if differ:
            raise ValueError(f"resume: {output_dir} holds a run with other {', '.join(differ)}; resume it as it was")
        return claim_output(output_dir, overwrite=True)
    output = claim_output(output_dir, overwrite)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)  # of the run that is overwritten
    write_text(output / RECORD, json.dumps(record, indent=1))
    return output
