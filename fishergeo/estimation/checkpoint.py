"""The state of an unfinished estimate in one file, from which it goes on after an interruption."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishergeo import _storage
from fishergeo._checks import check_integer


class SweepState(NamedTuple):
    """A sweep over the data as a file holds it.

    Attributes:
        facts: JSON-able.
        tensors: name -> tensor.
        aliases: further names -> the name whose tensor they share; of a state that was read, none: ``tensors`` has them.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    aliases: dict[str, str]


class Checkpoint:
    """One safetensors file, replaced whole every so many batches.

    Args:
        path: the file.
        every: batches between two writes, at least 1.
        identity: JSON-able facts that must be the same when the estimate goes on.

    Raises:
        ValueError: if ``every`` is less than 1.
        TypeError: if it is no integer.
    """

    def __init__(self, path: str | os.PathLike[str], every: int, identity: Mapping[str, Any]) -> None:
        check_integer("checkpoint_every", every, low=1)
        self.path = Path(path)
        self.every = every
        self.identity = dict(identity)

    def save(self, sweeps: Sequence[SweepState]) -> None:
        """Writes the states of all sweeps begun so far."""
        tensors = {f"{i}|{key}": tensor for i, state in enumerate(sweeps) for key, tensor in state.tensors.items()}
        aliases = {f"{i}|{key}": f"{i}|{of}" for i, state in enumerate(sweeps) for key, of in state.aliases.items()}
        facts = [state.facts for state in sweeps]
        header = {"unfinished": self.identity, "sweeps": facts, "keys": [*tensors, *aliases]}
        _storage.write(self.path, tensors, header, aliases)

    def load(self, device: torch.device) -> list[SweepState]:
        """The states that were saved; nothing if there is no file.

        Raises:
            ValueError: if the file is damaged, or of another estimate than this one.
        """
        if not self.path.is_file():
            return []
        file = _storage.TensorFile(self.path)
        header = file.header
        try:
            found: dict[str, Any] = header["unfinished"]
            sweeps: list[dict[str, Any]] = header["sweeps"]
            keys: list[str] = header["keys"]
        except KeyError as error:
            raise ValueError(f"{self.path}: not the checkpoint of an estimate (no {error})") from error
        for key, mine in self.identity.items():
            if found.get(key) != mine:
                raise ValueError(
                    f"{self.path}: the checkpoint is of another estimate: {key} is {found.get(key)!r} there and "
                    f"{mine!r} here; delete it to start anew, or name another file"
                )
        states = [SweepState(facts, {}, {}) for facts in sweeps]
        for key in keys:
            stage, _, rest = key.partition("|")
            states[int(stage)].tensors[rest] = file.tensor(key, device)
        return states

    def remove(self) -> None:
        """Deletes the file: the estimate is whole."""
        self.path.unlink(missing_ok=True)
