"""Finished runs, one JSON line each, in a file that an interrupted sweep goes on from; and the processes that fill it."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from alignguard.files import write_text

Row = dict[str, Any]


def _key(job: Mapping[str, Any]) -> str:
    return json.dumps(job, sort_keys=True)


class Ledger:
    """A JSONL file: a line that says what all runs share, then a line for each finished run.

    Args:
        path: the file; made where it is not there, with its folder.
        head: what all runs share. A file of another head is refused, so that two sweeps never mix.

    Attributes:
        rows: the finished runs, each ``{"job": ..., "result": ...}``.

    Raises:
        ValueError: the file belongs to another sweep.
    """

    def __init__(self, path: str | Path, head: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.rows: list[Row] = []
        first = json.dumps({"ledger": head}, sort_keys=True)
        kept = [first]
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").split("\n")
            if lines[0] and lines[0] != first:
                raise ValueError(
                    f"{self.path} holds runs of another model, other data or other settings; "
                    "give another output folder, or delete this file to start anew"
                )
            for line in lines[1:]:
                try:
                    row = json.loads(line)
                    self.rows.append({"job": row["job"], "result": row["result"]})
                except (json.JSONDecodeError, KeyError, TypeError):
                    break  # cut off in the middle of a line: what came before it is whole
                kept.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Rewritten without the torn line, so that the next one is not glued to it.
        write_text(self.path, "\n".join(kept) + "\n")

    def missing(self, jobs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The jobs that no line holds yet, each once, in their order."""
        known = {_key(row["job"]) for row in self.rows}
        return list({_key(job): job for job in jobs if _key(job) not in known}.values())

    def add(self, job: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Append one finished run, its ``job`` and its ``result`` as plain JSON, and bring it to the disk."""
        row = {"job": dict(job), "result": dict(result)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)


def _one_thread() -> None:
    torch.set_num_threads(1)


def run_jobs(
    jobs: Sequence[Mapping[str, Any]],
    work: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ledger: Ledger,
    processes: int = 1,
    progress: bool = False,
) -> list[Row]:
    """Run what the ledger does not hold yet, and give the rows of all jobs in their order.

    Runs are independent and seeded, so their order and the number of processes change times, not results. A run whose
    loss turns to NaN is written down as ``{"error": ...}``, as that too is a result of its setting; any other failure
    stops the sweep, with what is finished kept.

    Args:
        jobs: plain JSON objects, each one run.
        work: job to result; for more than one process a function that pickle can name.
        ledger: where results stand.
        processes: runs at a time; with more than one, each has a single thread.
        progress: show a bar.

    Raises:
        ValueError: ``processes`` below 1.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, not {processes}")
    todo = ledger.missing(jobs)
    with tqdm(total=len(todo), desc="runs", unit="run", disable=not progress) as bar:
        if processes == 1 or len(todo) < 2:
            for job in todo:
                ledger.add(job, _guarded(work, job))
                bar.update()
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(processes, len(todo)), context, initializer=_one_thread) as pool:
                futures = {pool.submit(_guarded, work, job): job for job in todo}
                try:
                    for future in as_completed(futures):
                        ledger.add(futures[future], future.result())
                        bar.update()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    found = {_key(row["job"]): row for row in ledger.rows}
    return [found[_key(job)] for job in jobs]


def _guarded(work: Callable[[Mapping[str, Any]], Mapping[str, Any]], job: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return work(job)
    except FloatingPointError as error:
        return {"error": str(error)}
