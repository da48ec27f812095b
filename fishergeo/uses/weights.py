"""What every use of a Fisher asks of a model: the layers that it is of, their weights, and inverses that exist."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishergeo._checks import check_number
from fishergeo.capture import Layer, adapter_factors, fingerprint, layer_parameters, select_layers, weight_matrix
from fishergeo.estimation import Fisher
from fishergeo.operators import ROUNDINGS, FactoredKronecker, SymmetricOperator
from fishergeo.updates import LowRank

Curvature = Mapping[str, SymmetricOperator]
"""Layer -> operator: a :class:`fishergeo.Fisher`, or any mapping of one's own."""


def layers_of(model: nn.Module, fisher: Curvature, argument: str = "fisher") -> dict[str, Layer]:
    """The layers of ``model`` that a Fisher is of.

    Args:
        model: any module.
        fisher: Fisher of the model as it is now, held against its fingerprint; of a plain mapping shapes alone are known.
        argument: its name, for the message.

    Raises:
        ValueError: if it is of another model, of no layer, of a parameter twice (as ``"fc"`` and ``"fc+bias"``), or an operator
            does not fit its layer; by name.
    """
    if not len(fisher):
        raise ValueError(f"{argument} has no layer")
    if isinstance(fisher, Fisher):
        try:
            fisher.check_model(model)
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error
    layers = select_layers(model, list(fisher))
    holders: dict[tuple[int, object], str] = {}
    for name, layer in layers.items():
        for parameter in layer_parameters(layer):
            other = holders.setdefault((id(parameter), layer.expert), name)
            if other != name:
                raise ValueError(
                    f"{argument}: layers {other!r} and {name!r} hold one parameter, which would count twice; pass one"
                )
        if not isinstance(fisher, Fisher):
            check_fits(name, fisher[name], layer.shape, argument)
    return layers


def check_fits(name: str, operator: SymmetricOperator, shape: tuple[int, ...], argument: str = "fisher") -> None:
    """Refuses an operator that cannot act on a weight of this shape, which must be (p, q).

    Raises:
        ValueError: naming the layer and both shapes.
    """
    if len(shape) != 2:
        raise ValueError(f"layer {name!r}: one weight (p, q) is asked for, got shape {tuple(shape)}")
    try:
        operator._check_delta(*shape)
    except ValueError as error:
        raise ValueError(
            f"{argument}: layer {name!r} has shape {tuple(shape)}, which an operator of shape {operator.shape}, side "
            f"{operator.side!r}, does not fit: {error}"
        ) from error


def check_same_layers(first: str, ours: Mapping[str, object], second: str, theirs: Mapping[str, object]) -> None:
    """Refuses two mappings of different layers.

    Raises:
        ValueError: naming the first layer that one of them lacks.
    """
    for name, lacking in [(n, second) for n in ours if n not in theirs] + [(n, first) for n in theirs if n not in ours]:
        raise ValueError(f"{lacking} lacks layer {name!r}, which {first if lacking == second else second} has")


def layer_shapes(fisher: Curvature) -> dict[str, tuple[int, int]]:
    """Layer -> (p, q), of a Fisher, or of a mapping of operators that know both sides of their layers."""
    if isinstance(fisher, Fisher):
        return dict(fisher.header.shapes)
    return {n: (len(fisher[n].partial_trace("output")), len(fisher[n].partial_trace("input"))) for n in fisher}


def effective(model: nn.Module, layer: Layer) -> Tensor:
    """A layer's weight with what the active adapters add to it, (p, q), differentiable."""
    weight = weight_matrix(layer)
    for left, right in adapter_factors(model, layer.name):
        weight = weight + (left @ right).to(weight.dtype)
    return weight


def wide_dtype(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The wider of two, float32 at least: in the narrower, a Fisher's say, two weights may be one."""
    return torch.promote_types(torch.promote_types(first, second), torch.float32)


def adapter_update(model: nn.Module, layer: Layer) -> LowRank | None:
    """What the active adapters add to a frozen weight, in factors; None where the weight itself trains or has none."""
    pairs = adapter_factors(model, layer.name)
    if not pairs or layer.weight.requires_grad:
        return None
    return LowRank(torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs], 0))


def mark_of(model: nn.Module, fisher: Curvature) -> str:
    """The fingerprint under which results of these two are kept."""
    return fisher.header.fingerprint if isinstance(fisher, Fisher) else fingerprint(model)


def settled(operator: SymmetricOperator) -> SymmetricOperator:
    """The same operator, of two Kronecker factors in their eigenbases, so that these are found once for all functions of it."""
    return operator.rotated() if isinstance(operator, FactoredKronecker) else operator


def checked_damping(name: str, operator: SymmetricOperator, damping: float, scale: float = 1.0) -> float:
    """Damping over ``scale``, what the eigenvalues of F are damped by where scale·F + damping·I is meant.

    Args:
        name: name of the layer, for the message.
        operator: F, positive semi-definite.
        damping: not negative, in the unit of ``scale`` times the eigenvalues.
        scale: positive.

    Raises:
        ValueError: if the damped operator is singular to the precision of its dtype, naming the layer and the damping that
            would do; or if it has a negative eigenvalue, or NaN.
    """
    shift = check_number("damping", damping, low=0.0) / scale
    values = operator.eigenvalues()
    try:
        damped = operator._damped(values, shift)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    if not bool((damped > 0).all()):
        least, largest = (scale * (float(value.clamp_min(0)) + shift) for value in (values.min(), values.max()))
        enough = max(1e-6, 2 * ROUNDINGS * torch.finfo(operator.dtype).eps) * max(largest, 1e-300)
        raise ValueError(
            f"damping={damping:g} leaves layer {name!r} singular to the precision of {operator.dtype}: its eigenvalues "
            f"reach from {least:.3g} to {largest:.3g}; pass damping of at least {enough:.1g}"
        )
    return shift


def damped_inverse(name: str, operator: SymmetricOperator, damping: float) -> SymmetricOperator:
    """(F + damping·I)⁻¹.

    Raises:
        ValueError: as :func:`checked_damping`.
    """
    operator = settled(operator)
    try:  # which decomposes it once, and knows as well whether it is singular
        return operator.inverse(check_number("damping", damping, low=0.0))
    except ValueError as error:
        checked_damping(name, operator, damping)
        raise ValueError(f"layer {name!r}: {error}") from error
