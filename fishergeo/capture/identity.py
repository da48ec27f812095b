"""What results are kept under: a model's fingerprint and the check against it, marks of functions and tensors, stored headers."""

from __future__ import annotations

import difflib
import enum
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fishergeo.capture.layers import select_layers, selectable

_LATER = {"sharing": str, "basis": str, "weighted": bool}

_TEXTS = ("structure", "kind", "unit", "side", "dtype", "fingerprint")


def fingerprint(model: nn.Module) -> str:
    """A short hash of parameter names, shapes, dtypes and a few of their values.

    Sharded parameters (FSDP2) are gathered one by one, so that the sharded model has the fingerprint of the whole one;
    every process must then call it.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta" and parameter.numel():
            whole = parameter.detach()
            if hasattr(whole, "full_tensor"):
                whole = whole.full_tensor()
            flat = whole.reshape(-1)
            digest.update(flat[:: max(1, flat.numel() // 8)][:8].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def content_mark(value: object) -> str:
    """A short hash of what a value does or holds, so that what was made with another is not taken for what this one makes.

    Functions by their names, code, defaults, what they close over and what they name of their own module; tensors and arrays
    by their bytes; models by their fingerprints and forward; mappings and sequences by their parts. Of other objects the
    class is known, what calling them does, and those attributes that the function that holds them names.
    """
    digest = hashlib.sha256()
    for part in _Contents().of(value, frozenset()):
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def batch_mark(batch: object) -> str:
    """A :func:`content_mark` of all that a batch holds, objects of a user's own and their attributes among it."""
    return content_mark(_spread(batch, frozenset()))


def _spread(value: Any, within: frozenset[int]) -> Any:
    """Mappings and sequences in the place of objects that hold something."""
    if isinstance(value, (*_PLAIN, Tensor, np.ndarray, nn.Module, type, FunctionType)) or id(value) in within:
        return value
    within = within | {id(value)}
    if isinstance(value, Mapping):
        return {key: _spread(part, within) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_spread(part, within) for part in value]
    names = [*getattr(value, "__dict__", {})]
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    held = {name: _spread(getattr(value, name), within) for name in sorted(names) if hasattr(value, name)}
    return [type(value), held] if held else value


_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


class _Contents:
    """What a value is told by, part by part; functions and objects that are met again add their class alone."""

    def __init__(self) -> None:
        self._met: dict[int, object] = {}  # held, lest another object is given the number
        self._sums: dict[int, bytes] = {}

    def of(self, value: Any, names: frozenset[str]) -> Iterator[bytes]:
        """Parts of a value that is held by code in which these names occur."""
        yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
        if isinstance(value, _PLAIN):
            yield repr(value).encode()
        elif isinstance(value, Tensor | np.ndarray):
            yield self._sum(value)
        elif isinstance(value, list | tuple):
            yield from self._each(value, names)
        elif isinstance(value, set | frozenset):
            yield " ".join(sorted(map(repr, value))).encode()
        elif isinstance(value, CodeType):
            yield from self._code(value, names)
        elif id(value) not in self._met:
            self._met[id(value)] = value
            yield from self._new(value, names)

    def _new(self, value: Any, names: frozenset[str]) -> Iterator[bytes]:
        if isinstance(value, Mapping):
            yield from self._each([*value.keys(), *value.values()], names)
            return
        if isinstance(value, FunctionType):
            yield from self._function(value)
            return
        if isinstance(value, MethodType):
            yield from self._each([value.__func__, value.__self__], _names(value.__func__))
            return
        if isinstance(value, functools.partial):
            yield from self._each([value.func, value.args, value.keywords], _names(value.func))
            return
        yield getattr(value, "__qualname__", "").encode()
        if isinstance(value, type | ModuleType):
            return
        call = getattr(type(value), "forward" if isinstance(value, nn.Module) else "__call__", None)
        if isinstance(value, nn.Module):
            yield fingerprint(value).encode()
        if isinstance(call, FunctionType):
            yield from self.of(call, names)
            names = names | _names(call)
        held = getattr(value, "__dict__", {})
        for name in sorted(names.intersection(held) - {"training"}):
            yield name.encode()
            yield from self.of(held[name], names)

    def _function(self, function: FunctionType) -> Iterator[bytes]:
        names = _names(function)
        yield f"{function.__module__}.{function.__qualname__}".encode()
        yield from self.of(function.__code__, names)
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # a name that has no value yet
                cells.append(None)
        yield from self._each([function.__defaults__, function.__kwdefaults__, cells], names)
        for name in sorted(names.intersection(function.__globals__)):
            found = function.__globals__[name]
            # Functions of other modules are libraries', and lead everywhere.
            if not isinstance(found, FunctionType) or found.__module__ == function.__module__:
                yield name.encode()
                yield from self.of(found, names)

    def _code(self, code: CodeType, names: frozenset[str]) -> Iterator[bytes]:
        yield code.co_code
        yield repr((code.co_names, code.co_varnames, code.co_freevars)).encode()
        yield from self._each(code.co_consts, names)

    def _each(self, values: Sequence[Any], names: frozenset[str]) -> Iterator[bytes]:
        yield str(len(values)).encode()
        for value in values:
            yield from self.of(value, names)

    def _sum(self, value: Tensor | np.ndarray[Any, Any]) -> bytes:
        """A checksum of a tensor's or an array's shape, dtype and entries."""
        if id(value) not in self._sums:
            self._met[id(value)] = value
            whole: Any = value
            if isinstance(value, Tensor):
                whole = value.detach()
                whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            digest = hashlib.sha256(f"{tuple(whole.shape)} {whole.dtype}".encode())
            if isinstance(whole, Tensor) and whole.device.type != "meta":
                whole = whole.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            if isinstance(whole, np.ndarray):
                digest.update(whole.tobytes())
            self._sums[id(value)] = digest.digest()
        return self._sums[id(value)]


