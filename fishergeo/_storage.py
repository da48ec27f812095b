"""Tensors and a versioned JSON header in one safetensors file, written atomically, read lazily. Never pickle.

The header carries a checksum of itself and, for every tensor, its dtype, shape and checksum, so that a damaged file is
refused by name and never read as something else. Opening a file reads its header only; tensors are memory-mapped and
touched when they are first asked for.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "fishergeo"

VERSION = 2

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

V = TypeVar("V")


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Writes a file whole or not at all: a temporary sibling is filled, synced and renamed.

    Args:
        path: the file.
        tensors: name -> tensor, any device.
        header: JSON-able.
        aliases: further names -> the name in ``tensors`` whose tensor they share.

    Raises:
        ValueError: for a dtype that the format does not hold.
    """
    target = Path(path)
    stored = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    for key, tensor in stored.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {key!r} is {tensor.dtype}; files hold {', '.join(map(str, _NAMES))}")
    index = {key: [_NAMES[t.dtype], list(t.shape), _checksum(t)] for key, t in stored.items()}
    text = json.dumps({**header, "aliases": dict(aliases or {}), "tensors": index})
    metadata = {"format": FORMAT, "version": str(VERSION), "header": text, "checksum": str(_checksum_text(text))}
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


class TensorFile:
    """An open file of :func:`write`: its header, and tensors on request.

    The file stays mapped while this object lives, so replacing it on disk does not change what is read.

    Args:
        path: the file.

    Attributes:
        path: as given.
        header: what was passed to :func:`write`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a safetensors file, not one of ours, of another version, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path}")
        self.path = path
        try:
            self._file = safetensors.safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
            present = set(self._file.keys())
        except Exception as error:  # the library raises its own type, OSError and others
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
        self.header = self._parse(metadata)
        self._aliases: dict[str, str] = self.header.pop("aliases")
        self._index: dict[str, list[Any]] = self.header.pop("tensors")
        self._loaded: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        for key, entry in self._index.items():
            if key not in present:
                raise ValueError(f"{path}: tensor {key!r} is missing")
            view = self._file.get_slice(key)
            found = [view.get_dtype(), list(view.get_shape())]
            if found != entry[:2]:
                raise ValueError(f"{path}: tensor {key!r} is {found}, the header says {entry[:2]}")

    def _parse(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        path = self.path
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: a safetensors file, but not one of {FORMAT}'s")
        try:
            version = int(metadata["version"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: damaged header (no version: {error})") from error
        if version > VERSION:
            raise ValueError(f"{path}: written in format {version}; this {FORMAT} reads {VERSION}, please upgrade")
        if version < VERSION:
            raise ValueError(f"{path}: written in format {version}, which had no checksums; please estimate it again")
        text = metadata.get("header", "")
        if metadata.get("checksum") != str(_checksum_text(text)):
            raise ValueError(f"{path}: damaged header (its checksum does not fit)")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: damaged header ({error})") from error
        if not isinstance(header, dict):
            raise ValueError(f"{path}: damaged header (a {type(header).__name__} where a mapping belongs)")
        aliases, index = header.get("aliases"), header.get("tensors")
        if not (isinstance(aliases, dict) and isinstance(index, dict) and all(map(_is_entry, index.values()))):
            raise ValueError(f"{path}: damaged header (it has no index of its tensors)")
        if not all(isinstance(key, str) and key in index for key in aliases.values()):
            raise ValueError(f"{path}: damaged header (an alias of a tensor that it does not have)")
        return header

    def stored_as(self, key: str) -> str:
        """The name that a tensor is stored under: ``key`` itself, or the name whose tensor it shares."""
        return self._aliases.get(key, key)

    def blank(self, key: str) -> Tensor:
        """A tensor of the right shape and dtype on the meta device; nothing is read.

        Raises:
            ValueError: if there is no such tensor.
        """
        dtype, shape, _ = self._entry(key)
        return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")

    def tensor(self, key: str, device: str | torch.device = "cpu") -> Tensor:
        """The tensor; names that shared one when they were written share one again.

        Raises:
            ValueError: if there is no such tensor, or its bytes are not those that were written.
        """
        _, _, checksum = self._entry(key)
        true_key = self.stored_as(key)
        tensor = self._loaded.get(true_key)
        if tensor is None:
            try:
                tensor = self._file.get_tensor(true_key)
            except Exception as error:
                raise ValueError(f"{self.path}: tensor {true_key!r} is unreadable ({error})") from error
            if _checksum(tensor) != checksum:
                raise ValueError(f"{self.path}: tensor {true_key!r} is damaged (its checksum does not fit)")
            tensor = tensor.to(device)
            self._loaded[true_key] = tensor
        return tensor

    def _entry(self, key: str) -> list[Any]:
        true_key = self.stored_as(key)
        if true_key not in self._index:
            raise ValueError(f"{self.path}: tensor {true_key!r} is missing")
        return self._index[true_key]


class LazyMapping(Mapping[str, V]):
    """Keys known, values built when first asked for and then kept.

    Args:
        keys: in order.
        build: key -> value.
    """

    def __init__(self, keys: Iterable[str], build: Callable[[str], V]) -> None:
        self._built: dict[str, V] = {}
        self._keys = dict.fromkeys(keys)
        self._build = build

    def __getitem__(self, key: str) -> V:
        if key not in self._built:
            if key not in self._keys:
                raise KeyError(key)
            self._built[key] = self._build(key)
        return self._built[key]

    def __contains__(self, key: object) -> bool:
        return key in self._keys  # the inherited test would build the value

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __reduce__(self) -> tuple[type[dict[str, V]], tuple[dict[str, V]]]:
        return dict, (dict(self),)  # an open file does not travel: copies hold everything


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and entry[0] in _NAMES.values()
        and isinstance(entry[1], list)
        and all(type(size) is int and size >= 0 for size in entry[1])
    )


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _checksum_text(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))
