"""``python -m studies COMMAND``: each command is a room of its own with a function ``main(argv)``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "ablate": "studies.ablate",
    "peft-comparison": "studies.peft_comparison.run",
    "real-model fetch": "studies.real_model.fetch",
    "real-model align": "studies.real_model.align",
    "real-model measure": "studies.real_model.measure",
    "real-model guards": "studies.real_model.guards",
}  # words that name a command, and its room


def main(argv: Sequence[str] | None = None) -> int:
    """Hand a command's words to its room.

    Args:
        argv: words after ``python -m studies``; those of the process if None.

    Returns:
        The command's exit code; 2 where the words name no command, 0 where they ask for help.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for name, room in COMMANDS.items():
        length = len(name.split())
        if words[:length] == name.split():
            return int(importlib.import_module(room).main(words[length:]) or 0)
    asked = words[:1] in (["-h"], ["--help"])
    usage = f"usage: python -m studies COMMAND ...; commands: {', '.join(COMMANDS)}"
    print(usage, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
