"""Tensors and a versioned JSON header in one safetensors file, written atomically. Never pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "fishergeo"
VERSION = 1


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all: a temporary sibling is filled, synced and renamed.

    Tensors that are the same object are stored once.

    Args:
        path: the file.
        tensors: name -> tensor, any device.
        header: JSON-able.
    """
    target = Path(path)
    unique: dict[int, str] = {}
    aliases: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        first = unique.setdefault(id(tensor), key)
        if first == key:
            stored[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        else:
            aliases[key] = first
    metadata = {"format": FORMAT, "version": str(VERSION), "header": json.dumps({**header, "aliases": aliases})}
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    try:
        save_file(stored, temporary, metadata=metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header alone; no tensor is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a safetensors file, not one of ours, of a later version, or its header is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file, but not one of {FORMAT}'s")
    try:
        version = int(metadata["version"])
        header = json.loads(metadata["header"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged header ({error})") from error
    if version > VERSION:
        raise ValueError(f"{path}: written in format {version}; this {FORMAT} reads up to {VERSION}, please upgrade")
    if not isinstance(header, dict) or not isinstance(header.get("aliases"), dict):
        raise ValueError(f"{path}: damaged header (not a mapping with aliases)")
    return header


def read_tensors(
    path: str | os.PathLike[str], keys: Iterable[str], header: Mapping[str, Any], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Chosen tensors only; aliases come back as one object.

    Raises:
        ValueError: if a tensor is missing or unreadable.
    """
    aliases: dict[str, str] = header["aliases"]
    loaded: dict[str, Tensor] = {}
    result: dict[str, Tensor] = {}
    with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
        for key in keys:
            true_key = aliases.get(key, key)
            if true_key not in loaded:
                try:
                    loaded[true_key] = file.get_tensor(true_key)
                except Exception as error:
                    raise ValueError(f"{path}: tensor {true_key!r} is missing or unreadable ({error})") from error
            result[key] = loaded[true_key]
    return result
