"""The command line."""

from alignguard.cli.commands import main, run_command

__all__ = ["main", "run_command"]
