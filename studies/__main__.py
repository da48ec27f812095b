"""``python -m studies COMMAND``: each command is a room of its own, whose ``add_arguments`` says what it takes and runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from alignguard.cli import run_command

COMMANDS = {
    "ablate": "studies.ablate",
    "peft-comparison": "studies.peft_comparison.run",
    "real-model fetch": "studies.real_model.fetch",
    "real-model align": "studies.real_model.align",
    "real-model measure": "studies.real_model.measure",
    "real-model guards": "studies.real_model.guards",
}  # words that name a command, and its room


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; every failure is one line on standard error and an exit code, as ``alignguard``'s are.

    Args:
        argv: words after ``python -m studies``; those of the process if None.

    Returns:
        0 done, 1 failed, 2 bad input or words that name no command, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for name, room in COMMANDS.items():
        length = len(name.split())
        if words[:length] == name.split():
            parser = argparse.ArgumentParser(prog="python -m studies")
            commands = parser.add_subparsers(dest="command", required=True)
            own = commands.add_parser(name)
            importlib.import_module(room).add_arguments(own)
            own.set_defaults(words=words[length:])  # for studies that write their command beside their results
            return run_command(parser, {name: own}, [name, *words[length:]])
    asked = words[:1] in (["-h"], ["--help"])
    usage = f"usage: python -m studies COMMAND ...; commands: {', '.join(COMMANDS)}"
    print(usage, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
