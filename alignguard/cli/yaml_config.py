"""Values of a command's options, typed or from a YAML file, and the files that they name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


# An option without a value, with its negation, so that the command line wins over a file that sets it.
SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": False}


@dataclass(frozen=True)
class OrNone:
    """A value of ``kind``, or None where ``none`` is typed.

    Attributes:
        kind: what reads any other word.
    """

    kind: Callable[[str], Any]

    def __call__(self, text: Any) -> Any:
        """The value of a word."""
        return None if isinstance(text, str) and text.strip().lower() == "none" else self.kind(text)

    def __repr__(self) -> str:  # argparse shows it where a word is no value
        return f"{getattr(self.kind, '__name__', self.kind)} or none"


def unclaimed(option: str, path: Path | None, overwrite: bool) -> None:
    """Refuse a file that cannot be written, or that stands there already; nothing is touched.

    Raises:
        FileExistsError: it is there and ``overwrite`` is false, or a folder is.
        FileNotFoundError: its folder is not there.
    """
    if path is None:
        return
    if path.is_dir():
        raise FileExistsError(f"{option} {path} exists and is a folder; name a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{option} {path} exists; choose another or allow overwriting (--overwrite)")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: no such folder: {path.parent}")


class _Once(yaml.SafeLoader):
    """Refuses a key that stands in a mapping twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def apply_yaml(parser: argparse.ArgumentParser, path: Path, left_out: Sequence[str] = ()) -> None:
    """Make the values of a YAML file the defaults of a command.

    Args:
        parser: the command's.
        path: the file.
        left_out: options whose values are checked and left as they are.

    Raises:
        FileNotFoundError, ValueError: no such file, not a mapping, an option that is unknown or stands there twice, or a
            value of another kind; each is named.
    """
    try:
        text = read_text(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--config: {error}") from error
    try:
        values = yaml.load(text, Loader=_Once)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError) as error:
        raise ValueError(f"--config {path}: not valid YAML ({' '.join(str(error).split())[:300]})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected options and values, found {type(values).__name__}")
    spelled = [str(key).replace("-", "_") for key in values]
    if twice := sorted({name for name in spelled if spelled.count(name) > 1}):
        raise ValueError(f"--config {path}: {twice} stand there twice, with _ and with -")
    values = dict(zip(spelled, values.values(), strict=True))
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    if unknown := sorted(set(values) - set(actions)):
        raise ValueError(f"--config {path}: unknown options {unknown}")
    read = {key: _value(actions[key], value, f"--config {path}: {key}") for key, value in values.items()}
    parser.set_defaults(**{key: value for key, value in read.items() if key not in left_out})


def _value(action: argparse.Action, value: Any, where: str) -> Any:
    """A YAML value as the command line would have read it."""
    if value is None:
        if isinstance(action.type, OrNone) or action.default is None:
            return None
        raise ValueError(f"{where} cannot be null; give a value, or leave the line out")
    if action.nargs in ("*", "+"):
        if not isinstance(value, list) or (action.nargs == "+" and not value):
            raise ValueError(f"{where} must be a list{'' if action.nargs == '*' else ' of something'}, not {value!r}")
        return [_value_of(action, item, where) for item in value]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, not {value!r}")
        return value
    return _value_of(action, value, where)


def _value_of(action: argparse.Action, value: Any, where: str) -> Any:
    kind = action.type.kind if isinstance(action.type, OrNone) else action.type
    if isinstance(value, (dict, list, bool)) or value is None:  # of words, YAML reads yes, no, on and off as bool
        raise ValueError(f"{where} cannot be {value!r}")
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{where} must be a whole number, not {value!r}")
    try:
        read = action.type(value) if callable(action.type) else str(value)
    except (TypeError, ValueError, OverflowError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{where} cannot be {value!r}") from error
    if action.choices is not None and read not in action.choices:
        raise ValueError(f"{where} must be one of {sorted(action.choices)}, not {value!r}")
    return read
