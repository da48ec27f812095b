"""``alignguard driftcheck``, ``prompts`` and ``compare``: measure a chat model, build prompt sets, show what was found."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from alignguard.cli.yaml_config import SWITCH, place, unclaimed
from alignguard.drift import JUDGES


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Options that say how a model is read."""
    parser.add_argument("--tokenizer", default=None, help="folder or hub name, in place of the model's own")
    parser.add_argument(
        "--trust-remote-code",
        **SWITCH,
        help="run Python that comes with the model",
    )


def add_drift(commands: Any) -> dict[str, argparse.ArgumentParser]:
    """Add the three commands' options; the parsed arguments carry ``run``."""
    drift: argparse.ArgumentParser = commands.add_parser(
        "driftcheck", help="measure refusals, over-refusal, capability and coherence of a chat model"
    )
    drift.add_argument("--model", required=True, help="folder, GGUF file or hub name; a server's name of it")
    add_loading(drift)
    drift.add_argument(
        "--endpoint", default=None, help="ask a server of OpenAI's chat completions, such as vLLM's, here"
    )
    drift.add_argument(
        "--key-variable", default=None, help="environment variable with its key (default: OPENAI_API_KEY)"
    )
    drift.add_argument("--workers", type=int, default=None, help="requests under way at once (default: 4)")
    drift.add_argument("--requests-per-minute", type=float, default=None, help="most requests begun in a minute")
    drift.add_argument("--adapter", type=place, default=None, help="a peft adapter on top of it")
    drift.add_argument("--base", default=None, help="the model before fine-tuning, for --alignment-data, --likelihoods")
    drift.add_argument(
        "--prompts",
        default=None,
        help="file, folder or hub name with prompt and category; the packaged set if left out",
    )
    drift.add_argument("--category", default=None, help="category of prompts that name none")
    drift.add_argument("--split", default=None, help="split of a hub name or folder with several")
    drift.add_argument("--system", default=None, help="a system prompt before every prompt and row (default: none)")
    drift.add_argument("--limit", type=int, default=None, help="only so many prompts of each category, evenly spaced")
    drift.add_argument("--alignment-data", default=None, help="prompts and responses on which KL from the base is read")
    drift.add_argument("--task-data", default=None, help="held-out task rows: teacher-forced accuracy and loss")
    drift.add_argument("--likelihoods", action="store_true", help="margins of refusing, and answers under the base")
    drift.add_argument("--judge", choices=JUDGES, default="rules", help="who gives verdicts")
    drift.add_argument("--judge-model", default=None, help="folder or hub name of the classifier or chat model")
    drift.add_argument(
        "--judge-form", type=place, default=None, help="the words of a published judge's model card, in a file"
    )
    drift.add_argument("--judge-labels", nargs="+", default=None, help="labels of the classifier that mean a refusal")
    drift.add_argument("--before", type=place, default=None, help="an earlier report to compare with")
    drift.add_argument("--output", type=place, default=None, help="the report as JSON; interrupted runs go on from it")
    drift.add_argument("--html", type=place, default=None, help="the report as a page")
    drift.add_argument("--overwrite", action="store_true", help="replace files that are there")
    drift.add_argument("--batch-size", type=int, default=None, help="prompts answered together (default: 32)")
    drift.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: 32)")
    drift.add_argument("--capability-tokens", type=int, default=128, help="longest answer to a capability prompt")
    drift.set_defaults(run=run_driftcheck)

    prompts: argparse.ArgumentParser = commands.add_parser("prompts", help="build a prompt set from public sources")
    prompts.add_argument(
        "--recipe", choices=["paper", "capability"], default="paper", help="which set (default: paper)"
    )
    prompts.add_argument("--output", type=place, required=True, help="JSONL file to write")
    prompts.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    prompts.add_argument(
        "--source", nargs="+", default=[], metavar="NAME=FILE", help="read a source from a local file, not the hub"
    )
    prompts.add_argument("--safe", type=int, default=None, help="of the paper's recipe (default: 5000)")
    prompts.add_argument("--unsafe", type=int, default=None, help="of the paper's recipe (default: 5000)")
    prompts.add_argument("--capability", type=int, default=None, help="of the capability recipe (default: 200)")
    prompts.add_argument("--seed", type=int, default=0, help="of what is drawn from the sources (default: 0)")
    prompts.set_defaults(run=run_prompts)

    compare: argparse.ArgumentParser = commands.add_parser(
        "compare", help="compare saved DriftCheck reports prompt by prompt, any number of them, or show one"
    )
    compare.add_argument("before", type=place, help="a JSON report")
    compare.add_argument("after", type=place, nargs="*", default=[], help="others, on the same prompts")
    compare.add_argument("--html", type=place, default=None, help="write a page")
    compare.add_argument("--overwrite", action="store_true", help="replace the page if it is there")
    compare.set_defaults(run=run_compare)
    return {"driftcheck": drift, "prompts": prompts, "compare": compare}


