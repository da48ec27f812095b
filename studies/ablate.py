"""``python -m studies ablate``: the guard taken apart, many seeds, on as many processes as there are cores."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignguard.files import write_text
from alignguard.guard import GuardConfig
from alignguard.training import versions
from studies import plans, summaries
from studies.bench import Bench, measure_base
from studies.frontier import Point, dots, frontier_plot, standalone
from studies.jobs import run_job
from studies.ledger import Ledger, run_jobs
from studies.parts import stability


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of :func:`run_ablate`."""
    parser.description = "add the guard's terms one by one, turn its knobs, and run its rivals, over seeds"
    parser.add_argument(
        "--study",
        nargs="+",
        choices=["terms", "knobs", "rivals", "sweep"],
        default=["terms"],
        help="terms: added one by one; knobs: one at a time; rivals: each at its defaults; sweep: 12 settings of each",
    )
    parser.add_argument(
        "--vary", nargs="+", default=[], metavar="FIELD=V1,V2", help="turn these knobs in place of a study's own list"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="GuardConfig fields that all guarded runs share"
    )
    parser.add_argument("--stability", type=float, default=0.01, help="λ_T of the terms study (default: 0.01)")
    parser.add_argument("--collision", type=float, default=0.01, help="weight of each collision term (default: 0.01)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        help="runs at a time (default: cores); step times are those of runs side by side",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablate"), help="default: runs/ablate")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and do nothing")
    bench = parser.add_argument_group("bench", "the embedded model and its task where left out")
    bench.add_argument("--model", help="folder or hub name")
    bench.add_argument("--task-data", help="what is learned")
    bench.add_argument("--task-test", help="held-out rows of the same")
    bench.add_argument("--alignment-data", help="what methods may use to keep alignment")
    bench.add_argument("--drift-data", help="other such rows, on which KL from the base is measured")
    bench.add_argument("--prompts", help="DriftCheck prompts as JSONL")
    bench.add_argument("--unaligned", help="the model before alignment training; SafeLoRA needs it")
    bench.add_argument("--limit", type=int, default=None, help="most prompts of each category")
    bench.add_argument("--alignment-limit", type=int, default=None, help="alignment examples any method may see")
    bench.add_argument("--learning-rate", type=float, default=None, help="peak learning rate")
    bench.add_argument("--max-steps", type=int, default=None, help="optimizer steps of each run")
    bench.add_argument("--batch-size", type=int, default=None, help="task examples in a step")
    bench.add_argument("--rank", type=int, default=None, help="LoRA rank")
    bench.add_argument(
        "--parts", action="store_true", help="keep ΔW_A of guarded runs and report its cosine over seeds"
    )
    parser.set_defaults(run=run_ablate)


