"""A layer's weight as the (p, q) matrix that its Fisher is of: read, written, and its gradient, however it is stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fishergeo.capture.layers import Layer


def sources(layer: Layer) -> list[tuple[nn.Module, str, slice]]:
    """The parameters that make up a layer: (module, attribute, columns of the view)."""
    use = next(use for use in layer.uses if not use.flipped)
    if layer.expert is not None:
        return [(use.module, layer.expert.parameter, slice(None))]
    if layer.part == "bias":
        return [(use.module, "bias", slice(None))]
    if layer.part == "weight":
        return [(use.module, "weight", slice(None))]
    return [(use.module, "weight", slice(None, -1)), (use.module, "bias", slice(-1, None))]


def stored(module: nn.Module, attribute: str) -> Tensor | None:
    """A parameter, or what a parametrisation makes of it."""
    if parametrize.is_parametrized(module, attribute):
        return getattr(module, attribute)
    return module._parameters.get(attribute)


def viewed(layer: Layer, tensor: Tensor, columns: slice) -> Tensor:
    """What is shaped as one of the layer's parameters is stored, seen as (p, columns)."""
    if layer.expert is not None:
        one = tensor[layer.expert.index]
        return one.mT if layer.expert.transposed else one
    if tensor.ndim == 1 or columns.start == -1 or layer.part == "bias":
        return tensor[:, None]
    use = next(use for use in layer.uses if not use.flipped)
    assert use.kind is not None
    return use.kind.view(tensor)


def weight_matrix(layer: Layer) -> Tensor:
    """The layer's weight, (p, q), differentiable in its parameters.

    Raises:
        ValueError: if the weight is quantised.
    """
    parts = [viewed(layer, tensor, columns) for tensor, columns in _parts(layer)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def layer_parameters(layer: Layer) -> list[Tensor]:
    """The parameters that make up a layer."""
    return [tensor for tensor, _ in _parts(layer)]


def gradient_matrix(layer: Layer) -> Tensor | None:
    """What stands in the ``.grad`` of the layer's parameters, (p, q); None if one of them has none."""
    parts = [(tensor.grad, columns) for tensor, columns in _parts(layer)]
    views = [viewed(layer, grad, columns) for grad, columns in parts if grad is not None]
    if len(views) < len(parts):
        return None
    return views[0] if len(views) == 1 else torch.cat(views, 1)


@torch.no_grad()
def write_matrix(layer: Layer, matrix: Tensor, into: Callable[[Tensor], Tensor] = lambda parameter: parameter) -> None:
    """Writes a (p, q) matrix into the layer's parameters, in their own dtype and as they are stored.

    Args:
        layer: whose.
        matrix: (p, q).
        into: parameter -> the tensor of its shape that is written in its place, such as its ``.grad``.

    Raises:
        ValueError: if the weight is quantised or computed by a parametrisation.
    """
    for module, attribute, _ in sources(layer):
        if parametrize.is_parametrized(module, attribute):
            raise ValueError(f"layer {layer.name!r} is computed by a parametrisation, so nothing can be written to it")
    for tensor, columns in _parts(layer):
        target = into(tensor)
        block = matrix[:, columns]
        if layer.expert is not None:
            target[layer.expert.index].copy_(block.mT if layer.expert.transposed else block)
        else:
            use = next(use for use in layer.uses if not use.flipped)
            turned = use.kind is not None and use.kind.transposed and tensor.ndim > 1
            target.copy_((block.mT if turned else block).reshape(target.shape))


def _parts(layer: Layer) -> list[tuple[Tensor, slice]]:
    """The parameters, as they are stored, and their columns of the view."""
    found = []
    for module, attribute, columns in sources(layer):
        tensor = stored(module, attribute)
        if tensor is None or not tensor.is_floating_point():
            raise ValueError(
                f"layer {layer.name!r} is quantised, so its weight is no matrix of numbers; load the model in a floating "
                "dtype"
            )
        found.append((tensor, columns))
    return found