OF_WEIGHTS = (
    "adapter", "base", "alignment_data", "task_data", "likelihoods", "tokenizer", "trust_remote_code", "batch_size",
)  # fmt: skip

OF_ENDPOINT = {"key_variable": "key_variable", "workers": "workers", "requests_per_minute": "per_minute"}


def _endpoint(args: argparse.Namespace) -> Any:
    """The server that is asked; None where the model is read here.

    Raises:
        ValueError: options of the one that make no sense with the other.
    """
    from alignguard.drift import Endpoint

    given = {name: getattr(args, name) for name in OF_ENDPOINT if getattr(args, name) is not None}
    if args.endpoint is None:
        if given:
            raise ValueError(f"--{next(iter(given)).replace('_', '-')} is of --endpoint, which is missing")
        return None
    for name in OF_WEIGHTS:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} needs the model's weights; leave it out with --endpoint")
    return Endpoint(args.endpoint, args.model, **{OF_ENDPOINT[name]: value for name, value in given.items()})


def run_driftcheck(args: argparse.Namespace) -> None:
    """Ask, judge, print and write; bad options are named before a model is loaded.

    With ``--output r.json`` every answer is put by in ``r.json.answers.jsonl`` as it comes; a run that was cut off goes
    on from there, and the file goes when the report is whole.
    """
    from alignguard.data import DataSource, read_text
    from alignguard.drift import DriftReport, driftcheck, driftcheck_endpoint, load_prompts, make_judge
    from alignguard.drift.report import check_same_prompts, check_same_settings
    from alignguard.loading import load_adapter, load_model, load_weights
    from alignguard.pages import compare_text, write_drift

    unclaimed("--output", args.output, args.overwrite)
    unclaimed("--html", args.html, args.overwrite)
    answers = args.output.with_name(f"{args.output.name}.answers.jsonl") if args.output is not None else None
    for taken, what in ((args.output, "the report"), (answers, "its answers while it is made")):
        if taken is not None and args.html is not None and taken.resolve() == args.html.resolve():
            raise ValueError(f"--html {args.html}: --output puts {what} there; name another file")
    endpoint = _endpoint(args)
    if args.base is not None and args.alignment_data is None and not args.likelihoods:
        raise ValueError(f"--base {args.base}: of --alignment-data and --likelihoods, and neither is given")
    if args.adapter is not None and not (args.adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"--adapter: no adapter_config.json in {args.adapter}")  # before the model is read
    before = DriftReport.load(args.before) if args.before is not None else None
    for option in ("category", "split"):
        if args.prompts is None and getattr(args, option) is not None:
            raise ValueError(f"--{option} is of --prompts, which is missing")
    asked = None if args.prompts is None else DataSource(args.prompts, split=args.split)
    rows = load_prompts(asked, category=args.category)
    form = None if args.judge_form is None else read_text(args.judge_form)
    if before is not None:  # the judge's name is known with its model, and the comparison tells of another
        named = [(row["id"], row["prompt"], row["category"]) for row in load_prompts(rows, args.limit)]
        settings = {"max_new_tokens": args.max_new_tokens, "capability_tokens": args.capability_tokens}
        try:
            check_same_prompts([(row.id, row.prompt, row.category) for row in before.rows], named)
            check_same_settings({**before.settings, "judge": None}, {**settings, "system": args.system})
        except ValueError as error:
            raise ValueError(f"--before {args.before} is of other prompts or another system prompt: {error}") from error
    judge = make_judge(args.judge, args.judge_model, args.judge_labels, form)
    asking: dict[str, Any] = {
        "judge": judge,
        "system": args.system,
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "capability_tokens": args.capability_tokens,
        "progress": True,
        "resume": answers,
        "overwrite": args.overwrite,
    }
    if args.batch_size is not None:
        asking["batch_size"] = args.batch_size
    if endpoint is not None:
        report = driftcheck_endpoint(endpoint, rows, **asking)
    else:
        model, tokenizer = load_model(args.model, args.tokenizer, args.trust_remote_code)
        if args.adapter is not None:
            model = load_adapter(model, args.adapter)
        base = load_weights(args.base, args.trust_remote_code).eval() if args.base is not None else None
        report = driftcheck(
            model.eval(),
            tokenizer,
            rows,
            base=base,
            alignment=args.alignment_data,
            task=args.task_data,
            likelihoods=args.likelihoods,
            **asking,
        )
    told = {
        "prompts": args.prompts or "packaged",
        **({"adapter": str(args.adapter)} if args.adapter is not None else {}),
    }
    report = dataclasses.replace(report, settings={**report.settings, **told})
    print(report.table())
    start = before or (report if args.adapter is None else None)
    if start is not None and (caution := start.caution()):
        print(f"warning: {caution}", file=sys.stderr)
    if args.output is not None:
        report.save(args.output)
    if answers is not None:
        answers.unlink()
    if before is not None:
        print(compare_text(before, report))
    if args.html is not None:
        if before is None:
            write_drift(args.html, report)
        else:
            write_drift(args.html, before, report)