def _field(text: str, option: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not value:
        raise ValueError(f"{option} {text!r}: expected FIELD=VALUE")
    known = [field.name for field in dataclasses.fields(GuardConfig)]
    if name not in known:
        raise ValueError(f"{option} {text!r}: GuardConfig has no field {name!r}; it has {', '.join(known)}")
    return name, value


def _value(text: str) -> Any:
    """A word as the plainest value it can be read as: number, true, false, none, or itself."""
    words = {"true": True, "false": False, "none": None, "never": 1_000_000}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _bench(args: argparse.Namespace) -> Bench:
    names = {"task_train": "task_data", "task_test": "task_test", "alignment": "alignment_data", "drift": "drift_data"}
    given = {name: getattr(args, option) for name, option in names.items() if getattr(args, option)}
    if args.model and len(given) < len(names):
        lacking = [f"--{option.replace('_', '-')}" for name, option in names.items() if name not in given]
        raise ValueError(f"with --model also give {', '.join(lacking)}")
    changes: dict[str, Any] = {**given, **({"model": args.model} if args.model else {})}
    changes |= {"prompts": args.prompts, "limit": args.limit, "alignment_limit": args.alignment_limit}
    changes["adapters"] = str(args.output_dir / "adapters")
    if args.parts:
        changes["parts"] = str(args.output_dir / "parts")
    if args.rank is not None:
        changes["lora"] = {"r": args.rank, "lora_alpha": 2 * args.rank}
    bench = Bench.embedded(**changes)
    options = {
        "learning_rate": args.learning_rate,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
    }
    return dataclasses.replace(
        bench, training={**bench.training, **{k: v for k, v in options.items() if v is not None}}
    )


def _jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    base = {name: _value(value) for name, value in (_field(text, "--set") for text in args.set)}
    seeds: Sequence[int] = list(dict.fromkeys(args.seeds))
    jobs: list[dict[str, Any]] = []
    if args.vary:
        jobs += plans.terms_plan(base, seeds)[: len(seeds)]  # plain LoRA, which all are compared with
        for text in args.vary:
            name, values = _field(text, "--vary")
            jobs += plans.knob_jobs(name, [_value(v) for v in values.split(",")], base, seeds)
        return jobs
    for study in dict.fromkeys(args.study):
        if study == "terms":
            jobs += plans.terms_plan(base, seeds, args.stability, args.collision)
        elif study == "knobs":
            jobs += plans.terms_plan(base, seeds)[: len(seeds)] + plans.knobs_plan(base, seeds)
        else:
            jobs += plans.rivals_plan(base, seeds, whole_grid=study == "sweep", unaligned=args.unaligned)
    return list({json.dumps(job, sort_keys=True): job for job in jobs}.values())  # studies share their plain runs


def run_ablate(args: argparse.Namespace) -> None:
    """Run what the output folder does not hold yet, then write its table, its figures and all numbers as JSON.

    Raises:
        FileNotFoundError, ValueError: bad options or data, named before the first run.
    """
    if args.processes < 1:
        raise ValueError(f"--processes must be at least 1, not {args.processes}")
    jobs, bench = _jobs(args), _bench(args)
    head = bench.describe()
    if args.dry_run:
        for job in jobs:
            print(json.dumps(job))
        print(f"{len(jobs)} runs on {args.processes} processes, results in {args.output_dir}")
        return
    start = Ledger(args.output_dir / "base.jsonl", head)
    base = run_jobs([{"name": "base"}], lambda job: measure_base(bench), start)[0]["result"]
    ledger = Ledger(args.output_dir / "runs.jsonl", head)
    rows = run_jobs(jobs, functools.partial(run_job, bench), ledger, args.processes, progress=True)
    gathered = summaries.summarise(rows, base)
    text = summaries.table(gathered, base)
    write_text(args.output_dir / "table.md", text)
    shown = {f"{s.group}: {s.name}" if len(args.study) > 1 else s.name: s.numbers for s in gathered}
    titles = {"task": "task, %", "refusal": "unsafe refused, %", "compliance": "ordinary answered, %"}
    write_text(args.output_dir / "ablation.svg", standalone(dots(shown, titles, base)))
    methods: dict[str, list[Point]] = {}
    for row in rows:
        if "error" not in row["result"]:
            point = Point(row["result"]["task"], row["result"]["refusal"], row["job"]["name"])
            methods.setdefault(row["job"]["name"].split(" (")[0], []).append(point)
    if methods and {"rivals", "sweep"} & set(args.study):
        drawn = frontier_plot(methods, base=Point(base["task"], base["refusal"], "base"))
        write_text(args.output_dir / "frontier.svg", standalone(drawn))
    told: dict[str, Any] = {"versions": versions(), "bench": head, "base": base, "runs": rows}
    if bench.parts is not None:
        told["stability"] = found = stability(rows, bench.parts)
        for name, layers in found.items():
            mean, least = sum(layers.values()) / len(layers), min(layers.values())
            print(f"cosine of ΔW_A between seeds, {name}: mean {mean:.3f}, least {least:.3f} of {len(layers)} layers")
    write_text(args.output_dir / "ablation.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    print(text)
    print(f"written to {args.output_dir}: ablation.json, table.md, ablation.svg")
