"""Error bars on a trained model: the Laplace approximation whose precision is the Fisher and a prior."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishergeo._checks import check_integer, check_number
from fishergeo._linalg import gaussian
from fishergeo.capture import (
    adapter_factors,
    indexed,
    is_padded,
    most_examples,
    to_device,
    weight_matrix,
    write_matrix,
)
from fishergeo.estimation import DataOptions, Fisher, estimate_fisher, faults_shown
from fishergeo.operators import EigenKroneckerOperator, ExactOperator, SymmetricOperator
from fishergeo.uses.weights import Curvature, check_same_layers, checked_damping, effective, layers_of, settled

Outputs = Callable[[nn.Module, Any], Tensor]
"""``(model, batch) -> (n, C)``: the outputs whose error bars are asked for."""


class Laplace:
    r"""The Gaussian N(W, (N·F + τ·I)⁻¹) over the weights of the Fisher's layers, layer by layer.

    MacKay (1992); with KFAC Ritter et al. (2018); linearised predictions by Immer et al. (2021, arXiv 2008.08216); the
    form of Daxberger et al. (2021, arXiv 2106.14806). N·F is the curvature of the summed negative log-likelihood, so the
    Fisher should be of kind ``"ggn"`` or ``"type2"``, of ``reduction="sum"`` where an example has several tokens.

    Args:
        model: any module, at the weights that the Fisher is of.
        fisher: Fisher of any structure, or a mapping from layers to operators.
        prior_precision: τ, positive, of all layers, or layer -> τ.
        examples: number N of training examples; of a Fisher by default those that it has seen.

    Attributes:
        mean: layer -> the weights now, (p, q), of the dtype of its operator.
        examples: N.

    Raises:
        ValueError: a Fisher of another model, a prior that is not positive or lacks a layer, a mapping without
            ``examples``, or a sum that is singular to its precision; by name.
        TypeError: if examples or a prior is no real number.

    Examples:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> laplace = fg.Laplace(model, {"": fg.DiagonalOperator(torch.tensor([[3.0]]))}, prior_precision=1.0, examples=1)
        >>> laplace.predictive_covariance([torch.ones(1, 1)], lambda model, x: model(x)).tolist()  # 1/(1·3 + 1)
        [[[0.25]]]
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: Curvature,
        prior_precision: float | Mapping[str, float] = 1.0,
        examples: float | None = None,
    ) -> None:
        if examples is None:
            if not isinstance(fisher, Fisher):
                raise ValueError("examples= is needed with a mapping of operators, which has not counted them")
            examples = fisher.header.count
        self.model = model
        self.examples = check_number("examples", examples, low=1e-12)
        self._layers = layers_of(model, fisher)
        self.operators = {name: settled(fisher[name]) for name in self._layers}
        self.prior = self._checked_prior(prior_precision)
        self.mean = {
            name: effective(model, layer).detach().to(self.operators[name].dtype, copy=True)
            for name, layer in self._layers.items()
        }
        self._roots: dict[str, SymmetricOperator] = {}

    def _checked_prior(self, prior: float | Mapping[str, float]) -> dict[str, float]:
        each = dict(prior) if isinstance(prior, Mapping) else dict.fromkeys(self.operators, prior)
        check_same_layers("prior_precision", each, "fisher", self.operators)
        checked = {name: check_number("prior_precision", value, low=1e-300) for name, value in each.items()}
        for name, operator in self.operators.items():
            checked_damping(name, operator, checked[name], self.examples)
        return checked

    def _root(self, name: str) -> SymmetricOperator:
        """(F + τ/N·I)^−½, which times N^−½ is the root of the covariance."""
        if name not in self._roots:
            self._roots[name] = self.operators[name].power(-0.5, self.prior[name] / self.examples)
        return self._roots[name]

    def sample(self, count: int, seed: int = 0) -> dict[str, Tensor]:
        """Draws of the weights; the same for a seed on every device.

        Args:
            count: number of draws, at least 1.
            seed: any integer.

        Returns:
            Layer -> (count, p, q), of the dtype of its operator.

        Raises:
            ValueError: if count is less than 1.
            TypeError: if it is no integer.
        """
        check_integer("count", count, low=1)
        drawn = {}
        for name, mean in self.mean.items():
            noise = gaussian(mean.numel(), count, seed, name).T.reshape(count, *mean.shape).to(mean)
            drawn[name] = mean + self._root(name).apply(noise) / self.examples**0.5
        return drawn

    @contextlib.contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Within, the model has these weights; afterwards its own again, to the bit.

        Args:
            weights: layer -> (p, q), any floating dtype, such as one draw of :meth:`sample`.

        Raises:
            ValueError: for a layer that the Fisher does not have, or a weight of another shape.
        """
        if unknown := sorted(set(weights) - set(self._layers)):
            raise ValueError(f"weights names layers that this Fisher does not have: {', '.join(map(repr, unknown))}")
        for name, weight in weights.items():
            if weight.shape != self.mean[name].shape:
                raise ValueError(
                    f"weights[{name!r}] must be {tuple(self.mean[name].shape)}, outputs by inputs, not {tuple(weight.shape)}"
                )
        with torch.no_grad():
            before = {name: weight_matrix(self._layers[name]).clone() for name in weights}
        try:
            for name, weight in weights.items():
                with torch.no_grad():
                    for left, right in adapter_factors(self.model, name):
                        weight = weight - left @ right
                write_matrix(self._layers[name], weight)
            yield self.model
        finally:
            for name, weight in before.items():
                write_matrix(self._layers[name], weight)

    def log_marginal_likelihood(
        self, log_likelihood: float, prior_precision: float | Mapping[str, float] | None = None
    ) -> float:
        r"""Log p(data) ≈ log p(data | W) + Σ_l (½ d log τ − ½ τ‖W‖² − ½ log det(N·F + τ·I)), in nats.

        Args:
            log_likelihood: log p(data | W), the sum over the training examples, in nats.
            prior_precision: another τ than the one at hand, to compare several; None for that one.

        Raises:
            ValueError: for a prior that is not positive, lacks a layer, or leaves one singular to the precision of its
                dtype, whose determinant then says nothing.
        """
        prior = self.prior if prior_precision is None else self._checked_prior(prior_precision)
        total = log_likelihood
        for name, operator in self.operators.items():
            tau, size = prior[name], self.mean[name].numel()
            copies = size // operator.shape[0]  # of a one-sided operator, which acts on every row or column alike
            volume = size * math.log(self.examples) + copies * float(operator.logdet(tau / self.examples))
            total += 0.5 * (size * math.log(tau) - tau * float(self.mean[name].double().square().sum()) - volume)
        return total

    def predictive_covariance(self, batches: Iterable[Any], outputs: Outputs) -> Tensor:
        r"""J Σ Jᵀ of every example: the covariance of the outputs of the model made linear in its weights.

        One forward and backward pass for each output; gradients are formed for one layer at a time.

        Args:
            batches: inputs, in batches as the model takes them.
            outputs: function ``(model, batch) -> (n, C)``.

        Returns:
            (n, C, C) over all batches, of the dtype of the operators.

        Raises:
            ValueError: no batch, or outputs that are not (n, C).
        """
        device = next(iter(self._layers.values())).weight.device
        found, proven = [], frozenset[str]()
        for _, batch in indexed(batches):
            shown = faults_shown(is_padded(self.model, batch), most_examples(batch))
            found.append(self._covariance(to_device(batch, device), outputs, not shown <= proven))
            proven |= shown
        if not found:
            raise ValueError("batches hold no batch")
        return torch.cat(found)

    def _covariance(self, batch: Any, outputs: Outputs, verify: bool) -> Tensor:
        gradients: list[Fisher] = []
        width = 1
        while len(gradients) < width:

            def one(model: nn.Module, batch: Any, column: int = len(gradients)) -> Tensor:
                nonlocal width
                out = outputs(model, batch)
                if out.ndim != 2:
                    raise ValueError(f"outputs gave shape {tuple(out.shape)}; they must be (n, C)")
                width = out.shape[1]
                return out[:, column]

            options = DataOptions(loss=one)
            dtype = next(iter(self.operators.values())).dtype
            gradients.append(
                estimate_fisher(
                    self.model, [batch], "exact", data=options, layers=list(self._layers), dtype=dtype,
                    verify=verify and not gradients,
                )
            )  # fmt: skip
        total: Tensor | None = None
        for name in self._layers:
            rows = []
            for fisher in gradients:
                operator = fisher[name]
                assert isinstance(operator, ExactOperator)
                rows.append(_whitened(self._root(name), operator))
            stacked = torch.stack(rows, 1)
            part = stacked @ stacked.mT / self.examples
            total = part if total is None else total + part
        assert total is not None
        return total


def _whitened(root: SymmetricOperator, gradients: ExactOperator) -> Tensor:
    """Rows whose inner products are those of root·vec(G_i), (n, pq).

    A root in Kronecker eigenbases turns the two factors of a gradient, not the gradient, and need not turn it back.
    """
    if not isinstance(root, EigenKroneckerOperator):
        return root.apply(gradients.weight_gradients()).flatten(1)
    turned = {"gradients": gradients.gradients @ root.output_basis, "inputs": gradients.inputs @ root.input_basis}
    return (ExactOperator.from_tensors(gradients.tensors() | turned).weight_gradients() * root.values).flatten(1)
