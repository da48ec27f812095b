"""Every method tuned with the same number of settings on validation prompts, then the best of each over five seeds.

    python benchmarks/rivals.py tune   --out benchmarks/results/tuning.json
    python benchmarks/rivals.py report --out benchmarks/results/rivals.json

``tune`` runs 12 settings of each method, or all of fewer (``studies.ablation.settings_of``), with a seed of its own,
and asks validation prompts. ``report`` takes of each method the setting that :func:`best` names and runs it for every
seed on DriftCheck's own prompts. All runs share data, batches, schedule and the same 256 alignment examples. Both go on
where they stopped; with ``--methods`` some methods alone are run, and the rest of the file stays. ``report --task NAME``
learns a task of ``benchmarks/tasks.py`` in place of the packaged one, with the settings tuned there:

    python benchmarks/tasks.py DATA runs/tasks
    python benchmarks/rivals.py report --task sst2 --seeds 0 1 2 --out benchmarks/results/rivals_sst2.json

So does ``--model FOLDER`` with another aligned model; of a mixture the experts are adapted, not the router. SafeLoRA and
SafeMERGE want the model before its alignment: they are left out unless ``--unaligned FOLDER`` names one. Without
``--methods``, ``report`` runs what the tuning file holds, and says what it lacks. ``report --foreign DATA``, the folder of
the prompt sets, asks unsafe prompts of ``FOREIGN`` too; ``report --own-answers`` keeps the model's own answers to the packaged
prompts in place of the written ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learning_rate import SEED, bench
from transformers import AutoConfig

from alignguard.embedded import TRAINING
from alignguard.files import write_rows, write_text
from alignguard.guard import GuardConfig
from alignguard.loading import load_model
from alignguard.training import own_answers, versions
from alignguard.training.preparation import packaged_prompts
from studies.ablation import ANCHOR, GUARDS, SLACK, best, rivals_plan
from studies.bench import GUARD, Bench, make_job, measure_base, run_job
from studies.ledger import Ledger, run_jobs
from studies.real_model.measure import prompt_groups
from studies.rivals import RIVALS

# Sources that neither the embedded model's alignment nor the packaged prompts have seen, and how many of each are asked.
FOREIGN, ASKED = ("malicious_instruct", "donotanswer", "safetytuned_eval"), 80
BEFORE = {name for name, rival in RIVALS.items() if rival.needs_unaligned}
METHODS = [
    *GUARDS,
    *RIVALS,
    *("paper", "paper, refreshed", "kl, every step", "guard, refreshed rarely", "guard, sketched"),
    *("kl with memory", "kl with memory, every 2nd", "kl with memory, climb 0.3"),
    *("guard, leading part", "guard, leading part, soft"),
    *("plain, best rate", "guard, sketched, best rate"),
]
# arXiv 2508.02079 as written: one-sided Gram, 80 % of its energy, both collision terms, estimated once in 1000 steps; its
# strengths a tenth of what second-hand sources give, which cost the task 2 to 5 points here
PAPER = {
    "structure": "gram", "whole_update": False, "lambda_alignment": 0.3, "lambda_task": 0.001, "lambda_collision": 0.001,
    "alpha": 0.5, "metric": "euclidean", "energy": 0.8, "lambda_kl": 0.0, "first_refresh": None,
}  # fmt: skip
EXPERTS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
SKETCHED = {"structure": "kfac-sketch", "lambda_alignment": 1.0, "refresh_every": 25, "refresh_examples": 8}
DEFAULT = {
    name: getattr(GuardConfig(), name)
    for name in ("lambda_alignment", "lambda_kl", "kl_examples", "kl_every", "kl_tokens", "kl_memory", "kl_climb")
}
FIXED: dict[str, dict[str, Any]] = {
    "paper": {**PAPER, "refresh_every": 1000, "refresh_examples": 128},
    "paper, refreshed": {**PAPER, "refresh_every": 25, "refresh_examples": 32},
    "kl, every step": {**ANCHOR, "lambda_kl": 1.0, "kl_every": 1},
    # the default, chosen on the public model (studies/real_model), and what could be turned in it
    "kl with memory": DEFAULT,
    "kl with memory, every 2nd": {**DEFAULT, "kl_every": 2},
    "kl with memory, climb 0.3": {**DEFAULT, "kl_climb": 0.3},
    # the default before it: both factors sketched, half the alignment examples, at the strength and schedule of the sweep
    "guard, sketched": SKETCHED,
    # ΔW_A in place of the whole update, by a hard projector and a soft one
    "guard, leading part": {**SKETCHED, "whole_update": False},
    "guard, leading part, soft": {**SKETCHED, "whole_update": False, "projection": "soft"},
    # a strength that makes up for an estimate gone stale, and costs the task; it was the default before the sweep
    "guard, refreshed rarely": {
        "structure": "kfac",
        "lambda_alignment": 10.0,
        "whole_update": True,
        "refresh_every": 100,
        "first_refresh": 10,
        "refresh_examples": 16,
    },
}


def sweep(shared: Bench, jobs: list[dict[str, Any]], out: Path, processes: int, command: str) -> None:
    """Run what is missing; the file holds every run of its ledger, those of other calls too.

    The ledger is not committed, ``out`` is: on a fresh checkout the ledger starts with the runs that ``out`` holds, if
    they are of the same model, data and versions.
    """
    head = {"command": command, "versions": versions(), "training": TRAINING, "bench": shared.describe()}
    ledger = Ledger(out.with_suffix(".runs.jsonl"), head)
    before = json.loads(out.read_text()) if out.is_file() else {}
    same = all(before.get(key) == value for key, value in head.items())
    if same and not ledger.rows:
        for run in before["runs"]:
            ledger.add(run["job"], run["result"])
    base = before["base"] if same else measure_base(shared)
    run_jobs(jobs, functools.partial(run_job, shared), ledger, processes, progress=True)
    write_text(out, json.dumps({**head, "base": base, "runs": ledger.rows}, indent=1) + "\n")


def flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's result beside its method, seed and settings."""
    job = run["job"]
    settings = {**job["settings"], **job.get("training", {})}
    return {"method": job["group"], "seed": job["seed"], "settings": settings, **run["result"]}


