"""Time of a guarded optimizer step over a plain one, refreshes included, and peak memory of the process (Linux).

    python benchmarks/overhead.py --out benchmarks/results/overhead.json [--large | --model FOLDER]

Two copies of a model are trained on the same batches in one process, a plain step and a guarded one by turns, so that
whatever else the machine does meets both. Peak memory is the largest resident set of a process that trains alone, with
Python and torch in it. ``--large`` takes a random LLaMA of 100 million parameters in place of the embedded model; what
stands in the file of the other is kept. ``--model`` takes a model of one's own, ``--batch`` rows a step. ``--bf16`` trains
under autocast, as ``TrainingArguments(bf16=True)`` does.

A refresh is counted at its share, one in as many steps as lie between two: the embedded model is trained for so many steps that
this is what happens; the large one, whose steps take seconds, for ``--pairs`` around a refresh, and ``overhead`` is then
(guarded step without refresh + seconds of a refresh / steps between two) / plain step. ``refresh_seconds`` is what the step
with the refresh takes beyond the others' median, new eigenvectors included.

Where KL is read, ``reading`` tells what the steps with a reading take beyond the plain one, as a share of it and for each
token that is read over what a token of the task costs: once the base has been read at those rows, and at first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alignguard.data import collate, encode_example, read_jsonl
from alignguard.embedded import data_path, model_path
from alignguard.files import write_text
from alignguard.guard import Guard, GuardConfig
from alignguard.guard.rows import shortened
from alignguard.loading import adapt, load_model
from alignguard.training import versions

TERMS = {"lambda_task": 0.01, "lambda_collision": 0.01, "whole_update": False}
CURVATURE = GuardConfig.curvature
GUARDS: dict[str, GuardConfig] = {
    "default": GuardConfig(),
    "curvature by layers": CURVATURE(),
    "exact factors, refreshed every 25 from 16": CURVATURE(structure="kfac", refresh_examples=16),
    "one-pass sketch, whole update": CURVATURE(structure="sketch"),
    "kl to the base, every step": GuardConfig(lambda_kl=1.0, kl_every=1, kl_tokens=None, kl_memory=0),
    "kl to the base, every 4th": GuardConfig(lambda_kl=0.3, kl_every=4, kl_tokens=None, kl_memory=0),
    "guard and kl, each weaker": GuardConfig.combined(),
    "all terms but the coordinate-wise": CURVATURE(**TERMS, alpha=0.0),
    "all terms": CURVATURE(**TERMS, alpha=0.5),
}


def rows(tokenizer: Any, name: str, count: int | None) -> list[dict[str, Any]]:
    return [encode_example(tokenizer, r["prompt"], r["response"]) for r in read_jsonl(data_path(name))[:count]]


def compare(
    make: Any, tokenizer: Any, config: GuardConfig, numbers: list[int], batch: int, kept: int | None = 256,
    bf16: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of plain and guarded steps, by turns; ``numbers`` are what the guard is told the steps are."""
    task = rows(tokenizer, "task_train", len(numbers) * batch)
    alignment = rows(tokenizer, "alignment", kept)
    models = [adapt(make()), adapt(make())]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in models]
    guard = Guard(models[1], alignment, config)
    guard.attach(optimizers[1])
    read: dict[str, list[float]] = {"known": [], "first": []}
    task_tokens = 0
    seconds: tuple[list[float], list[float]] = ([], [])
    logging, fresh, reading = 0.0, [], set()
    for place, number in enumerate(numbers):
        data = collate(task[place * batch : (place + 1) * batch], 0)
        task_tokens += int(data["attention_mask"].sum())
        readings = guard.examples_read
        for which, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            model.train()
            before = guard.refreshes
            start = time.perf_counter()
            if which:
                guard.begin_step(number)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**data).loss
                if which:
                    loss = loss + guard.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[which].append(time.perf_counter() - start)
            if guard.refreshes > before:
                fresh.append(place)
        if config.lambda_kl and guard.examples_read > readings and place not in fresh:
            reading.add(place)
            if place >= 2:
                read["first" if readings < len(alignment) else "known"].append(seconds[1][-1] - seconds[0][-1])
        if number % 5 == 4:  # what a Trainer logs; it is not part of a step
            start = time.perf_counter()
            guard.numbers()
            logging += time.perf_counter() - start
    sampled = numbers != list(range(len(numbers)))  # a few steps around a refresh, which comes too often among them
    warm = 1 if sampled else 2
    usual = [place for place in range(warm, len(numbers)) if place not in fresh]
    usual = [place for place in usual if place not in reading] or usual  # each step may have one
    refreshes = [place for place in fresh if place >= warm]
    plain, guarded = (sum(s[warm:]) for s in seconds)
    refresh = 0.0
    if refreshes:
        refresh = seconds[1][refreshes[0]] - statistics.median(seconds[1][place] for place in usual)
    row = {
        "overhead": guarded / plain, "with_logging_every_5_steps": (guarded + logging) / plain,
        "refreshes_counted": len(refreshes) / (len(numbers) - warm),
    }  # fmt: skip
    if sampled:
        plain, guarded = (sum(s[place] for place in usual) / len(usual) for s in seconds)
        row = {
            "overhead": (guarded + refresh / config.interval()) / plain,
            "refreshes_counted": 1 / config.interval(),
        }
        plain, guarded = plain * (len(numbers) - warm), guarded * (len(numbers) - warm)
    if config.lambda_kl:
        cut = [shortened(one, config.kl_tokens, "causal") for one in alignment]
        read_tokens = config.kl_examples * sum(len(one["input_ids"]) for one in cut) / len(cut)
        per_token = statistics.mean(seconds[0][warm:]) / (task_tokens / len(numbers))
        row["reading"] = {
            when: {
                "of_plain_step": statistics.median(found) / statistics.median(seconds[0][warm:]),
                "per_token": statistics.median(found) / read_tokens / per_token,
                "count": len(found),
            }
            for when, found in read.items()
            if found
        } | {"tokens": read_tokens, "task_tokens": task_tokens / len(numbers)}
    return row | {
        "median_step_without_refresh": statistics.median(seconds[1][place] / seconds[0][place] for place in usual),
        "refresh_seconds": refresh, "plain_step": plain / (len(numbers) - warm), "guarded_step": guarded / (len(numbers) - warm),
        "steps": len(numbers), "batch": batch, "config": config.to_dict(),
    }  # fmt: skip


