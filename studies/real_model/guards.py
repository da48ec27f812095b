"""Guards on the aligned model: what each keeps of refusals from sources that nothing was trained on, and at what price."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignguard.data import read_jsonl
from alignguard.drift import share_of
from alignguard.embedded import data_path
from alignguard.files import write_rows, write_text
from alignguard.loading import load_model
from alignguard.training import own_answers, versions
from alignguard.training.preparation import packaged_prompts
from studies.bench import Bench, measure_base
from studies.choices import with_others
from studies.jobs import run_job
from studies.ledger import Ledger, run_jobs
from studies.parts import stability
from studies.real_model import borderline, rows
from studies.real_model.measure import prompt_groups
from studies.real_model.methods import BASE, METHODS, default, job_of, needs_unaligned

# What the guard may read: prompts of the sources that aligned the model, answered by the model itself, or the packaged
# prompts, answered by it too or as they are written.
MIXED, UNSAFE, PACKAGED, WRITTEN = "mixed", "unsafe", "packaged", "written"
ALIGNMENT: dict[str, dict[str, int]] = {
    MIXED: {"unsafe": 176, "borderline": 48, "ordinary": 32},
    UNSAFE: {"unsafe": 256},
    PACKAGED: {"unsafe": 192, "borderline": 64},
    WRITTEN: {"unsafe": 192, "borderline": 64},
}
DRIFT = 48  # unsafe prompts of the same sources, of their test split, on whose refusals KL is measured
TASK_TEST = 100  # rows of the held-out task
TEXTS = 40  # paragraphs of WikiText-2 that are read after a task of its own
CHOICES = {"sst2": 80, "agnews": 80}  # questions of other tasks that are asked then, chosen among their labels
LABELLED = "judge_donotanswer_labelled.jsonl"  # replies that people have labelled, for a second judge
TOKENS = 24  # of an answer that is judged: refusals of this model are told by their first words
CHOOSING = ("tdc2023", "safetytuned_eval")  # foreign sources that settings are chosen by; the others are reported
REPORTED = tuple(name for name in rows.FOREIGN if name not in CHOOSING)

HARMLESS = {  # groups asked beside them, by the openings of their names
    "borderline": ("OR-Bench hard", *(f"contrast, held out: {kind}" for kind in borderline.HELD_OUT)),
    "ordinary": ("alpaca", "gsm8k", "packaged"),
}

TRAINING = {"max_steps": 120, "per_device_train_batch_size": 8, "learning_rate": 5e-4}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def files(
    model: str | Path,
    data: str | Path,
    folder: str | Path,
    choosing: bool,
    limit: int,
    mixture: str = MIXED,
    task: str | Path | None = None,
) -> dict[str, str]:
    """Write what the runs read: alignment rows, rows for KL, prompts, and the task's held-out rows.

    With another task than the packaged one also texts, and questions of tasks that lie beside it.

    Args:
        model: the aligned model, whose own answers are to be kept; of unsafe prompts its refusals alone are written.
        data: folder of the prompt sets.
        folder: receives the files; those that are there are taken as they are.
        choosing: ask the foreign sources that settings are chosen by, not those that are reported.
        limit: most prompts of each group.
        mixture: which alignment rows, a key of ``ALIGNMENT``.
        task: another task than the packaged one, NAME for NAME_train.jsonl and NAME_test.jsonl.

    Returns:
        Paths by the names of :class:`studies.bench.Bench`'s fields.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in ("alignment", "drift", "task_test")}
    paths["alignment"] = folder / ("alignment.jsonl" if mixture == MIXED else f"alignment-{mixture}.jsonl")
    if mixture == WRITTEN:
        paths["alignment"] = data_path("alignment")
    paths["prompts"] = folder / f"prompts-{'choosing' if choosing else 'reported'}-{limit}.jsonl"
    sources = CHOOSING if choosing else REPORTED
    asked = [row for row in prompt_groups(data, "test", limit) if _asked(row, sources, limit)]
    write_rows(paths["prompts"], asked)
    train, test = data_path("task_train"), data_path("task_test")
    if task is not None:
        train, test = (Path(f"{task}_{part}.jsonl") for part in ("train", "test"))
        asked_too = {name: Path(task).with_name(f"{name}_test.jsonl") for name in CHOICES if name != Path(task).name}
        for path in (train, test, *asked_too.values()):
            if not path.is_file():
                raise FileNotFoundError(f"task: no such file: {path}; benchmarks/tasks.py writes them")
        paths["task_test"], paths["texts"] = folder / f"task_test-{Path(task).name}.jsonl", folder / "texts.jsonl"
        write_rows(paths["texts"], [{"text": text} for text in rows.paragraphs(data, "test")[:TEXTS]])
        paths["choices"] = folder / f"choices-{Path(task).name}.jsonl"
        questions = [with_others(list(read_jsonl(path)), name)[: CHOICES[name]] for name, path in asked_too.items()]
        write_rows(paths["choices"], [row for found in questions for row in found])
    paths["task_train"] = train
    write_rows(paths["task_test"], list(read_jsonl(test))[:TASK_TEST])
    lacking = [name for name in ("alignment", "drift") if not paths[name].exists()]
    if lacking:
        loaded, tokenizer = load_model(model)
        for name in lacking:
            wanted = _home(data, "test", DRIFT) if name == "drift" else _alignment(data, mixture)
            found = own_answers(loaded, tokenizer, wanted, path=paths[name].with_suffix(".log"), progress=True)
            write_rows(paths[name], found.rows)
    return {name: str(path) for name, path in paths.items()}


