"""``alignguard init`` and ``completion``: a run's file written for a model and data at hand, and words for the shell."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from alignguard.cli.yaml_config import place, unclaimed

LONGEST = 2048  # most tokens of a task example that a written file asks for
STEP = 64  # of which what it asks for is a multiple
SHELLS = ("bash", "zsh", "fish")


def add_start(commands: Any) -> dict[str, argparse.ArgumentParser]:
    """Add the two commands' options; the parsed arguments carry ``run``, and what ``completion`` writes needs ``parsers`` too."""
    init: argparse.ArgumentParser = commands.add_parser("init", help="write a commented run file for a model and data")
    init.add_argument("--model", required=True, help="folder, GGUF file or hub name")
    init.add_argument("--task-data", required=True, help="file, folder or hub name of what to learn")
    init.add_argument("--alignment-data", default=None, help="what to keep; packaged prompts if left out")
    init.add_argument("--tokenizer", default=None, help="folder or hub name, in place of the model's own")
    init.add_argument("--trust-remote-code", action="store_true", help="run Python that comes with the model")
    init.add_argument("--output", type=place, default="run.yaml", help="the file (default: run.yaml)")
    init.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    init.set_defaults(run=run_init)
    completion: argparse.ArgumentParser = commands.add_parser("completion", help="print a shell's completion script")
    completion.add_argument("shell", choices=SHELLS, help="whose words it writes")
    completion.set_defaults(run=run_completion)
    return {"init": init, "completion": completion}


def run_init(args: argparse.Namespace) -> None:
    """Read the data as a run would, without the weights, and write what suits them."""
    from alignguard.data import encode_source
    from alignguard.files import write_text
    from alignguard.guard import GuardConfig
    from alignguard.loading import kind_of, load_tokenizer, positions_of
    from alignguard.training import DEFAULT_TRAINING
    from alignguard.training.preparation.prepared import alignment_rows

    unclaimed("--output", args.output, args.overwrite)
    kind = kind_of(args.model, args.trust_remote_code)
    tokenizer = load_tokenizer(args.model, args.tokenizer, args.trust_remote_code)
    rows = encode_source(args.task_data, "--task-data", tokenizer, kind, sys.maxsize)
    alignment_rows(args.alignment_data, tokenizer, kind, GuardConfig().max_length)
    # an encoder-decoder's prompt and response are limited alike, each by itself
    lengths = sorted(max(len(row["input_ids"]), len(row["labels"]) if kind == "seq2seq" else 0) for row in rows)
    most = lengths[math.ceil(0.99 * len(lengths)) - 1]
    room = positions_of(args.model, args.trust_remote_code) or LONGEST
    bound = min(LONGEST, room // STEP * STEP or room)
    length = min(bound, max(STEP, STEP * math.ceil(most / STEP)))
    batch = min(int(DEFAULT_TRAINING["per_device_train_batch_size"]), len(rows))
    steps = math.ceil(len(rows) / batch)
    longer = sum(found > length for found in lengths)
    told = (
        "no row is longer"
        if not longer
        else f"{longer} of {len(rows)} rows {'is' if longer == 1 else 'are'} longer and cut"
    )
    text = _run_file(args, len(rows), lengths[-1], length, told, batch, steps)
    write_text(args.output, text)
    print(f"written to {args.output}: {len(rows)} task rows, {steps} optimizer steps")
    if longer:
        print(f"task_max_length {length}: {told}")
    print(f"look at the plan:  alignguard fit --config {args.output} --dry-run")
    print(f"then train:        alignguard fit --config {args.output}")


def _run_file(args: argparse.Namespace, rows: int, longest: int, length: int, told: str, batch: int, steps: int) -> str:
    def quoted(value: str) -> str:
        return json.dumps(str(value), ensure_ascii=False)

    tokenizer = "" if args.tokenizer is None else f"tokenizer: {quoted(args.tokenizer)}\n"
    remote = "trust_remote_code: true\n" if args.trust_remote_code else ""
    if args.alignment_data is None:
        kept = (
            "# What to keep: rows of prompt and response, or prompts alone, which the model answers before training.\n"
            "# Left out, it answers packaged prompts, and its own refusals and answers are kept.\n"
            "# alignment_data: keep.jsonl\n"
        )
    else:
        kept = f"# What to keep. Prompts alone are answered by the model itself before training.\nalignment_data: {quoted(args.alignment_data)}\n"
    return (
        f"# alignguard fit --config {args.output.name}\n\n"
        f"model: {quoted(args.model)}\n{tokenizer}{remote}"
        f"# {rows} rows, the longest of {longest} tokens.\n"
        f"task_data: {quoted(args.task_data)}\n"
        f"{kept}"
        "output_dir: runs/fit\n\n"
        f"# Tokens of a task example that are read; {told}.\n"
        f"task_max_length: {length}\n"
        f"# {steps} optimizer steps an epoch at this batch size.\n"
        f"per_device_train_batch_size: {batch}\n"
        "gradient_accumulation_steps: 1\n"
        "num_train_epochs: 1\n"
        "learning_rate: 1.0e-3\n"
        f"save_every: {max(1, min(100, steps // 2))}  # a killed run goes on with --resume\n\n"
        "# LoRA on every Linear.\n"
        "rank: 8\n"
        "lora_alpha: 16\n\n"
        "# The guard. The price of KL to the model before training; kl_climb bounds what it may cost the task.\n"
        "lambda_kl: 4.0\n"
        "# Or allow so many nats of drift a response, and the price is found:\n"
        "# max_drift: 0.5\n\n"
        "seed: 0\n"
    )


def run_completion(args: argparse.Namespace) -> None:
    """Print the script; a shell reads it from its own start file."""
    print(completion_script(args.shell, args.parsers))


def completion_script(shell: str, commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """A script that completes commands, options and choices.

    Args:
        shell: ``"bash"``, ``"zsh"`` or ``"fish"``.
        commands: parsers by name.
    """
    options = {
        name: [(option, action) for action in parser._actions for option in action.option_strings if option[:2] == "--"]
        for name, parser in commands.items()
    }
    if shell == "fish":
        lines = [f"complete -c alignguard -f -n __fish_use_subcommand -a '{' '.join(commands)}'"]
        for name, known in options.items():
            for option, action in known:
                words = f" -x -a '{' '.join(map(str, action.choices))}'" if action.choices else ""
                lines.append(f"complete -c alignguard -n '__fish_seen_subcommand_from {name}' -l {option[2:]}{words}")
        return "\n".join(lines)
    cases = []
    for name, known in options.items():
        chosen = [
            f"    {name}:{option}) COMPREPLY=($(compgen -W '{' '.join(map(str, action.choices))}' -- \"$word\")); return;;"
            for option, action in known
            if action.choices
        ]
        cases += chosen
    words = "\n".join(
        f"    {name}) words='{' '.join(option for option, _ in known)}';;" for name, known in options.items()
    )
    script = (
        "_alignguard() {\n"
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}" words\n'
        f'  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W \'{" ".join(commands)}\' -- "$word")); return; fi\n'
        '  case "$command:$before" in\n' + "\n".join(cases) + "\n  esac\n"
        '  case "$command" in\n' + words + "\n  esac\n"
        '  if [[ "$word" == -* ]]; then COMPREPLY=($(compgen -W "$words" -- "$word"))\n'
        '  else COMPREPLY=($(compgen -f -- "$word")); fi\n'
        "}\ncomplete -F _alignguard alignguard"
    )
    return f"autoload -Uz bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script
