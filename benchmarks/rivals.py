"""Every method tuned with the same number of settings on validation prompts, then the best of each over five seeds.

    python benchmarks/rivals.py tune   --out benchmarks/results/tuning.json
    python benchmarks/rivals.py report --out benchmarks/results/rivals.json

``tune`` runs 12 settings of each method, or all of fewer (``studies.plans.settings_of``), with a seed of its own,
and asks validation prompts. ``report`` takes of each method the setting that :func:`best` names and runs it for every
seed on DriftCheck's own prompts. All runs share data, batches, schedule and the same 256 alignment examples. Both go on
where they stopped; with ``--methods`` some methods alone are run, and the rest of the file stays. ``report --task NAME``
learns a task of ``benchmarks/tasks.py`` in place of the packaged one, with the settings tuned there:

    python benchmarks/tasks.py DATA runs/tasks
    python benchmarks/rivals.py report --task sst2 --seeds 0 1 2 --out benchmarks/results/rivals_sst2.json

So does ``--model FOLDER`` with another aligned model; of a mixture the experts are adapted, not the router. SafeLoRA and
SafeMERGE want the model before its alignment: they are left out unless ``--unaligned FOLDER`` names one. Without
``--methods``, ``report`` runs what the tuning file holds, and says what it lacks. ``report --foreign DATA``, the folder of
the prompt sets, asks unsafe prompts of ``sweeps.FOREIGN`` too; ``report --own-answers`` keeps the model's own answers to the packaged
prompts in place of the written ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sweeps import FIXED, SEED, arguments, asked, chosen, flat, sweep, validation_bench
from transformers import AutoConfig

from alignguard.files import write_rows
from alignguard.loading import load_model
from alignguard.training import own_answers
from alignguard.training.preparation import packaged_prompts
from studies.bench import Bench
from studies.jobs import GUARD, make_job
from studies.plans import GUARDS, rivals_plan
from studies.rivals import RIVALS

BEFORE = {name for name, rival in RIVALS.items() if rival.needs_unaligned}
METHODS = [
    *GUARDS,
    *RIVALS,
    *("paper", "paper, refreshed", "kl, every step", "guard, refreshed rarely", "guard, sketched"),
    *("kl with memory", "kl with memory, every 2nd", "kl with memory, climb 0.3"),
    *("guard, leading part", "guard, leading part, soft"),
    *("plain, best rate", "guard, sketched, best rate"),
]
EXPERTS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


def tune(args: argparse.Namespace) -> None:
    plan = rivals_plan({}, [SEED], whole_grid=True, unaligned=args.unaligned)
    jobs = [{**job, "group": job["name"].split(" (")[0]} for job in plan]
    jobs = [job for job in jobs if job["group"] in args.methods or job["name"] == "plain"]
    with tempfile.TemporaryDirectory() as folder:
        shared = validation_bench(Path(folder), adapters=str(args.out.with_suffix(".adapters")))
        sweep(shared, jobs, args.out, args.processes, "python benchmarks/rivals.py tune")


def best_rate(tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule at which plain LoRA learns the task best, whatever it forgets."""
    plain = [run for run in map(flat, tuned["runs"]) if run["method"] == "plain" and "error" not in run]
    return max(plain, key=lambda run: run["task"])["settings"]


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
