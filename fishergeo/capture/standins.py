"""Leaves in the places of captured weights: autograd's own gradients, read without touching a parameter of the model.

A stand-in shares its parameter's storage. No optimiser's or user's hook is on it, and its gradient is handed on and
dropped as soon as it is whole, so that a model's worth of gradients is never held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fishergeo.capture.layers import Layer
from fishergeo.capture.matrices import sources, stored, viewed

Reader = Callable[[str, slice, Tensor], None]
"""``(layer, columns, part)``: these columns of the layer's (p, q) gradient, or a part of their sum."""


def provable(layer: Layer) -> bool:
    """Whether autograd can be asked for the gradient of a layer's weight.

    It cannot where the weight is quantised or sharded, or computed anew in every call by something other than a
    parametrisation of torch's.
    """
    return all(
        tensor is not None and tensor.is_floating_point() and not is_traceable_wrapper_subclass(tensor.data)
        for tensor in (stored(module, attribute) for module, attribute, _ in sources(layer))
    )


@contextlib.contextmanager
def stand_ins(model: nn.Module, layers: Mapping[str, Layer], read: Reader) -> Iterator[list[Tensor]]:
    """Within, every backward pass through ``model`` hands the gradients of these layers' weights to ``read``.

    Gives the leaves that such a pass must reach.

    Args:
        model: frozen.
        layers: provable ones.
        read: called within backward, several times for a layer if its gradient comes in parts.
    """
    readers: dict[Tensor, list[Callable[[Tensor], None]]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(parametrize.cached())
        for name, layer in layers.items():
            for module, attribute, columns in sources(layer):
                tensor = cast(Tensor, stored(module, attribute))
                readers.setdefault(tensor, []).append(_reader(name, layer, columns, read))
        leaves: dict[Tensor, Tensor] = {}
        for tensor, reading in readers.items():
            # What a parametrisation computed is cached, has no history, and is a leaf itself.
            leaf = nn.Parameter(tensor.detach()) if isinstance(tensor, nn.Parameter) else tensor.requires_grad_(True)
            leaves[tensor] = leaf
            stack.callback(leaf.register_post_accumulate_grad_hook(_handed_on(reading)).remove)
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and parameter in leaves:
                    stack.callback(module._parameters.__setitem__, attribute, parameter)
                    module._parameters[attribute] = cast(nn.Parameter, leaves[parameter])
        yield list(leaves.values())


def _reader(name: str, layer: Layer, columns: slice, read: Reader) -> Callable[[Tensor], None]:
    """Hands on a gradient as it is stored, seen as (p, columns)."""

    def view(gradient: Tensor) -> None:
        read(name, columns, viewed(layer, gradient, columns))

    return view


def _handed_on(readers: list[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    def hook(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is None:  # an autograd function of someone's own that gives frozen weights none
            return
        with torch.no_grad():
            for reader in readers:
                reader(gradient)

    return hook
