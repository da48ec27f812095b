"""Options of a command from a YAML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from alignguard.data import read_text


def place(text: str) -> Path:
    """A path as options and files give it, with ``~`` read here, since a shell reads it only where a word begins."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def apply_yaml(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make the values of a YAML file the defaults of a command.

    Raises:
        FileNotFoundError, ValueError: no such file, not a mapping, an unknown option, or a value of another kind; each
            is named.
    """
    try:
        text = read_text(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--config: {error}") from error
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError) as error:
        raise ValueError(f"--config {path}: not valid YAML ({' '.join(str(error).split())[:300]})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected options and values, found {type(values).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    if unknown := sorted(set(values) - set(actions)):
        raise ValueError(f"--config {path}: unknown options {unknown}")
    parser.set_defaults(
        **{key: _value(actions[key], value, f"--config {path}: {key}") for key, value in values.items()}
    )


def _value(action: argparse.Action, value: Any, where: str) -> Any:
    """A YAML value as the command line would have read it."""
    if value is None:
        return action.default
    if action.nargs in ("*", "+"):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {value!r}")
        return [_value_of(action, item, where) for item in value]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, not {value!r}")
        return value
    return _value_of(action, value, where)


def _value_of(action: argparse.Action, value: Any, where: str) -> Any:
    kind = action.type
    if isinstance(value, (dict, list)) or (isinstance(value, bool) and kind in (int, float)):
        raise ValueError(f"{where} cannot be {value!r}")
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{where} must be a whole number, not {value!r}")
    try:
        read = kind(value) if callable(kind) else str(value)
    except (TypeError, ValueError, OverflowError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{where} cannot be {value!r}") from error
    if action.choices is not None and read not in action.choices:
        raise ValueError(f"{where} must be one of {sorted(action.choices)}, not {value!r}")
    return read
