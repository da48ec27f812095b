"""Many training runs on the cores at hand: one JSON file, rewritten after each run, that an interrupted script goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from alignguard.files import write_text


def key(task: dict[str, Any]) -> str:
    """What tells one run from another."""
    return json.dumps(task, sort_keys=True)


def run_all(
    head: dict[str, Any],
    tasks: list[dict[str, Any]],
    work: Callable[[dict[str, Any]], dict[str, Any]],
    out: Path,
    jobs: int,
) -> dict[str, Any]:
    """``work(task)`` for every task that ``out`` does not hold yet, ``jobs`` at a time; returns what ``out`` then holds.

    Rows stand in the order of ``tasks``. Each process takes an equal share of the threads, so times of runs in one file
    compare with each other.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    done = {r["task"]: r for r in json.loads(out.read_text())["runs"]} if out.is_file() else {}
    open_tasks = [t for t in tasks if key(t) not in done]

    def content() -> dict[str, Any]:
        return {**head, "jobs": jobs, "threads": threads, "runs": [done[key(t)] for t in tasks if key(t) in done]}

    out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        futures = {pool.submit(work, task): task for task in open_tasks}
        for future in as_completed(futures):
            row = {"task": key(futures[future]), **future.result()}
            done[row["task"]] = row
            write_text(out, json.dumps(content(), indent=1) + "\n")
            shown = {
                k: round(v, 4) if isinstance(v, float) else v
                for k, v in row.items()
                if isinstance(v, (str, int, float))
            }
            print({k: v for k, v in shown.items() if k != "task" or isinstance(v, float)}, flush=True)
    write_text(out, json.dumps(content(), indent=1) + "\n")
    return content()
