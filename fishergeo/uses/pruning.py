"""Weights that the loss can do without: what each costs, and the best the others can do when some go."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishergeo._checks import check_choice, check_finite, check_integer, check_number
from fishergeo.operators import SymmetricOperator
from fishergeo.spectral import ConvergenceWarning
from fishergeo.uses.merging import conjugate_gradients
from fishergeo.uses.weights import Curvature, check_fits, check_same_layers, damped_inverse, effective, layers_of

METHODS = ("obd", "obs")

DIRECT = 2048
"""The most removed weights of a layer whose system is solved by factorising it."""


def saliency(
    weights: nn.Module | Mapping[str, Tensor], fisher: Curvature, method: str = "obd", damping: float = 0.0
) -> dict[str, Tensor]:
    """What removing each weight costs to second order, every other one left alone or moved to make up for it.

    ``"obd"``: ½ F_ii w_i², the others stay (Optimal Brain Damage: LeCun et al. 1989). ``"obs"``: ½ w_i²/(F⁻¹)_ii, the
    others move (Optimal Brain Surgeon: Hassibi and Stork 1993). They are equal for a diagonal Fisher.

    Args:
        weights: a model, held against the Fisher's fingerprint, or layer -> (p, q), any floating dtype.
        fisher: Fisher of any structure, or a mapping from layers to operators.
        method: ``"obd"`` or ``"obs"``.
        damping: number added to every eigenvalue, not negative.

    Returns:
        Layer -> (p, q), not negative, of the operator's dtype.

    Raises:
        ValueError: an unknown method, a Fisher of another model or of other layers, an operator that does not fit, a
            negative damping, or for ``"obs"`` one that leaves a layer singular; by name.
        TypeError: if damping is no real number.

    Examples:
        >>> fisher = {"layer": fg.DiagonalOperator(torch.tensor([[2.0, 8.0]]))}
        >>> fg.saliency({"layer": torch.tensor([[3.0, 1.0]])}, fisher)["layer"].tolist()
        [[9.0, 4.0]]
    """
    check_choice("method", method, METHODS)
    check_number("damping", damping, low=0.0)
    scores = {}
    for name, weight in _weights(weights, fisher).items():
        if method == "obd":
            charge = _on_weights(fisher[name], weight) + damping
        else:
            charge = 1 / _on_weights(damped_inverse(name, fisher[name], damping), weight)
        scores[name] = 0.5 * charge * weight.to(charge.dtype).square()
    return scores


def n_of_m_mask(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The mask that keeps the n best of every m weights that stand side by side in a row, as sparse tensor cores want it.

    Of equal scores the earlier is kept. The pattern is that of Mishra et al. (2021, arXiv 2104.08378).

    Args:
        scores: (p, q), q a multiple of m; any floating dtype, such as :func:`saliency` gives.
        n: number kept, from 1 to m.
        m: size of a group.

    Returns:
        (p, q) bool, True where a weight stays.

    Raises:
        ValueError: numbers out of range, groups that do not fit the rows, or NaN among the scores.
        TypeError: if n or m is no integer.

    Examples:
        >>> fg.n_of_m_mask(torch.tensor([[3.0, 1.0, 2.0, 4.0]])).int().tolist()
        [[1, 0, 0, 1]]
    """
    check_integer("m", m, low=1)
    check_integer("n", n, low=1, high=m)
    if scores.ndim != 2 or scores.shape[1] % m:
        raise ValueError(f"scores of shape {tuple(scores.shape)} have no rows of whole groups of {m}")
    if bool(scores.isnan().any()):  # they would sort before every number, and be kept
        raise ValueError(
            f"scores has {int(scores.isnan().sum())} NaN of {scores.numel()}; look at the Fisher they are of"
        )
    groups = scores.reshape(-1, m)
    best = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).reshape(scores.shape)


@dataclass(frozen=True)
class Pruned:
    """Weights after a step of Optimal Brain Surgeon.

    Attributes:
        weights: layer -> (p, q), zero where it was masked, of the dtype of the operator.
        cost: layer -> growth of the loss to second order, a float.
        steps: layer -> steps of conjugate gradients; 0 where the system was factorised.

    Examples:
        >>> fisher = {"layer": fg.DiagonalOperator(torch.tensor([[2.0, 8.0]]))}
        >>> keep = {"layer": torch.tensor([[True, False]])}
        >>> pruned = fg.obs_step({"layer": torch.tensor([[3.0, 1.0]])}, fisher, keep)
        >>> pruned.weights["layer"].tolist(), pruned.cost
        ([[3.0, 0.0]], {'layer': 4.0})
    """

    weights: dict[str, Tensor]
    cost: dict[str, float]
    steps: dict[str, int]


