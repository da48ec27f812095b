"""Which model a Fisher belongs to: its fingerprint, the check against it, and the fields of a stored header."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

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
