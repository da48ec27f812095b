"""Models of one architecture merged by what each of them needs: the minimiser of their Fishers' quadratic forms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishergeo._checks import check_finite, check_integer, check_number
from fishergeo.capture import Layer, adapter_factors, write_matrix
from fishergeo.operators import ROUNDINGS, DenseOperator, DiagonalOperator, FactoredKronecker, SymmetricOperator
from fishergeo.spectral import ConvergenceWarning
from fishergeo.uses.weights import Curvature, check_same_layers, effective, layers_of, wide_dtype

Act = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Merged:
    """What :func:`fishergeo.merge_weights` found.

    Attributes:
        weights: layer -> merged weight, (p, q), of the wider dtype of weight and operators, float32 at least.
        averaged: names of the parameters and buffers that differ between the models and have no Fisher, so that they are
            plain averages.
        steps: layer -> steps of conjugate gradients; 0 for a closed form.
        residuals: layer -> ‖Σ F_k(W − W_k)‖ over its size at the plain average; of rounding for a closed form.
        state: names of the first model's state -> tensor of the shape it has there, for ``load_state_dict``. Layers under LoRA hold the merged
            weight in their base, and their adapters add nothing.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> merged = fg.merge_weights([model, model], [{"": fg.DiagonalOperator(torch.ones(1, 2))}] * 2)
        >>> merged.averaged, torch.equal(merged.state["weight"], model.weight)
        ((), True)
    """

    weights: dict[str, Tensor]
    averaged: tuple[str, ...]
    steps: dict[str, int]
    residuals: dict[str, float]
    state: dict[str, Tensor]


@torch.no_grad()
def merge_weights(
    models: Sequence[nn.Module],
    fishers: Sequence[Curvature],
    *,
    damping: float = 0.0,
    shares: Sequence[float] | None = None,
    tolerance: float = 1e-10,
    max_steps: int = 1000,
) -> Merged:
    r"""The weights that minimise Σ_k c_k tr((W − W_k)ᵀ (F_k + damping·I)(W − W_k)), layer by layer.

    With diagonals this is Fisher merging (Matena and Raffel 2022, arXiv 2111.09832), with the Grams of the layers'
    inputs (:func:`fishergeo.input_grams`) RegMean (Jin et al. 2023, arXiv 2212.09849), both in closed form; with KFAC
    and every other structure it is solved by conjugate gradients on the operators (MaTS: Tam et al. 2024,
    arXiv 2312.04339). Directions in which no Fisher has curvature keep the plain average.

    Args:
        models: two or more of one architecture, at the weights that their Fishers are of; peft models under plain LoRA
            are merged as the weights that they act with. None is changed.
        fishers: one of each, of the same layers: a Fisher, or a mapping from layers to operators.
        damping: number added to every eigenvalue, not negative; a large one gives the plain average.
        shares: factor c_k of each model, positive; ones if None.
        tolerance: bound of the residual, relative to that of the plain average, at which conjugate gradients stop; for
            operators in float32 at least 1e-6.
        max_steps: largest number of their steps, at least 1.

    Returns:
        Merged: its ``state`` loads into a model of the same architecture.

    Raises:
        ValueError: fewer than two models, other numbers of Fishers or shares, a Fisher of another model or of other layers
            than the first, models of different parameters or ties, a number out of range, an adapter that is not plain LoRA, a
            Fisher or a weight with NaN, or Fishers so small or large that their products leave their dtype; by name.
        TypeError: if max_steps is no integer.

    Warns:
        UserWarning: naming the parameters without a Fisher that differ between the models, which are averaged plainly.
        ConvergenceWarning: if the residual stays above the tolerance, naming the layer.

    Examples:
        >>> one, two = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(one.weight, 0.0), torch.nn.init.constant_(two.weight, 4.0)
        >>> fishers = [{"": fg.DiagonalOperator(torch.tensor([[value]]))} for value in (3.0, 1.0)]
        >>> fg.merge_weights([one, two], fishers).state["weight"].item()  # (3·0 + 1·4)/(3 + 1)
        1.0
    """
    shares = [1.0] * len(models) if shares is None else list(shares)
    if len(models) < 2 or len(fishers) != len(models) or len(shares) != len(models):
        raise ValueError(
            f"{len(models)} models, {len(fishers)} fishers and {len(shares)} shares: two or more, one each"
        )
    check_number("damping", damping, low=0.0)
    check_number("tolerance", tolerance, low=0.0)
    check_integer("max_steps", max_steps, low=1)
    for place, share in enumerate(shares):
        check_number(f"shares[{place}]", share, low=1e-12)
    for place, fisher in enumerate(fishers):
        check_same_layers("fishers[0]", fishers[0], f"fishers[{place}]", fisher)
    layers = [
        layers_of(model, fisher, f"fishers[{place}]")
        for place, (model, fisher) in enumerate(zip(models, fishers, strict=True))
    ]
    state, differing = _averages(models, shares)
    found = Merged({}, (), {}, {}, state)
    for name in layers[0]:
        operators = [fisher[name] for fisher in fishers]
        weights = [effective(model, own[name]) for model, own in zip(models, layers, strict=True)]
        weights = [weight.to(wide_dtype(weight.dtype, operators[0].dtype)) for weight in weights]
        for place, weight in enumerate(weights):
            check_finite(f"the weight of layer {name!r} in models[{place}]", weight)
        try:
            merged, steps, residual = _merged(operators, weights, shares, damping, tolerance, max_steps)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        # The residual of the recursion, by which it stops, and the true one part by some roundings.
        precision = torch.finfo(torch.promote_types(operators[0].dtype, torch.float32)).eps
        allowed = 10 * max(tolerance, 8 * precision)
        if not residual <= allowed:
            warnings.warn(
                f"layer {name!r}: the residual is {residual:.2g} of its start after {steps} steps; raise damping or "
                "max_steps",
                ConvergenceWarning,
                stacklevel=3,
            )
        found.weights[name], found.steps[name], found.residuals[name] = merged, steps, residual
    written = _write(models[0], layers[0], found.weights, state)
    plain = tuple(name for name in differing if name not in written)
    if plain:
        warnings.warn(
            f"{len(plain)} tensors have no Fisher, differ between the models and are averaged plainly: "
            f"{', '.join(plain[:6])}{' ...' if len(plain) > 6 else ''}; estimate the Fisher with layers that hold them",
            stacklevel=3,
        )
    return Merged(found.weights, plain, found.steps, found.residuals, state)


def input_grams(fisher: Curvature) -> dict[str, DenseOperator]:
    """The second moments A of every layer's inputs, as operators of the input side: what RegMean merges by.

    Jin et al. (2023, arXiv 2212.09849); the input factors of KFAC are these moments, means over the positions of a data set
    and not sums, so that data sets of unlike size count alike; pass ``shares=`` to :func:`merge_weights` for RegMean's sums.

    Args:
        fisher: Fisher of structure kfac, whose output factors are left aside.

    Returns:
        Layer -> operator of shape (q, q), side ``"input"``, of the dtype of the factors.

    Raises:
        ValueError: for a layer whose operator has no input factor that is a tensor.

    Examples:
        >>> one = fg.KroneckerOperator(torch.eye(2), 3 * torch.eye(2))
        >>> fg.input_grams({"layer": one})["layer"].to_dense().tolist()
        [[3.0, 0.0], [0.0, 3.0]]
    """
    grams = {}
    for name in fisher:
        factor = fisher[name].factors()[1]
        if not isinstance(factor, Tensor):
            raise ValueError(f"layer {name!r} has a {type(fisher[name]).__name__}; estimate structure='kfac'")
        grams[name] = DenseOperator(factor, "input")
    return grams


def _averages(models: Sequence[nn.Module], shares: Sequence[float]) -> tuple[dict[str, Tensor], list[str]]:
    """The mean of every tensor of the models' states, the first's where it is no real number, and which differ."""
    states = [model.state_dict() for model in models]
    ties = [_tied(model) for model in models]
    for place, state in enumerate(states):
        check_same_layers("models[0]", states[0], f"models[{place}]", state)
        if apart := sorted(ties[0] ^ ties[place], key=sorted):
            names = ", ".join(map(repr, sorted(apart[0])))
            raise ValueError(
                f"{names} are one tensor in only one of models[0] and models[{place}]; untie or tie them in both"
            )
    means, differing = {}, []
    for name, first in states[0].items():
        others = [state[name].to(first.device) for state in states]
        for place, other in enumerate(others):
            if other.shape != first.shape:
                raise ValueError(
                    f"{name} is {tuple(first.shape)} in models[0], {tuple(other.shape)} in models[{place}]"
                )
        means[name] = first.clone()
        if first.is_floating_point() and not all(torch.equal(first, other) for other in others):
            differing.append(name)
            means[name] = _mean(others, shares).to(first.dtype)
    return means, differing


def _tied(model: nn.Module) -> set[frozenset[str]]:
    """Sets of names that stand for one tensor."""
    names: dict[int, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    # From the first on, so that equal tensors average to themselves, to the bit.
    moves = [share / sum(shares) * (tensor - wide[0]) for share, tensor in zip(shares, wide, strict=True)]
    return wide[0] + torch.stack(moves).sum(0)


def _merged(
    operators: Sequence[SymmetricOperator],
    weights: Sequence[Tensor],
    shares: Sequence[float],
    damping: float,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, int, float]:
    """One layer's merged weight, steps and relative residual: the plain average W̄ plus (Σ F)⁺ Σ F_k(W_k − W̄)."""
    mean = _mean(weights, shares)
    rounding = torch.finfo(operators[0].dtype).eps
    diagonal = all(isinstance(operator, DiagonalOperator) for operator in operators)
    one_sided = all(isinstance(op, DenseOperator) and op.side == operators[0].side != "both" for op in operators)
    # Closed forms are found in float64 and rounded at the end: inputs of one large direction leave float32 nothing of the
    # others, and small Fishers leave it no product at all.
    if diagonal:
        operators = [DiagonalOperator(op.diagonal().double().reshape(mean.shape)) for op in operators]
    elif one_sided:
        operators = [DenseOperator(op.to_dense().double(), op.side) for op in operators]
    else:
        operators = [op.widened() for op in operators]
    dtype = operators[0].dtype
    away = [(weight - mean).to(dtype) for weight in weights]
    # Weights of the size of one: their product with a small Fisher is then no smaller than that is.
    span = torch.stack([one.abs().max() for one in away]).max()
    span = torch.where(span > 0, span, 1)

    def act(delta: Tensor) -> Tensor:
        parts = [share * operator.apply(delta) for share, operator in zip(shares, operators, strict=True)]
        return torch.stack(parts).sum(0) + damping * sum(shares) * delta

    pull = torch.stack([s * op.apply(one / span) for s, op, one in zip(shares, operators, away, strict=True)]).sum(0)
    size, steps = pull.abs().max(), 0
    if not bool(torch.isfinite(size)):
        raise ValueError(f"a Fisher has NaN, or is too large for products in {dtype}; scale all of them alike")
    least = torch.finfo(dtype).tiny
    if damping == 0 and (0 < size < least or (size == 0 and any(_vanishes(one) for one in operators))):
        raise ValueError(f"the Fishers are too small for products in {dtype}; scale all of them alike")
    if not bool(size > 0):
        return mean, 0, 0.0
    if diagonal:
        total = act(torch.ones_like(pull))
        step = torch.where(total > 0, pull / torch.where(total > 0, total, 1), 0)
    elif one_sided:
        dense = torch.stack([s * op.to_dense() for s, op in zip(shares, operators, strict=True)]).sum(0)
        dense = dense + damping * sum(shares) * torch.eye(len(dense), dtype=dense.dtype, device=dense.device)
        # What a Gram's own dtype rounded to nearly zero is a direction without curvature, not one of very little.
        floor = max(ROUNDINGS * rounding, len(dense) * torch.finfo(dtype).eps)
        inverse = torch.linalg.pinv(dense, rtol=floor, hermitian=True)
        step = inverse @ pull if operators[0].side == "output" else pull @ inverse
    else:
        # Of the size of one, as the right side is: the products of small or large Fishers with themselves leave float32.
        unit = act(pull / size).abs().max()
        if not bool(torch.isfinite(unit)):
            raise ValueError(f"the Fishers are too large for products in {dtype}; scale all of them alike")
        step, steps = conjugate_gradients(lambda delta: act(delta) / unit, pull / size, tolerance, max_steps)
        step = step * (size / unit)
    missing = torch.linalg.vector_norm((pull - act(step)) / size) / torch.linalg.vector_norm(pull / size)
    return mean + (span * step).to(mean.dtype), steps, float(missing)


