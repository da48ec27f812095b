"""The command line."""

from alignguard.cli.main import main

__all__ = ["main"]