RECIPE_SIZES = {"paper": ("safe", "unsafe"), "capability": ("capability",)}


def run_prompts(args: argparse.Namespace) -> None:
    """Build a prompt set and say what is in it."""
    from alignguard.drift import build_prompts
    from alignguard.tables import text_table

    unclaimed("--output", args.output, args.overwrite)
    for recipe, names in RECIPE_SIZES.items():
        for name in names:
            if recipe != args.recipe and getattr(args, name) is not None:
                raise ValueError(f"--{name} is of --recipe {recipe}, not of {args.recipe}; leave it out")
    sizes = {name: size for name in RECIPE_SIZES[args.recipe] if (size := getattr(args, name)) is not None}
    local: dict[str, str] = {}
    for text in args.source:
        name, sign, path = text.partition("=")
        if not sign or not path:
            raise ValueError(f"--source {text!r}: expected NAME=FILE")
        local[name] = path
    counts = build_prompts(
        args.recipe,
        args.output,
        local=local,
        seed=args.seed,
        **sizes,
    )
    rows = [(name, str(count)) for name, count in counts.items()]
    print(text_table({"source": "left", "prompts": "right"}, rows, header=False))


def run_compare(args: argparse.Namespace) -> None:
    """Print the paired comparison of reports, or what one holds, and write the page."""
    from alignguard.drift import DriftReport
    from alignguard.pages import compare_text, side_by_side, write_drift

    unclaimed("--html", args.html, args.overwrite)
    before = DriftReport.load(args.before)
    if len(args.after) > 1:
        if args.html is not None:
            raise ValueError("--html shows one report or two; leave it out for more")
        others = {str(path): DriftReport.load(path) for path in args.after}
        print(side_by_side({str(args.before): before, **others}))
        return
    after = DriftReport.load(args.after[0]) if args.after else None
    print((after or before).table())
    if caution := before.caution():
        print(f"warning: {caution}", file=sys.stderr)
    if after is not None:
        print(compare_text(before, after))
        if {row.id: row.text for row in before.rows} == {row.id: row.text for row in after.rows}:
            kappa = before.kappa(after)
            told = "not defined, both gave one verdict throughout" if kappa is None else f"{kappa:.3f}"
            print(f"Cohen's κ of the two reports' judges: {told}")
    if args.html is not None:
        labels = (args.before.stem, "") if after is None else told_apart(args.before, args.after[0])
        write_drift(args.html, before, after, labels=labels)


def told_apart(before: Path, after: Path) -> tuple[str, str]:
    """Names of two files by which people tell them apart: their own, or of the last folders in which the paths part."""
    for ours, theirs in zip(
        before.resolve().with_suffix("").parts[::-1], after.resolve().with_suffix("").parts[::-1], strict=False
    ):
        if ours != theirs:
            return ours, theirs
    return "before", "after"