def _vanishes(operator: SymmetricOperator) -> bool:
    """Whether a Kronecker product is zero in its dtype, which neither of its factors is."""
    if not isinstance(operator, FactoredKronecker):
        return False
    traces = [float(factor.trace()) for factor in operator.factors()]
    return 0 < traces[0] * traces[1] < torch.finfo(operator.dtype).tiny


def conjugate_gradients(
    act: Act, right: Tensor, tolerance: float, max_steps: int, precondition: Act = lambda x: x
) -> tuple[Tensor, int]:
    """The solution X of act(X) = right from X = 0, by conjugate gradients (Hestenes and Stiefel 1952), and its steps.

    Args:
        act: product with a symmetric positive semi-definite operator, of whose range ``right`` is.
        right: tensor of any shape.
        tolerance: residual at which it stops, relative to ``right``.
        max_steps: the most steps.
        precondition: product with an approximate inverse.
    """
    size = right.abs().amax() if right.numel() else right.new_zeros(())
    size = torch.where(size > 0, size, 1)  # squares of small or large numbers leave float32
    right = right / size
    solution, residual = torch.zeros_like(right), right.clone()
    direction = precondition(residual)
    inner = (residual * direction).sum()
    floor = max(tolerance, 8 * torch.finfo(right.dtype).eps) * torch.linalg.vector_norm(right)
    for step in range(max_steps):
        if bool(torch.linalg.vector_norm(residual) <= floor):
            return solution * size, step
        image = act(direction)
        length = inner / (direction * image).sum()
        if not bool(torch.isfinite(length)):
            return solution * size, step
        solution, residual = solution + length * direction, residual - length * image
        conditioned = precondition(residual)
        before, inner = inner, (residual * conditioned).sum()
        direction = conditioned + inner / before * direction
    return solution * size, max_steps


def _write(
    model: nn.Module, layers: Mapping[str, Layer], weights: Mapping[str, Tensor], state: dict[str, Tensor]
) -> set[str]:
    """Puts merged weights into the state of ``model``, and its adapters of these layers to zero; names that it wrote."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    written: set[str] = set()

    def into(parameter: Tensor) -> Tensor:
        written.update(names[id(parameter)])
        return state[names[id(parameter)][0]]

    for name, layer in layers.items():
        write_matrix(layer, weights[name], into)
        if adapter_factors(model, name):
            owner = name.removesuffix("base_layer")
            halves = [key for key in state if key.startswith(f"{owner}lora_")]
            for key in halves:
                if key.startswith(f"{owner}lora_B"):
                    state[key].zero_()
            written.update(halves)
    for several in names.values():
        for tied in several[1:]:
            state[tied] = state[several[0]]
    return written