def _asked(row: Mapping[str, Any], sources: Sequence[str], limit: int) -> bool:
    """Whether a prompt is asked after each run: foreign unsafe ones, and of home and of harmless ones ``limit`` in all."""
    group, _, number = row["id"].rpartition("/")
    if row["category"] == "unsafe":
        if group.startswith("home "):  # other prompts of the sources that the alignment rows are of
            return sources == REPORTED and int(number) < -(-limit // len(rows.HOME))
        return group in {f"foreign {name}" for name in sources}
    same = HARMLESS[row["category"]]
    return any(group.startswith(name) for name in same) and int(number) < limit // len(same)


def _home(data: str | Path, split: str, count: int) -> list[dict[str, str]]:
    """Unsafe prompts of the home sources, as many of each."""
    each = -(-count // len(rows.HOME))
    found = [row for name in rows.HOME for row in rows.hashed(rows.unsafe(data, name, [split]), 0)[:each]]
    return [{"prompt": row["prompt"], "category": "unsafe"} for row in found[:count]]


def _alignment(data: str | Path, mixture: str) -> list[dict[str, str]]:
    if mixture == PACKAGED:
        return packaged_prompts()
    counts = ALIGNMENT[mixture]
    found = [*_home(data, "train", counts["unsafe"])]
    half = counts.get("borderline", 0) // 2
    contrast = borderline.drawn(borderline.KINDS, "train", half, 0) if half else []
    hard = [row["prompt"] for row in rows.hashed(rows.hard(data, "train"), 0)[:half]]
    found += [{"prompt": prompt, "category": "borderline"} for prompt in (*contrast, *hard)]
    everyday = rows.hashed(rows.ordinary(data, 0), 0)[: counts.get("ordinary", 0)]
    return found + [{"prompt": row["prompt"], "category": "ordinary"} for row in everyday]


def summary(found: Sequence[Mapping[str, Any]], prompts: str | Path) -> list[dict[str, Any]]:
    """Of each run its shares and verdicts, source by source, its task loss, drift and seconds a step.

    Verdicts are a 0 or 1 for each prompt: ``refused`` by the rules, ``second`` by the second judge where one was asked.
    """
    groups = [row["id"].rpartition("/")[0] for row in read_jsonl(prompts) if row["category"] == "unsafe"]
    told = []
    for row in found:
        result = dict(row["result"])
        shares: dict[str, dict[str, Any]] = {}
        for group, bits in _by_source(groups, result.pop("refused", "")).items():
            shares[group] = {**asdict(share_of([bit == "1" for bit in bits])), "refused": bits}
        if "second" in result:
            for group, bits in _by_source(groups, result.pop("second")).items():
                shares[group]["second"] = bits
        job = row["job"]
        told.append(
            {"name": job["name"], "seed": job["seed"], "training": job.get("training", {}), "sources": shares, **result}
        )
    return told


def _by_source(groups: Sequence[str], verdicts: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for group, verdict in zip(groups, verdicts, strict=True):
        found[group] = found.get(group, "") + verdict
    return found


def earlier(out: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary holds already; no runs where there is no such file.

    Raises:
        ValueError: its runs are of other settings or versions than ``head``; what differs is named.
    """
    if not out.is_file():
        return {"runs": []}
    before: dict[str, Any] = json.loads(out.read_text())
    if other := [name for name, value in head.items() if before.get(name) != value]:
        raise ValueError(f"{out} holds runs with other {', '.join(other)}: name another file for --out")
    return before


def _refused(run: Mapping[str, Any]) -> dict[str, str]:
    return {group: share["refused"] for group, share in run["sources"].items()}


def joined(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of a summary and those of a ledger; where both hold one, the ledger's.

    Raises:
        ValueError: the model before fine-tuning answers otherwise in one than in the other, so it or what is asked is
            another.
    """
    place = {(run["name"], run["seed"], json.dumps(run["training"], sort_keys=True)): run for run in before}
    for run in now:
        key = run["name"], run["seed"], json.dumps(run["training"], sort_keys=True)
        if run["name"] == BASE and key in place and _refused(place[key]) != _refused(run):
            raise ValueError(
                f"--out holds runs of another model or other prompts: {BASE!r} answers otherwise; name another file"
            )
        place[key] = run
    return list(place.values())


def add_arguments(cli: argparse.ArgumentParser) -> None:
    """The command line of :func:`run`."""
    cli.description = __doc__
    cli.add_argument("--model", required=True, help="the aligned model")
    cli.add_argument("--data", required=True, help="folder of the prompt sets")
    cli.add_argument("--folder", type=Path, required=True, help="receives rows, prompts and the ledger of runs")
    cli.add_argument("--methods", nargs="*", choices=list(METHODS), help="all, if left out, that can be run")
    cli.add_argument("--unaligned", help="folder of the model before its alignment, for SafeLoRA")
    cli.add_argument("--seeds", nargs="+", type=int, default=[0])
    cli.add_argument("--limit", type=int, default=80, help="prompts of each group")
    cli.add_argument("--choosing", action="store_true", help="ask the sources that settings are chosen by")
    cli.add_argument("--rows", default=MIXED, choices=list(ALIGNMENT), help="which alignment rows")
    cli.add_argument("--task", type=Path, help="another task: NAME for NAME_train.jsonl and NAME_test.jsonl")
    cli.add_argument("--second-judge", action="store_true", help="let the wording of labelled replies judge too")
    cli.add_argument("--parts", action="store_true", help="keep ΔW_A of guarded runs, and tell its cosine over seeds")
    cli.add_argument("--method", default="lora", choices=["lora", "full"], help="what trains")
    cli.add_argument("--steps", type=int, default=TRAINING["max_steps"])
    cli.add_argument("--batch", type=int, default=TRAINING["per_device_train_batch_size"], help="task rows a step")
    cli.add_argument("--learning-rate", type=float, default=TRAINING["learning_rate"])
    cli.add_argument("--out", type=Path, help="summary as JSON, of this schedule; runs that it holds already stay")
    cli.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run what the folder's ledger does not hold yet, and sum up the runs of this schedule.

    Args:
        args: the command's, ``words`` as they were typed among them.

    Raises:
        FileNotFoundError, ValueError: bad data or options, or another file for ``--out``, named before the first run.
    """
    lacking = set() if args.unaligned else {name for name in METHODS if needs_unaligned(name)}
    if args.methods is None:
        args.methods = [name for name in METHODS if name not in lacking]
    if named := sorted(lacking & set(args.methods)):
        raise ValueError(f"{', '.join(named)} needs --unaligned, a folder with the model before its alignment")
    made: dict[str, Any] = files(args.model, args.data, args.folder, args.choosing, args.limit, args.rows, args.task)
    bench = Bench(
        model=str(args.model), **made, training=dict(TRAINING), lora=dict(LORA) if args.method == "lora" else {},
        tokens=TOKENS, method=args.method, adapters=str(args.folder / "adapters"),
        replies=str(Path(args.data) / LABELLED) if args.second_judge else None,
        parts=str(args.folder / "parts") if args.parts else None,
    )  # fmt: skip
    changed = {
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "learning_rate": args.learning_rate,
    }
    changed = {name: value for name, value in changed.items() if value != TRAINING[name]}
    jobs = [job_of(name, seed, changed, args.unaligned) for seed in args.seeds for name in args.methods]
    parts = ["runs", Path(made["prompts"]).stem]  # a ledger of its own for what changes all runs of it
    parts += [args.rows] * (args.rows != MIXED) + [args.method] * (args.method != "lora")
    parts += [args.task.name] if args.task else []
    parts += ["judged"] * args.second_judge
    ledger = Ledger(args.folder / f"{'-'.join(parts)}.jsonl", bench.describe())
    head = {
        "versions": versions(),
        "training": TRAINING,
        "lora": bench.lora or None,
        "alignment": ALIGNMENT[args.rows],
        "tokens": TOKENS,
        "limit": args.limit,
    }
    if args.task:
        head["task"] = args.task.name
    if args.out is not None:
        earlier(args.out, head)  # refused before anything runs
    run_jobs(jobs, _Work(bench), ledger, progress=True)
    found = [row for row in ledger.rows if row["job"]["name"] == BASE or row["job"].get("training", {}) == changed]
    told = summary(found, made["prompts"])  # of earlier calls too
    for row in told:
        unsafe = {group: f"{100 * share['value']:.0f}" for group, share in row["sources"].items()}
        print(f"{row['name']:<22} seed {row['seed']}  refused {unsafe}  task loss {row['task_loss']:.3f}")
    if args.out is not None:
        where = {
            str(args.model): "MODEL",
            str(args.unaligned): "UNALIGNED",
            str(args.data): "DATA",
            str(args.folder): "FOLDER",
            str(args.task): f"TASKS/{args.task.name}" if args.task else "",
            str(args.out): "OUT",
        }
        before = earlier(args.out, head)
        runs = joined(before["runs"], told)
        agreement = {**before.get("stability", {}), **stability(found, args.folder / "parts")}
        whole = {
            "command": _command([where.get(word, word) for word in args.words], runs),
            **head,
            "default": default(),
        }
        whole |= {"stability": agreement} if agreement else {}
        write_text(args.out, json.dumps({**whole, "runs": runs}, indent=1))


def _command(words: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> str:
    """The command that makes all runs of a summary: the words of the last call, with every run's method and seed."""
    kept, listing = [], False
    for word in words:
        if word.startswith("--"):
            listing = word in ("--methods", "--seeds")
        if not listing:
            kept.append(word)
    names = dict.fromkeys(run["name"] for run in runs)
    seeds = sorted({run["seed"] for run in runs if run["name"] != BASE}) or [0]
    told = [*kept, "--methods", *names, "--seeds", *map(str, seeds)]
    return shlex.join(["python", "-m", "studies", "real-model", "guards", *told])


class _Work:
    """A job's run on one bench, or the bench's model as it is."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def __call__(self, job: Mapping[str, Any]) -> Mapping[str, Any]:
        return measure_base(self.bench) if job["method"] == BASE else run_job(self.bench, job)
