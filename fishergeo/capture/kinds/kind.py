"""What every kind of module has in common: its call, its (p, q) view, and probes of what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module, with the gradient that came back to it.

    Attributes:
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        gradient: gradient of the output.
        note: what :meth:`Kind.examine` found.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    gradient: Tensor
    note: Any = None


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a module reads."""
    return args[0] if args else next(iter(kwargs.values()))


class Kind:
    """One kind of module; the class itself is of no kind, its subclasses are.

    Attributes:
        transposed: the weight is stored (q, p).
        joint: weight and bias have a common (p, q + 1) view.
        positions: the output's positions are the batch's own, so that its padding mask applies.
        mates: kinds of the same mates may share one parameter.
    """

    mates = "matrix"
    transposed = False
    joint = True
    positions = True

    def accepts(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        raise NotImplementedError

    def refusal(self, module: nn.Module) -> str | None:
        """Why this one module cannot be captured, or None."""
        return None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(p, q) of the weight's view."""
        raise NotImplementedError

    def view(self, tensor: Tensor) -> Tensor:
        """(p, q) of a tensor shaped as the weight is stored."""
        flat = tensor.reshape(len(tensor), -1)
        return flat.mT if self.transposed else flat

    def examine(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Checks on the module's first call that it computes what this kind says.

        Returns:
            Whatever :meth:`terms` needs to know.

        Raises:
            ValueError: if it computes something else, by name.
        """
        return None

    def geometry(self, module: nn.Module) -> tuple[Any, ...]:
        """What a depends on beside the input tensor: layers that agree in both share their a."""
        return ()

    def factor(self, call: Call) -> float:
        """The constant by which g is larger than the gradient of the output, which the bias sees."""
        return 1.0

    def skipped(self, module: nn.Module, call: Call) -> Tensor | None:
        """(...) bool, True at positions whose weight is not read; None if there are none."""
        return None

    def terms(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        """(a, g): (..., q) and (..., p), of the weight."""
        return first_input(call.args, call.kwargs), call.gradient

    def output_gradient(self, call: Call) -> Tensor:
        """(..., p): what the bias sees."""
        return call.gradient


@torch.no_grad()
def run_with(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    scales: float | Tensor,
    bias: float | Tensor = 0.0,
) -> Tensor:
    """What the module gives with another weight and bias, past its hooks."""
    with _replaced(module, weight=scales, bias=bias):
        return module.forward(*args, **kwargs)


@contextmanager
def _replaced(module: nn.Module, **values: float | Tensor) -> Iterator[None]:
    """The module with plain tensors for its parameters; sharded ones need not be gathered for it."""
    kept = {name: module._parameters[name] for name in values if module._parameters.get(name) is not None}
    try:
        for name, parameter in kept.items():
            plain = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device) + values[name]  # type: ignore[union-attr]
            module._parameters[name] = nn.Parameter(plain.to(parameter.dtype), requires_grad=False)  # type: ignore[union-attr]
        yield
    finally:
        module._parameters.update(kept)


def close(actual: Tensor, expected: Tensor, weight: Tensor) -> bool:
    """Whether two tensors are equal as far as the precision of the first and of the weight goes."""
    return float((actual - expected).norm()) <= tolerance(weight, actual) * float(expected.norm())


def tolerance(*tensors: Tensor) -> float:
    """Wide: norms compute in float32 whatever the model's dtype, and what is not understood is off by its own size."""
    return 0.03 if any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors) else 1e-4


def linear_scale(
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plain: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> float:
    """The constant c of a derived class whose forward is c times the plain map, plus its bias.

    Args:
        name: name of the module, for errors.
        module: with a forward of its own.
        args: positional arguments of its first call.
        kwargs: keyword arguments of its first call.
        plain: (input, weight, bias) -> what the class it derives from computes.

    Raises:
        ValueError: if its forward is no such multiple: a weight that is masked or standardised, other outputs.
    """
    weight, bias = cast(Tensor, module.weight), module._parameters.get("bias")
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        return 1.0  # quantised or sharded, which a forward of its own is for
    x, weight = first_input(args, kwargs).detach(), weight.detach()
    probe = torch.linspace(0.5, 1.5, 1 if bias is None else len(bias), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        map_, runs = plain(x, weight, None), [run_with(module, args, kwargs, weight, 0.0)]
        # Twice the weight must be twice the map: a constant that depends on the weight has a gradient of its own.
        runs.append(run_with(module, args, kwargs, 2 * weight, probe))
        if all(isinstance(run, Tensor) and run.shape == map_.shape for run in runs) and bool(map_.any()):
            wide = map_.double()
            scale = float((runs[0].double() * wide).sum() / wide.square().sum())
            doubled = plain(x, 2 * scale * weight, None if bias is None else probe)
            if scale and close(runs[0], scale * map_, weight) and close(runs[1], doubled, weight):
                return scale
    raise ValueError(
        f"layers: {name!r} is a {type(module).__name__}, whose forward is no multiple of the plain map of its weight (or "
        "all it has read are zeros); leave it out of layers"
    )