def _train(arguments: tuple[Any, GuardConfig | None, list[int], int, int, bool], send: Any) -> None:
    make, config, numbers, batch, threads, bf16 = arguments
    torch.set_num_threads(threads)
    tokenizer = make(tokenizer=True)
    task = rows(tokenizer, "task_train", len(numbers) * batch)
    model = adapt(make())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    guard = None
    if config is not None:
        guard = Guard(model, rows(tokenizer, "alignment", 256), config)
        guard.attach(optimizer)
    for place, number in enumerate(numbers):
        data = collate(task[place * batch : (place + 1) * batch], 0)
        if guard is not None:
            guard.begin_step(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**data).loss
            if guard is not None:
                loss = loss + guard.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Of this program alone: getrusage would count what the parent held when it forked.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    send.send(int(line.split()[1]) * 1024)


def peak_bytes(make: Any, config: GuardConfig | None, numbers: list[int], batch: int, bf16: bool = False) -> int:
    """Largest resident set of a process that takes a few steps, two refreshes among them; None trains plainly."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=((make, config, numbers, batch, torch.get_num_threads(), bf16), send))
    process.start()
    peak: int = receive.recv()
    process.join()
    return peak


def stored(folder: str | Path, tokenizer: bool = False) -> Any:
    """The model, or its tokenizer."""
    return load_model(folder)[int(tokenizer)]


def large(tokenizer: bool = False) -> Any:
    """100M parameters, and the embedded model's tokenizer."""
    if tokenizer:
        return stored(model_path(), tokenizer)
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
    which = cli.add_mutually_exclusive_group()
    which.add_argument("--large", action="store_true")
    which.add_argument("--model", type=Path, help="folder of a causal language model")
    cli.add_argument("--steps", type=int, default=102, help="of the embedded model, or of that of --model")
    cli.add_argument("--pairs", type=int, default=20, help="of steps of the large model, plain and guarded")
    cli.add_argument("--batch", type=int, default=16, help="of the large model, or of that of --model")
    cli.add_argument("--alignment-rows", type=int, default=256, help="alignment rows that the guard may read")
    cli.add_argument("--bf16", action="store_true", help="train under autocast in bfloat16")
    cli.add_argument("--guards", nargs="+", default=list(GUARDS), choices=list(GUARDS))
    args = cli.parse_args()
    make, batch, subject = partial(stored, model_path()), 16, "embedded"
    if args.large:
        make, batch, subject = large, args.batch, "random LLaMA, 100M"
    elif args.model is not None:
        make, batch, subject = partial(stored, args.model), args.batch, f"{args.model.name}, {args.batch} rows"
    subject += ", bfloat16" if args.bf16 else ""
    tokenizer = make(tokenizer=True)
    numbers, few = list(range(args.steps)), list(range(12))
    if args.large:
        numbers, few = [0, *range(7, 7 + args.pairs)], [0, 10]
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    command = "OMP_NUM_THREADS=1 python benchmarks/overhead.py [--large | --model FOLDER --batch ROWS] [--bf16]"
    result |= {"command": command, "versions": versions(), "threads": torch.get_num_threads()}
    found = result.setdefault(subject, {})
    plain_peak = peak_bytes(make, None, few, batch, args.bf16)
    for name in args.guards:
        row = compare(make, tokenizer, GUARDS[name], numbers, batch, args.alignment_rows, args.bf16)
        row["plain_peak_bytes"], row["peak_bytes"] = plain_peak, peak_bytes(make, GUARDS[name], few, batch, args.bf16)
        found[name] = row
        print(
            f"{subject:<20} {name:<36} {row['overhead']:.3f}, between refreshes {row['median_step_without_refresh']:.3f}, "
            f"memory {row['peak_bytes'] / plain_peak:.3f}",
            flush=True,
        )
        write_text(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
