"""The command line: ``alignguard demo | fit | driftcheck | prompts | compare | ablate``."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from alignguard.cli_ablate import add_ablate
from alignguard.cli_drift import add_drift
from alignguard.config import GuardConfig

TRAINING_FIELDS: dict[str, tuple[type, str]] = {
    "learning_rate": (float, "peak learning rate"),
    "num_train_epochs": (float, "passes over the task data"),
    "max_steps": (int, "optimizer steps; overrides the epochs"),
    "per_device_train_batch_size": (int, "task examples in a micro-batch"),
    "gradient_accumulation_steps": (int, "micro-batches in an optimizer step"),
}


def _field_help() -> dict[str, str]:
    """Help of every GuardConfig field, from its docstring, the one place where fields are described."""
    text = inspect.cleandoc(GuardConfig.__doc__ or "").split("Attributes:")[1].split("Raises:")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", words).replace("%", "%%").replace("``", "") for name, words in entries}


def _add_guard_fields(parser: argparse.ArgumentParser) -> None:
    described = _field_help()
    group = parser.add_argument_group("guard")
    for field in dataclasses.fields(GuardConfig):
        if field.name == "seed":
            continue
        kind: Any = int if field.name == "max_rank" else type(field.default)
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            help=f"{described[field.name]} (default: {field.default})",
        )


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser and its commands by name."""
    parser = argparse.ArgumentParser(prog="alignguard", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="fine-tune the embedded aligned model, plain and guarded, and compare")
    demo.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in the output folder")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--max-steps", type=int, default=None, help="optimizer steps of each run")

    fit = commands.add_parser("fit", help="fine-tune a causal LM with LoRA under the guard")
    fit.add_argument("--config", type=Path, help="YAML file with any of these options; the command line wins")
    fit.add_argument("--model", help="folder or hub name")
    fit.add_argument("--task-data", help=".jsonl or .csv with prompt and response, or messages")
    fit.add_argument("--alignment-data", help="the same, with what the model should keep answering")
    fit.add_argument("--output-dir", type=Path, default=Path("runs/fit"))
    fit.add_argument("--overwrite", action="store_true", help="allow an output folder that holds something")
    fit.add_argument("--plain", action="store_true", help="plain LoRA, without the guard")
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--rank", type=int, default=8, help="LoRA rank")
    fit.add_argument("--lora-alpha", type=float, default=16)
    fit.add_argument("--target-modules", nargs="+", default=None, help="default: every Linear")
    training = fit.add_argument_group("training")
    for name, (kind, words) in TRAINING_FIELDS.items():
        training.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help=words)
    _add_guard_fields(fit)

    return parser, {"demo": demo, "fit": fit, **add_drift(commands), "ablate": add_ablate(commands)}


def _apply_yaml(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make the values of a YAML file the defaults of a command.

    Raises:
        FileNotFoundError, ValueError: no such file, not a mapping, or an unknown option; each is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config: no such file: {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected options and values, found {type(values).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    actions = {action.dest: action for action in parser._actions}
    if unknown := sorted(set(values) - set(actions)):
        raise ValueError(f"--config {path}: unknown options {unknown}")
    for key, value in values.items():
        kind = actions[key].type
        if callable(kind) and value is not None:
            try:
                values[key] = kind(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"--config {path}: {key} cannot be {value!r}") from error
    parser.set_defaults(**values)


def _fit(args: argparse.Namespace) -> None:
    from alignguard.fit import fit

    for name in ("model", "task_data") + (() if args.plain else ("alignment_data",)):
        if not getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is missing")
    guard = {f.name: getattr(args, f.name) for f in dataclasses.fields(GuardConfig)}
    lora: dict[str, Any] = {"r": args.rank, "lora_alpha": args.lora_alpha}
    if args.target_modules:
        lora["target_modules"] = args.target_modules
    training = {name: getattr(args, name) for name in TRAINING_FIELDS if getattr(args, name) is not None}
    result = fit(
        args.model,
        args.task_data,
        args.alignment_data,
        GuardConfig.from_dict(guard),
        args.output_dir,
        lora=lora,
        training=training,
        guarded=not args.plain,
        overwrite=args.overwrite,
        progress=True,
        seed=args.seed,
    )
    print(f"adapter: {result.adapter_dir}  ({result.step_time:.3f} s a step)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends in one line on standard error and exit code 2, an interrupt in 130."""
    parser, commands = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser.parse_args(arguments)
        if getattr(args, "config", None) is not None:
            _apply_yaml(commands[args.command], args.config)
            args = parser.parse_args(arguments)
        if args.command == "demo":
            from alignguard.demo import run_demo

            run_demo(args.output_dir, overwrite=args.overwrite, seed=args.seed, max_steps=args.max_steps)
        elif args.command == "fit":
            _fit(args)
        else:
            args.run(args)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"alignguard {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
