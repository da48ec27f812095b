"""The Fisher of all layers at once, which the sum over layers leaves out: tokens and layers move together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishergeo.operators.base import check_single
from fishergeo.operators.exact import ExactOperator


class JointFisher:
    r"""1/N Σ w_i g_i g_iᵀ over several layers, g_i their gradients of example i end to end, by definition.

    A Fisher by layers charges an update Σ_l vec(ΔW_l)ᵀ F_l vec(ΔW_l): the diagonal blocks of this matrix. What it
    leaves out are the products of two layers' effects on one example. In a deep model these are most of the drift, since
    an update moves every layer for the same reason: with L layers of equal and aligned effects the blocks hold 1/L of
    the joint form. Nothing of its size is formed: an update meets each example through its factors,
    ⟨G_il, ΔW_l⟩ = ⟨D_il, A_il ΔW_lᵀ⟩.

    Args:
        operators: layer name -> :class:`fishergeo.ExactOperator` of the same N examples in the same order, as one
            ``fg.estimate_fisher(..., structure="exact")`` gives them; an example that does not reach a layer (an expert) has
            its place there, and a gradient of zero.

    Raises:
        TypeError: an operator of another structure; names the layer.
        ValueError: no operator, or layers of different numbers of examples or different divisors, as those of different
            estimates are; names the layers.

    Examples:
        >>> one = fg.ExactOperator(torch.eye(2), torch.ones(2, 1), torch.tensor([1, 1]), count=2)
        >>> joint = fg.JointFisher({"first": one, "second": one})
        >>> update = torch.tensor([[1.0], [0.0]])
        >>> float(joint.quadratic({"first": update, "second": update}))  # by layers it would be 0.5 + 0.5
        2.0
    """

    def __init__(self, operators: Mapping[str, ExactOperator]) -> None:
        if not operators:
            raise ValueError("operators is empty; a joint Fisher needs at least one layer")
        for name, operator in operators.items():
            if not isinstance(operator, ExactOperator):
                raise TypeError(
                    f"layer {name!r} has a {type(operator).__name__}; estimate the Fisher with structure='exact', which "
                    "alone keeps what belongs to each example"
                )
        first = next(iter(operators))
        for name, operator in operators.items():
            if (operator.examples, operator.count) != (operators[first].examples, operators[first].count):
                raise ValueError(
                    f"layer {name!r} has seen {operator.examples} examples, divided by {operator.count:g}, and {first!r} "
                    f"{operators[first].examples}, divided by {operators[first].count:g}; take the layers of one estimate"
                )
        self.operators = dict(operators)

    @property
    def examples(self) -> int:
        """N."""
        return next(iter(self.operators.values())).examples

    def inner(self, updates: Mapping[str, Any]) -> Tensor:
        """The first-order change of each example's objective, Σ_l ⟨G_il, ΔW_l⟩, whatever its weight; differentiable.

        Args:
            updates: layer name -> ΔW: a (p, q) tensor, or factors with ``.left`` (p, r) and ``.right`` (r, q); or Q
                updates of every layer at once, (Q, p, q). Layers left out do not move.

        Returns:
            (N,), or (Q, N), of the operators' dtype, in the order of the examples.

        Raises:
            ValueError: no update, a layer that this Fisher does not have, an update of another shape, or an example of weight
                zero.
        """
        self._check_layers(updates)
        return torch.stack([self.operators[name].inner(delta) for name, delta in updates.items()]).sum(0)

    def _check_layers(self, updates: Mapping[str, Any]) -> None:
        if unknown := sorted(set(updates) - set(self.operators)):
            raise ValueError(f"updates names layers that this Fisher does not have: {', '.join(map(repr, unknown))}")
        if not updates:
            raise ValueError("updates is empty; pass at least one layer's update")

    def quadratic(self, updates: Mapping[str, Any]) -> Tensor:
        """1/N Σ_i w_i (Σ_l ⟨G_il, ΔW_l⟩)², a scalar, differentiable in the updates; w_i is 1 where nothing is weighted.

        For a Fisher of whole responses (``reduction="sum"``) half of it is, to second order, a drift in nats a response.

        Args:
            updates: weight updates, as :meth:`inner`.

        Returns:
            Scalar tensor of the operators' dtype, float32 at least.

        Raises:
            ValueError: no update, a layer that this Fisher does not have, or several updates of a layer or one of another shape.
        """
        self._check_layers(updates)
        for update in updates.values():
            check_single(update)
        moved = [self.operators[name].widened()._weighted_inner(delta) for name, delta in updates.items()]
        return torch.stack(moved).sum(0).square().sum() / next(iter(self.operators.values())).count

    def dual(self) -> Tensor:
        """Σ_l √(w_i w_j) ⟨G_il, G_jl⟩/N, (N, N): its eigenvalues are those of the joint Fisher but for zeros."""
        return torch.stack([operator.dual() for operator in self.operators.values()]).sum(0)

    def trace(self) -> Tensor:
        """Σ_i w_i‖g_i‖²/N, a scalar tensor; the sum of the layers' traces."""
        return torch.stack([operator.trace() for operator in self.operators.values()]).sum()

    def __repr__(self) -> str:
        return f"JointFisher({len(self.operators)} layers, {self.examples} examples)"
