"""Ranks of an adapter's layers by what the Fisher says they are worth."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishergeo._checks import check_finite, check_integer, check_number
from fishergeo.capture import plain_name
from fishergeo.operators import SymmetricOperator
from fishergeo.updates import LowRank
from fishergeo.uses.weights import Curvature, check_fits, check_same_layers, layer_shapes

JOINT = "+bias"
"""Ends the name of a weight and its bias in one; an adapter is the weight's alone."""


def rank_pattern(
    fisher: Curvature,
    budget: int | None = None,
    *,
    update: Mapping[str, Tensor | LowRank] | None = None,
    energy: float | None = None,
    minimum: int = 1,
    maximum: int | None = None,
) -> dict[str, int]:
    r"""A rank for every layer, as peft's ``LoraConfig(rank_pattern=...)`` takes it.

    Each further direction of a layer has a gain and the cost of its p + q parameters; directions are taken by gain over
    cost until the budget is spent, or until they hold a share of all gains. With an update, the gains are the squared
    singular values of F^½ ΔW: what a truncation of it would lose, to second order (for KFAC exactly, since F^½ ΔW is
    S^½ ΔW A^½; Hsu et al. 2022, arXiv 2207.00112, with a diagonal). Without one, they are the eigenvalues of the
    output side E[G Gᵀ]: the energy of the task's gradients that a rank can follow; EVA (Paischer et al. 2024,
    arXiv 2410.07170) allocates by that of the inputs. That both go by gain over cost is this project's own.

    Args:
        fisher: Fisher of the layers to adapt, any structure, or a mapping from layers to operators.
        budget: number of parameters of all adapters together, Σ r(p + q); this or ``energy``.
        update: layer -> ΔW, (p, q), any floating dtype, dense or in factors, of the layers of the Fisher.
        energy: share of the sum of gains to keep, in (0, 1]; where ``maximum`` puts it out of reach, ranks go as far as that.
        minimum: least rank, at least 1; peft adapts no layer with rank 0.
        maximum: largest rank; None for no bound but min(p, q).

    Returns:
        Layer's name, without what peft puts around it and without ``+bias``, -> rank.

    Raises:
        ValueError: neither or both of budget and energy, numbers out of range, a budget that the minimum exceeds, layers
            that differ between Fisher and update, an operator of one side where its layer's shape cannot be known, or NaN
            in an operator or update; by name.
        TypeError: if budget, minimum or maximum is no integer.

    Examples:
        >>> fisher = {"a": fg.DiagonalOperator(torch.diag(torch.tensor([8.0, 4.0, 2.0])))}
        >>> fisher["b"] = fg.DiagonalOperator(torch.diag(torch.tensor([5.0, 0.1, 0.1])))
        >>> fg.rank_pattern(fisher, budget=18)  # three directions of 3 + 3 parameters
        {'a': 2, 'b': 1}
    """
    if (budget is None) == (energy is None):
        raise ValueError("pass one of budget= and energy=")
    check_integer("minimum", minimum, low=1)
    if maximum is not None:
        check_integer("maximum", maximum, low=minimum)
    if energy is not None:
        check_number("energy", energy, low=1e-12, high=1.0)
    shapes: Mapping[str, tuple[int, ...]] = (
        layer_shapes(fisher) if update is None else {n: tuple(d.shape) for n, d in update.items()}
    )
    check_same_layers("fisher", dict.fromkeys(fisher), "update", shapes)
    targets = {name: plain_name(name).removesuffix(JOINT) for name in shapes}
    for target in (twice := list(targets.values())):
        if twice.count(target) > 1:
            raise ValueError(f"fisher has {target!r} twice, alone and with its bias; pass one of them")
    gains, ranks, whole = {}, {}, 0.0
    for name, shape in shapes.items():
        check_fits(name, fisher[name], shape)
        p, q = shape
        try:
            found = _gradient_gains(fisher[name]) if update is None else _update_gains(fisher[name], update[name])
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        found = found.clamp_min(0)[: min(p, q)]
        whole += float(found.sum())  # of what no rank may reach too
        gains[name] = found[:maximum].tolist()
        ranks[name] = min(minimum, len(gains[name]))
    costs = {name: sum(shape) - name.endswith(JOINT) for name, shape in shapes.items()}
    spent = sum(costs[name] * rank for name, rank in ranks.items())
    if budget is not None and spent > check_integer("budget", budget, low=1):
        raise ValueError(f"budget={budget} is less than the {spent} parameters of rank {minimum} in every layer")
    kept = sum(sum(gains[name][:rank]) for name, rank in ranks.items())
    wanted = float("inf") if energy is None else energy * whole
    queue = [(-gains[n][r] / costs[n], n) for n, r in ranks.items() if r < len(gains[n])]
    heapq.heapify(queue)
    while queue and kept < wanted * (1 - 1e-12):
        value, name = heapq.heappop(queue)
        if value == 0 or (budget is not None and spent + costs[name] > budget):
            continue
        kept, spent, ranks[name] = kept + gains[name][ranks[name]], spent + costs[name], ranks[name] + 1
        if ranks[name] < len(gains[name]):
            heapq.heappush(queue, (-gains[name][ranks[name]] / costs[name], name))
    return {targets[name]: rank for name, rank in ranks.items()}


def _update_gains(operator: SymmetricOperator, update: Any) -> Tensor:
    """Squared singular values of F^½ ΔW, descending."""
    dense = update if isinstance(update, Tensor) else update.to_dense()
    check_finite("update", dense)
    return torch.linalg.svdvals(operator.sqrt().apply(dense.detach()).double()).square()


def _gradient_gains(operator: SymmetricOperator) -> Tensor:
    """Eigenvalues, descending, of the one-sided matrix that an operator implies: of its own side, or of the output's."""
    side = "output" if operator.side == "both" else operator.side
    matrix = operator.partial_trace(side).double()
    check_finite(f"the {side} side of the Fisher", matrix)
    return torch.linalg.eigvalsh(matrix).flip(0)