@torch.no_grad()
def obs_step(
    weights: nn.Module | Mapping[str, Tensor],
    fisher: Curvature,
    masks: Mapping[str, Tensor],
    damping: float = 0.0,
    *,
    tolerance: float = 1e-10,
    max_steps: int = 2000,
) -> Pruned:
    r"""Removes all masked weights at once and moves the others to where the loss grows least, exactly.

    The minimiser of ½ tr(ΔWᵀFΔW) with w + Δw = 0 at the removed weights R: Δw = −F⁻¹ E (Eᵀ F⁻¹ E)⁻¹ w_R, E the columns
    of the identity at R (Optimal Brain Surgeon: Hassibi and Stork 1993; in blocks: Singh and Alistarh 2020,
    arXiv 2004.14340). Masks may have any pattern; :func:`n_of_m_mask` makes those of sparse tensor cores. The system of
    R is factorised up to 2,048 removed weights of a layer, and beyond solved by conjugate gradients, preconditioned
    by F restricted to R; nothing of size (pq, pq) is formed but for small R.

    Args:
        weights: a model, held against the Fisher's fingerprint, or layer -> (p, q), any floating dtype.
        fisher: Fisher of any structure, or a mapping from layers to operators.
        masks: layer -> (p, q) bool, True where a weight stays, of the layers to prune.
        damping: number added to every eigenvalue, not negative.
        tolerance: bound of the residual, relative, at which conjugate gradients stop; 1e-6 in float32.
        max_steps: largest number of their steps, at least 1.

    Returns:
        Pruned: the new weights of the masked layers; the model is not changed.

    Raises:
        ValueError: a mask of an unknown layer or of another shape or dtype, a Fisher of another model or of other layers, or
            a damping that leaves a layer singular, or a tolerance that is negative; by name.
        TypeError: if max_steps is no integer, or damping or tolerance no real number.

    Warns:
        ConvergenceWarning: if conjugate gradients stop before the tolerance, naming the layer.

    Examples:
        >>> fisher = {"layer": fg.DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), side="input")}
        >>> pruned = fg.obs_step({"layer": torch.tensor([[1.0, 1.0]])}, fisher, {"layer": torch.tensor([[True, False]])})
        >>> pruned.weights["layer"].tolist()  # the first takes over half of the second
        [[1.5, 0.0]]
    """
    check_integer("max_steps", max_steps, low=1)
    check_number("tolerance", tolerance, low=0.0)
    known = _weights(weights, fisher)
    found = Pruned({}, {}, {})
    for name, keep in masks.items():
        if name not in known:
            raise ValueError(f"masks names layer {name!r}, which this Fisher does not have")
        weight = known[name].to(fisher[name].dtype)
        if keep.dtype != torch.bool or keep.shape != weight.shape:
            raise ValueError(
                f"the mask of layer {name!r} must be bool of shape {tuple(weight.shape)}, True where it stays"
            )
        removed = torch.nonzero(~keep.flatten().to(weight.device))[:, 0]
        inverse = damped_inverse(name, fisher[name], damping)
        forces, steps = _solve(inverse, fisher[name], damping, weight, removed, tolerance, max_steps)
        if steps >= max_steps:
            warnings.warn(
                f"layer {name!r}: no convergence in {steps} steps; raise damping", ConvergenceWarning, stacklevel=3
            )
        step = inverse.apply(_spread(forces, removed, weight))
        found.weights[name] = torch.where(keep.to(weight.device), weight - step, 0)
        found.cost[name] = 0.5 * float(forces @ weight.flatten()[removed])
        found.steps[name] = steps
    return found


def _weights(weights: nn.Module | Mapping[str, Tensor], fisher: Curvature) -> dict[str, Tensor]:
    """Layer -> (p, q), checked against the Fisher."""
    if isinstance(weights, nn.Module):
        weights = {name: effective(weights, layer) for name, layer in layers_of(weights, fisher).items()}
    else:
        check_same_layers("weights", weights, "fisher", dict.fromkeys(fisher))
    for name, weight in weights.items():
        check_fits(name, fisher[name], tuple(weight.shape))
        check_finite(f"weight of layer {name!r}", weight)
    return {name: weight.detach() for name, weight in weights.items()}


def _on_weights(operator: SymmetricOperator, like: Tensor) -> Tensor:
    """The diagonal of an operator as it acts on weights, (p, q)."""
    diagonal = operator.diagonal()
    if operator.side == "output":
        return diagonal[:, None].expand(like.shape)
    return diagonal.expand(like.shape) if operator.side == "input" else diagonal.reshape(like.shape)


def _spread(values: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """(..., p, q) with values (..., R) at their places and zeros elsewhere."""
    flat = like.new_zeros(*values.shape[:-1], like.numel())
    flat[..., places] = values
    return flat.reshape(*values.shape[:-1], *like.shape)


def _solve(
    inverse: SymmetricOperator,
    operator: SymmetricOperator,
    damping: float,
    weight: Tensor,
    removed: Tensor,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, int]:
    """(Eᵀ F⁻¹ E)⁻¹ w_R, and the steps it took."""
    right = weight.flatten()[removed]

    def act(values: Tensor) -> Tensor:
        return inverse.apply(_spread(values, removed, weight)).flatten(-2)[..., removed]

    def precondition(values: Tensor) -> Tensor:
        return operator.apply(_spread(values, removed, weight)).flatten()[removed] + damping * values

    if len(removed) > DIRECT:
        return conjugate_gradients(act, right, tolerance, max_steps, precondition)
    eye = torch.eye(len(removed), dtype=weight.dtype, device=weight.device)
    chunk = max(1, 2**24 // weight.numel())
    system = torch.cat([act(eye[i : i + chunk]) for i in range(0, len(eye), chunk)]) if len(eye) else eye
    return torch.linalg.solve(system.double(), right.double()).to(weight.dtype), 0