def tune(args: argparse.Namespace) -> None:
    plan = rivals_plan({}, [SEED], whole_grid=True, unaligned=args.unaligned)
    jobs = [{**job, "group": job["name"].split(" (")[0]} for job in plan]
    jobs = [job for job in jobs if job["group"] in args.methods or job["name"] == "plain"]
    with tempfile.TemporaryDirectory() as folder:
        shared = bench(Path(folder), adapters=str(args.out.with_suffix(".adapters")))
        sweep(shared, jobs, args.out, args.processes, "python benchmarks/rivals.py tune")


def chosen(tuned: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each method the best setting that learns as much, but for ``SLACK``, as plain LoRA on the schedule of all."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for run in map(flat, tuned["runs"]):
        by_method.setdefault(run["method"], []).append(run)
    least = next(run["task"] for run in by_method["plain"] if not run["settings"]) - SLACK
    return {method: best(runs, tuned["base"], least)["settings"] for method, runs in by_method.items()}


def best_rate(tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule at which plain LoRA learns the task best, whatever it forgets."""
    plain = [run for run in map(flat, tuned["runs"]) if run["method"] == "plain" and "error" not in run]
    return max(plain, key=lambda run: run["task"])["settings"]


def foreign_prompts(data: Path, out: Path) -> str:
    """Write the foreign prompts, and give the file."""
    groups = {f"foreign {name}" for name in FOREIGN}
    asked = [row for row in prompt_groups(data, "test", ASKED) if row["id"].rpartition("/")[0] in groups]
    write_rows(out, asked)
    return str(out)


def asked(shared: Bench, command: str, args: argparse.Namespace) -> tuple[Bench, str]:
    """The bench and the command of a report with the task and the foreign prompts that its arguments name."""
    if args.task is not None:
        files = {f"task_{part}": str(args.tasks / f"{args.task}_{part}.jsonl") for part in ("train", "test")}
        shared, command = dataclasses.replace(shared, **files), f"{command} --task {args.task}"
    if args.foreign is not None:
        path = foreign_prompts(args.foreign, args.out.with_suffix(".foreign.jsonl"))
        shared, command = dataclasses.replace(shared, foreign=path), f"{command} --foreign DATA"
    return shared, command


def arguments(description: str | None, tuning: str) -> argparse.ArgumentParser:
    """What a sweep that is tuned and then reported takes on the command line."""
    cli = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=["tune", "report"])
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--tuning", type=Path, default=Path("benchmarks/results") / tuning)
    cli.add_argument("--task", help="a task of benchmarks/tasks.py (report alone)")
    cli.add_argument("--tasks", type=Path, default=Path("runs/tasks"), help="folder that tasks.py wrote")
    cli.add_argument(
        "--foreign", type=Path, help="folder of the prompt sets, to ask foreign sources too (report alone)"
    )
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    cli.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    return cli


def own_rows(model: str, out: Path) -> str:
    """Write the packaged prompts with the model's own answers, as a run without alignment data keeps them; the file."""
    found = own_answers(*load_model(model), packaged_prompts(), progress=True)
    write_rows(out, found.rows)
    return str(out)


def report(args: argparse.Namespace) -> None:
    tuned = json.loads(args.tuning.read_text())
    settings = chosen(tuned)
    if not args.named:
        lacking = [name for name in args.methods if name in (*GUARDS, *RIVALS) and name not in settings]
        print(f"not tuned in {args.tuning} and left out: {', '.join(lacking) or 'none'}", file=sys.stderr)
        args.methods = [name for name in args.methods if name not in lacking]
    jobs = []
    for seed in args.seeds:
        for name in args.methods:
            if name in FIXED:
                jobs.append(make_job(name, GUARD, FIXED[name], seed, name))
            elif name.endswith(", best rate"):
                method = name.removesuffix(", best rate")
                own = FIXED.get(method, {})
                jobs.append(make_job(name, GUARD if own else method, own, seed, name, training=best_rate(tuned)))
            elif name == "plain":
                jobs.append(make_job(name, "plain", {}, seed, name))
            elif name in settings:
                if name in BEFORE:
                    settings[name]["unaligned"] = args.unaligned
                jobs.append(make_job(name, GUARD if name in GUARDS else name, settings[name], seed, name))
            else:
                raise SystemExit(f"{name} has not been tuned: {args.tuning} holds {', '.join(sorted(settings))}")
    shared = Bench.embedded(adapters=str(args.out.with_suffix(".adapters")))
    command = "python benchmarks/rivals.py report"
    if args.model is not None:
        lora = EXPERTS if AutoConfig.from_pretrained(args.model).model_type == "mixtral" else {}
        shared = dataclasses.replace(shared, model=str(args.model), lora=lora)
        command = f"{command} --model {args.model.name}"
    if args.own_answers:
        shared = dataclasses.replace(shared, alignment=own_rows(shared.model, args.out.with_suffix(".own.jsonl")))
        command = f"{command} --own-answers"
    shared, command = asked(shared, command, args)
    sweep(shared, jobs, args.out, args.processes, command)


def main() -> None:
    cli = arguments(__doc__, "tuning.json")
    cli.add_argument("--model", type=Path, help="folder of another aligned model than the embedded one (report alone)")
    cli.add_argument("--own-answers", action="store_true", help="keep the model's own answers (report alone)")
    cli.add_argument("--unaligned", help="folder of the model before its alignment, for those that need it")
    cli.add_argument("--methods", nargs="+", choices=METHODS)
    args = cli.parse_args()
    args.named = args.methods is not None
    if args.methods is None:
        args.methods = [name for name in METHODS if name not in BEFORE or args.unaligned]
    if (named := sorted(BEFORE & set(args.methods))) and not (args.unaligned and Path(args.unaligned).is_dir()):
        cli.error(
            f"{', '.join(named)} needs --unaligned, a folder with the model before its alignment, not {args.unaligned!r}"
        )
    (tune if args.what == "tune" else report)(args)


if __name__ == "__main__":
    main()
