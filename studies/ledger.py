"""Finished runs, one JSON line each, in a file that an interrupted sweep goes on from; and the processes that fill it."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from alignguard.files import ResumableLog

Row = dict[str, Any]


def _key(job: Mapping[str, Any]) -> str:
    return json.dumps(job, sort_keys=True)


class Ledger:
    """A JSONL file: a line that says what all runs share, then a line for each finished run.

    Args:
        path: the file; made where it is not there, with its folder.
        head: what all runs share. A file of another head is refused, so that two sweeps never mix.

    Raises:
        ValueError: the file belongs to another sweep.
    """

    def __init__(self, path: str | Path, head: Mapping[str, Any]) -> None:
        what = "runs of another model, other data or other settings"
        self._log = ResumableLog(path, {"ledger": head}, ("job", "result"), what)

    @property
    def rows(self) -> list[Row]:
        """The finished runs, each ``{"job": ..., "result": ...}``."""
        return self._log.entries

    def missing(self, jobs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The jobs that no line holds yet, each once, in their order."""
        known = {_key(row["job"]) for row in self.rows}
        return list({_key(job): job for job in jobs if _key(job) not in known}.values())

    def add(self, job: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Append one finished run, its ``job`` and its ``result`` as plain JSON, and bring it to the disk."""
        self._log.add([{"job": dict(job), "result": dict(result)}])


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
