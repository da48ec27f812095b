"""The command line: ``alignguard init | fit | driftcheck | compare | prompts | fisher | demo | completion``.

Exit codes: 0 done, 1 the run failed (the loss diverged, the disk is full), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignguard.cli.drift import add_drift, add_loading
from alignguard.cli.start import add_start
from alignguard.cli.yaml_config import SWITCH, OrNone, apply_yaml, place, unclaimed
from alignguard.data import TURNS, DataSource
from alignguard.guard import GuardConfig

TRAINING_FIELDS: dict[str, tuple[type, str]] = {
    "learning_rate": (float, "peak learning rate"),
    "num_train_epochs": (float, "passes over the task data"),
    "max_steps": (int, "optimizer steps; overrides the epochs"),
    "per_device_train_batch_size": (int, "task examples in a micro-batch"),
    "gradient_accumulation_steps": (int, "micro-batches in an optimizer step"),
}

FISHER_FIELDS = ("structure", "kind", "sketch_rank", "batch_size", "max_length")

PRESETS: dict[str, Callable[..., GuardConfig]] = {
    "default": GuardConfig,
    "curvature": GuardConfig.curvature,
    "combined": GuardConfig.combined,
    "paper": GuardConfig.paper,
}

LOOKED_AT = 16  # prompts that the model answers for a dry run

BAD_INPUT = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)


def _add_guard_fields(parser: argparse.ArgumentParser, only: Sequence[str] | None = None) -> None:
    """An option for every field; one that is not given leaves the preset's value as it is."""
    group = parser.add_argument_group(
        "guard",
        'One that says "or none" takes the word none, or null in a file: no bound, or a choice left to the guard.',
    )
    for field in dataclasses.fields(GuardConfig):
        if field.name == "seed" or (only is not None and field.name not in only):
            continue
        optional = str(field.type).endswith(" | None")
        usual = "none" if field.default is None else f"{field.default}, or none" if optional else field.default
        options: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['summary']} (default: {usual})",
        }
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, tuple):
            options["nargs"] = "*"
        else:
            kind = {"int": int, "float": float, "str": str}[str(field.type).removesuffix(" | None")]
            options["type"] = OrNone(kind) if optional else kind
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _guard_config(args: argparse.Namespace, make: Callable[..., GuardConfig]) -> GuardConfig:
    """What the options say, on top of a preset."""
    return make(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(GuardConfig) if field.name in args}
    )


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser and its commands by name."""
    parser = argparse.ArgumentParser(
        prog="alignguard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="fine-tune the embedded aligned model, plain and guarded, and compare")
    demo.add_argument("--output-dir", type=place, default=Path("runs/demo"), help="default: runs/demo")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in the output folder")
    demo.add_argument("--seed", type=int, default=0, help="of everything drawn (default: 0)")
    demo.add_argument("--max-steps", type=int, default=None, help="optimizer steps of each run")

    fit = commands.add_parser("fit", help="fine-tune a model under the guard")
    fit.add_argument("--config", type=place, help="YAML file with any of these options; the command line wins")
    fit.add_argument("--model", help="folder, GGUF file or hub name")
    add_loading(fit)
    fit.add_argument(
        "--task-data", help="file, folder or hub name: prompt and response, messages, Alpaca, ShareGPT, Dolly"
    )
    fit.add_argument(
        "--alignment-data",
        help="the same, with what the model should keep answering; of prompts alone, or packaged ones if left out, its own answers",
    )
    fit.add_argument("--output-dir", type=place, default=Path("runs/fit"), help="default: runs/fit")
    fit.add_argument(
        "--overwrite",
        **SWITCH,
        help="allow an output folder that holds something; what a run left there is removed",
    )
    fit.add_argument(
        "--resume",
        **SWITCH,
        help="go on from the last complete checkpoint of the same run",
    )
    fit.add_argument(
        "--save-every", type=int, default=None, help="optimizer steps between checkpoints; none if left out"
    )
    fit.add_argument("--dry-run", **SWITCH, help="print the plan and touch nothing")
    fit.add_argument(
        "--verbose",
        **SWITCH,
        help="a line for every guarded matrix, not for every kind of layer",
    )
    fit.add_argument("--plain", **SWITCH, help="without the guard")
    fit.add_argument(
        "--preset", choices=PRESETS, default="default",
        help="the guard that its options change: KL to the base (default), the Fisher layer by layer, both, or the method "
        "of arXiv 2508.02079 as printed",
    )  # fmt: skip
    fit.add_argument("--method", choices=("lora", "full"), default="lora", help="LoRA, or every weight")
    fit.add_argument("--offload", default=None, help="device of the reference weights of --method full, such as cpu")
    fit.add_argument("--fisher", type=place, default=None, help="first curvature, a file of `alignguard fisher`")
    fit.add_argument("--seed", type=int, default=0, help="of adapter, data order and guard (default: 0)")
    fit.add_argument("--task-max-length", type=int, default=256, help="longest task example in tokens")
    fit.add_argument("--rank", type=int, default=None, help="LoRA rank (default: 8)")
    fit.add_argument("--lora-alpha", type=float, default=None, help="LoRA's α; ΔW = α/rank·BA (default: 16)")
    fit.add_argument("--target-modules", nargs="+", default=None, help="default: every Linear, and experts")
    for what in ("task", "alignment"):
        add_data_options(fit, what)
    training = fit.add_argument_group("training")
    for name, (kind, words) in TRAINING_FIELDS.items():
        training.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help=words)
    _add_guard_fields(fit)

    fisher = commands.add_parser("fisher", help="estimate the Fisher of alignment data and write it to a file")
    fisher.add_argument("--config", type=place, help="YAML file with any of these options; the command line wins")
    fisher.add_argument("--model", help="folder, GGUF file or hub name")
    add_loading(fisher)
    fisher.add_argument("--data", help="file, folder or hub name of prompts and responses, as --alignment-data of fit")
    fisher.add_argument("--output", type=place, help="the file, .safetensors; model and data are named in OUTPUT.json")
    fisher.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    fisher.add_argument("--seed", type=int, default=0, help="of sampled labels and sketches (default: 0)")
    add_data_options(fisher)
    _add_guard_fields(fisher, FISHER_FIELDS)

    demo.set_defaults(run=_demo)
    fit.set_defaults(run=_fit)
    fisher.set_defaults(run=_fisher)
    parsers = {"demo": demo, "fit": fit, "fisher": fisher, **add_drift(commands), **add_start(commands)}
    parsers["completion"].set_defaults(parsers=parsers)
    return parser, parsers


def add_data_options(parser: argparse.ArgumentParser, what: str = "") -> None:
    """Options that say how data are read, ``--<what>-split`` and the others of :class:`alignguard.data.DataSource`."""
    prefix = f"--{what}-" if what else "--"
    group = parser.add_argument_group(f"how {what or 'the'} data are read")
    group.add_argument(f"{prefix}split", default=None, help="split of a hub name or folder with several")
    group.add_argument(f"{prefix}subset", default=None, help="configuration of a hub name")
    group.add_argument(
        f"{prefix}fields", nargs="+", default=None, metavar="NAME=COLUMN",
        help="columns under other names, such as prompt=question response=answer",
    )  # fmt: skip
    group.add_argument(
        f"{prefix}turns", choices=TURNS, default="all",
        help="turns of the assistant that are learned from: all without a weight of 0 (default), or the last",
    )  # fmt: skip


def data_source(args: argparse.Namespace, source: str | None, what: str = "") -> DataSource | None:
    """What ``--<what>-data`` names, read as the options of :func:`add_data_options` say."""
    prefix = f"{what}_" if what else ""
    split, subset, given, turns = (getattr(args, f"{prefix}{name}") for name in ("split", "subset", "fields", "turns"))
    fields = {}
    for text in given or ():
        name, sign, column = text.partition("=")
        if not sign or not column:
            raise ValueError(f"--{prefix.replace('_', '-')}fields {text!r}: expected NAME=COLUMN")
        fields[name] = column
    if source is None:
        if fields or split or subset or turns != "all":
            raise ValueError(f"--{prefix.replace('_', '-')}data is missing, and options say how to read it")
        return None
    return DataSource(source, split, subset, fields, turns)


def _required(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if not getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is missing")


GUARD_FIELDS = tuple(field.name for field in dataclasses.fields(GuardConfig) if field.name != "seed")

READING = ("alignment_data", "alignment_split", "alignment_subset", "alignment_fields", "offload", "fisher")

USUAL = {"alignment_turns": "all", "preset": "default"}

OF_GUARD = (*GUARD_FIELDS, *READING, *USUAL)  # options of fit that a run without the guard does not read


def _check_plain(args: argparse.Namespace) -> None:
    """Refuse what is said of the guard to a run without one: beside ``--plain``, or in a file that says so itself.

    Raises:
        ValueError: named one by one.
    """
    of_guard = [name for name in GUARD_FIELDS if name in args]
    of_guard += [name for name in READING if getattr(args, name) is not None]
    of_guard += [name for name, value in USUAL.items() if getattr(args, name) != value]
    if args.plain and of_guard:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in of_guard)
        raise ValueError(f"{named}: of the guard, and --plain trains without it; leave one or the other out")


def _fit(args: argparse.Namespace) -> None:
    from alignguard.training import activation_bytes, fit, plan_text, prepare, seconds_of_step

    _required(args, "model", "task_data")
    _check_plain(args)
    config = _guard_config(args, PRESETS[args.preset])
    targets = args.target_modules
    given = {
        "r": args.rank,
        "lora_alpha": args.lora_alpha,
        "target_modules": targets[0] if targets == ["all-linear"] else targets or None,  # peft's own word is no list
    }
    lora = {name: value for name, value in given.items() if value is not None}
    options: dict[str, Any] = {
        "tokenizer": args.tokenizer,
        "trust_remote_code": args.trust_remote_code,
        "lora": lora,
        "training": {name: getattr(args, name) for name in TRAINING_FIELDS if getattr(args, name) is not None},
        "method": args.method,
        "offload": args.offload,
        "guarded": not args.plain,
        "max_length": args.task_max_length,
        "save_every": args.save_every,
        "fisher": args.fisher,
        "seed": args.seed,
    }
    task = data_source(args, args.task_data, "task")
    kept = data_source(args, args.alignment_data, "alignment")
    assert task is not None  # or it would be missing
    if args.dry_run:
        ready = prepare(args.model, task, kept, config, most_prompts=LOOKED_AT, **options)
        print(plan_text(ready, seconds_of_step(ready), activation_bytes(ready), verbose=args.verbose))
        return
    options |= {"overwrite": args.overwrite, "resume": args.resume, "progress": True, "verbose": args.verbose}
    result = fit(args.model, task, kept, config, args.output_dir, **options)
    print(f"{'adapter' if args.method == 'lora' else 'model'}: {result.adapter_dir}  ({result.step_time:.3f} s a step)")


def _fisher(args: argparse.Namespace) -> None:
    from alignguard.loading import load_model
    from alignguard.training import origin_path, write_fisher

    _required(args, "model", "data", "output")
    config = _guard_config(args, GuardConfig.curvature)
    for path in (args.output, origin_path(args.output)):
        unclaimed("--output", path, args.overwrite)
    data = data_source(args, args.data)
    model, tokenizer = load_model(args.model, args.tokenizer, args.trust_remote_code)
    fisher = write_fisher(
        args.output,
        model,
        tokenizer,
        data,
        config,
        name=args.model,
        progress=sys.stderr.isatty(),
    )
    print(f"{fisher!r}\nwritten to {args.output} and {origin_path(args.output)}")


def _demo(args: argparse.Namespace) -> None:
    from alignguard.demo import run_demo

    run_demo(args.output_dir, overwrite=args.overwrite, seed=args.seed, max_steps=args.max_steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; every failure is one line on standard error and an exit code (see the module)."""
    parser, commands = build_parser()
    return run_command(parser, commands, list(sys.argv[1:] if argv is None else argv))


def run_command(
    parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser], arguments: Sequence[str]
) -> int:
    """Parse and run a command whose parser has set ``run``, and report a failure in one line.

    Args:
        parser: the whole parser; its ``prog`` opens the line.
        commands: its commands by name, for ``--config``.
        arguments: the words after the program's name.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.
    """
    try:
        args = parser.parse_args(arguments)
        if getattr(args, "config", None) is not None:
            # The plain run beside a guarded one is of the same file; what is typed beside --plain is refused.
            apply_yaml(commands[args.command], args.config, OF_GUARD if getattr(args, "plain", False) else ())
            args = parser.parse_args(arguments)
        args.run(args)
    except (*BAD_INPUT, OSError, FloatingPointError) as error:
        tqdm.write(f"{parser.prog} {arguments[0]}: {error}", file=sys.stderr)  # not glued to a progress bar
        return 2 if isinstance(error, BAD_INPUT) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
