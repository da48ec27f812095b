"""Time of a guarded optimizer step over a plain one, refreshes included, and peak memory of the process (Linux).

    python benchmarks/overhead.py --out benchmarks/results/overhead.json [--large]

Two copies of a model are trained on the same batches in one process, a plain step and a guarded one by turns, so that
whatever else the machine does meets both. Peak memory is the largest resident set of a process that trains alone, with
Python and torch in it. ``--large`` adds a random LLaMA of 100 million parameters.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alignguard.config import GuardConfig
from alignguard.data import collate, encode_example, read_jsonl
from alignguard.demo import versions
from alignguard.embedded import data_path, model_path
from alignguard.files import write_text
from alignguard.fit import adapt, load_model
from alignguard.guard import Guard

TERMS = {"lambda_task": 0.01, "lambda_collision": 0.01, "whole_update": False}
GUARDS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, refreshed every 25 from 32": {"refresh_every": 25, "refresh_examples": 32},
    "one-pass sketch, whole update": {"structure": "sketch"},
    "kl to the base, every step": {"lambda_alignment": 0.0, "lambda_kl": 1.0},
    "kl to the base, every 4th": {"lambda_alignment": 0.0, "lambda_kl": 0.3, "kl_every": 4},
    "all terms but the coordinate-wise": {**TERMS, "alpha": 0.0},
    "all terms": {**TERMS, "alpha": 0.5},
}


def rows(tokenizer: Any, name: str, count: int) -> list[dict[str, Any]]:
    return [encode_example(tokenizer, r["prompt"], r["response"]) for r in read_jsonl(data_path(name))[:count]]


def compare(make: Any, tokenizer: Any, config: GuardConfig, steps: int, batch: int) -> dict[str, Any]:
    """Seconds of plain and guarded steps, by turns."""
    task = rows(tokenizer, "task_train", steps * batch)
    models = [adapt(make()), adapt(make())]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in models]
    guard = Guard(models[1], rows(tokenizer, "alignment", 256), config)
    seconds: tuple[list[float], list[float]] = ([], [])
    logging = 0.0
    for step in range(steps):
        data = collate(task[step * batch : (step + 1) * batch], 0)
        for which, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            model.train()
            start = time.perf_counter()
            if which:
                guard.begin_step(step)
            loss = model(**data).loss
            if which:
                loss = loss + guard.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[which].append(time.perf_counter() - start)
        if step % 5 == 4:  # what a Trainer logs; it is not part of a step
            start = time.perf_counter()
            guard.numbers()
            logging += time.perf_counter() - start
    plain, guarded = (sum(s[2:]) for s in seconds)
    pairs = [g / p for p, g in zip(*seconds, strict=True)][2:]
    return {
        "overhead": guarded / plain, "with_logging_every_5_steps": (guarded + logging) / plain, "median_step_without_refresh": statistics.median(pairs),
        "plain_step": plain / (steps - 2), "guarded_step": guarded / (steps - 2), "steps": steps, "batch": batch,
        "config": config.to_dict(),
    }  # fmt: skip


def _train(arguments: tuple[Any, dict[str, Any] | None, int, int, int], send: Any) -> None:
    make, settings, steps, batch, threads = arguments
    torch.set_num_threads(threads)
    _, tokenizer = load_model(model_path())
    task = rows(tokenizer, "task_train", steps * batch)
    model = adapt(make())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    guard = None
    if settings is not None:
        guard = Guard(model, rows(tokenizer, "alignment", 256), GuardConfig.from_dict(settings))
    for step in range(steps):
        data = collate(task[step * batch : (step + 1) * batch], 0)
        if guard is not None:
            guard.begin_step(step)
        loss = model(**data).loss
        if guard is not None:
            loss = loss + guard.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Of this program alone: getrusage would count what the parent held when it forked.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    send.send(int(line.split()[1]) * 1024)


def peak_bytes(make: Any, settings: dict[str, Any] | None, batch: int) -> int:
    """Largest resident set of a process that takes 12 steps, with refreshes at the usual places; None trains plainly."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=((make, settings, 12, batch, torch.get_num_threads()), send))
    process.start()
    peak: int = receive.recv()
    process.join()
    return peak


def embedded() -> Any:
    return load_model(model_path())[0]


def large() -> LlamaForCausalLM:
    """100M parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12,
            num_key_value_heads=12, max_position_embeddings=512,
        )
    )  # fmt: skip


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--large", action="store_true")
    cli.add_argument("--steps", type=int, default=102)
    cli.add_argument("--guards", nargs="+", default=list(GUARDS), choices=list(GUARDS))
    args = cli.parse_args()
    _, tokenizer = load_model(model_path())
    subjects: dict[str, tuple[Any, int, int]] = {"embedded": (embedded, args.steps, 16)}
    if args.large:
        subjects["random LLaMA, 100M"] = (large, args.steps // 2, 8)
    result: dict[str, Any] = {
        "command": "python benchmarks/overhead.py --large", "versions": versions(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    for subject, (make, steps, batch) in subjects.items():
        result[subject] = {}
        plain_peak = peak_bytes(make, None, batch)
        for name in args.guards:
            row = compare(make, tokenizer, GuardConfig.from_dict(GUARDS[name]), steps, batch)
            row["plain_peak_bytes"], row["peak_bytes"] = plain_peak, peak_bytes(make, GUARDS[name], batch)
            result[subject][name] = row
            print(
                f"{subject:<20} {name:<36} {row['overhead']:.3f}, between refreshes {row['median_step_without_refresh']:.3f}",
                flush=True,
            )
            write_text(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