def _names(function: object) -> frozenset[str]:
    """All that a function and those within it may read of their module, or of an object."""
    if isinstance(function, MethodType | functools.partial):
        return _names(getattr(function, "__func__", None) or getattr(function, "func", None))
    code = function if isinstance(function, CodeType) else getattr(function, "__code__", None)
    if code is None:
        return frozenset()
    return frozenset(code.co_names).union(*(_names(each) for each in code.co_consts if isinstance(each, CodeType)))


def check_model(model: nn.Module, shapes: Mapping[str, tuple[int, int]], mark: str, values: bool = True) -> None:
    """Checks that a Fisher of these layers and this fingerprint is one of ``model``.

    Args:
        model: the model it is to be used with.
        shapes: layer -> (p, q).
        mark: the fingerprint of the model it was estimated on.
        values: compare fingerprints too; False where the model has been wrapped, cast or trained since.

    Raises:
        ValueError: naming the first layer that is absent or of another shape, or the fingerprints.
    """
    known, modules = set(selectable(model)), dict(model.named_modules())
    for name in shapes:
        if name in modules and name not in known:
            select_layers(model, [name])  # which says why it cannot be
        if name not in known:
            near = [other for other in sorted(known) if other.endswith(f".{name}")]
            near = near or difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"{type(model).__name__} has no layer {name!r}, which this Fisher is of{hint}")
    for name, layer in select_layers(model, list(shapes)).items():
        if layer.shape != tuple(shapes[name]):
            raise ValueError(
                f"layer {name!r} has shape {layer.shape} in this model, {tuple(shapes[name])} in this Fisher"
            )
    if values and (found_mark := fingerprint(model)) != mark:
        raise ValueError(
            f"the model's fingerprint is {found_mark}, this Fisher's is {mark}: its parameters have other values, "
            "names or dtypes than when the Fisher was estimated. Load the model of that time, or pass values=False"
        )


def header_fields(raw: Any) -> dict[str, Any]:
    """The fields of a stored Fisher header, with types and ranges checked.

    Args:
        raw: what JSON gave.

    Returns:
        Keyword arguments for FisherHeader.

    Raises:
        ValueError: naming the field that is missing or wrong.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"a {type(raw).__name__} where the fields belong")
    for name in (*_TEXTS, "rank", "seed", "examples", "tokens", "shapes"):
        if name not in raw:
            raise ValueError(f"no field {name!r}")
    for name in _TEXTS:
        if not isinstance(raw[name], str):
            raise ValueError(f"{name}={raw[name]!r} is not a text")
    for name, kind in _LATER.items():
        if not isinstance(raw.get(name, kind()), kind):
            raise ValueError(f"{name}={raw[name]!r} is not a {kind.__name__}")
    decay = raw.get("decay", 1.0)
    if type(decay) not in (int, float) or not 0 < decay <= 1:
        raise ValueError(f"decay={decay!r} does not lie in (0, 1]")
    if type(raw["rank"]) is not int or raw["rank"] < 1:
        raise ValueError(f"rank={raw['rank']!r} is not a positive integer")
    if type(raw.get("probes", 0)) is not int or raw.get("probes", 0) < 0:
        raise ValueError(f"probes={raw['probes']!r} is not a number of columns")
    if type(raw["seed"]) is not int:
        raise ValueError(f"seed={raw['seed']!r} is not an integer")
    for name in ("examples", "tokens"):
        value = raw[name]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} is not a positive number")
    shapes = raw["shapes"]
    if not isinstance(shapes, dict) or not shapes:
        raise ValueError("shapes is not a mapping of layers")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"layer {name!r} has shape {shape!r}")
    return {**raw, "shapes": {name: tuple(shape) for name, shape in shapes.items()}}
