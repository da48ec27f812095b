"""Steps by the natural gradient: an optimizer of torch whose gradients the Fisher's inverse turns first."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fishergeo.capture import Layer, gradient_matrix, layer_parameters, write_matrix
from fishergeo.operators import SymmetricOperator
from fishergeo.uses.weights import Curvature, damped_inverse, layers_of

_AT_WORK: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.WeakSet[NaturalGradient]] = (
    weakref.WeakKeyDictionary()
)


class NaturalGradient:
    """What :func:`fishergeo.natural_gradient` puts before every step of an optimizer.

    Args:
        model: any module.
        optimizer: optimizer over its parameters.
        damping: number added to every eigenvalue.

    Attributes:
        inverses: layer -> (F + damping·I)⁻¹.

    Raises:
        TypeError: for L-BFGS.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> natural = fg.natural_gradient(model, {"": fg.DiagonalOperator(torch.tensor([[1.0, 4.0]]))}, optimizer)
        >>> natural.remove()  # plain steps from here on
        >>> [round(value, 2) for value in natural.inverses[""].diagonal().tolist()]
        [1.0, 0.25]
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, damping: float) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "optimizer is LBFGS, which learns the curvature from gradients of its loss, and turned ones are of none; "
                "use SGD, or LBFGS without a natural gradient"
            )
        self.model = model
        self.optimizer = optimizer
        self.damping = damping
        self.inverses: dict[str, SymmetricOperator] = {}
        self._layers: dict[str, Layer] = {}
        self._plain: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(lambda *_: self._restore()),
        ]
        _AT_WORK.setdefault(optimizer, weakref.WeakSet()).add(self)

    def refresh(self, fisher: Curvature) -> None:
        """Takes another Fisher, of the model as it is now.

        Args:
            fisher: Fisher of the model, or a mapping from layers to operators.

        Raises:
            ValueError: as :func:`fishergeo.natural_gradient`.
            TypeError: if damping is no real number.
        """
        layers = layers_of(self.model, fisher)
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        others = [other for other in _AT_WORK[self.optimizer] if other is not self]
        turned = {id(p) for other in others for layer in other._layers.values() for p in layer_parameters(layer)}
        for name, layer in layers.items():
            parameters = layer_parameters(layer)
            if any(id(parameter) not in stepped for parameter in parameters):
                raise ValueError(f"the optimizer has no weight of layer {name!r}; leave the layer out of the Fisher")
            if any(id(parameter) in turned for parameter in parameters):
                raise ValueError(
                    f"layer {name!r} has a natural gradient on this optimizer already; refresh() that one, or remove() it first"
                )
            if len({parameter.requires_grad for parameter in parameters}) > 1:
                raise ValueError(
                    f"layer {name!r} joins a weight and a bias of which only one trains; estimate the Fisher of that one "
                    "alone, or let both train"
                )
        self.inverses = {name: damped_inverse(name, fisher[name], self.damping) for name in layers}
        self._layers = layers

    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What torch calls with the arguments of ``optimizer.step``, the optimizer first, to have them changed or not."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._turn()
            return None
        if "closure" in kwargs:
            return args, {**kwargs, "closure": self._turning(closure)}
        return (args[0], self._turning(closure), *args[2:]), kwargs

    def _turning(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The same closure, whose gradients are turned once it has made them: those from before it are not the step's."""

        def evaluate() -> Any:
            self._restore()
            loss = closure()
            self._turn()
            return loss

        return evaluate

    @torch.no_grad()
    def _turn(self) -> None:
        for name, inverse in self.inverses.items():
            gradient = gradient_matrix(self._layers[name])
            if gradient is not None:
                for parameter in layer_parameters(self._layers[name]):
                    if id(parameter) not in self._plain:  # which experts of one stack share
                        grad = cast(Tensor, parameter.grad)
                        self._plain[id(parameter)] = grad, grad.clone()
                write_matrix(self._layers[name], inverse.apply(gradient), lambda parameter: parameter.grad)  # type: ignore[arg-type, return-value]

    @torch.no_grad()
    def _restore(self) -> None:
        """Puts back what was turned, so that gradients that are kept are not turned twice."""
        for grad, plain in self._plain.values():
            grad.copy_(plain)
        self._plain.clear()

    def remove(self) -> None:
        """Leaves the optimizer to its own gradients again."""
        for handle in self._handles:
            handle.remove()
        _AT_WORK[self.optimizer].discard(self)


def natural_gradient(
    model: nn.Module, fisher: Curvature, optimizer: torch.optim.Optimizer, damping: float = 0.0
) -> NaturalGradient:
    """Makes every step of an optimizer one along (F + damping·I)⁻¹ ∇L, layer by layer.

    The natural gradient of Amari (1998), with KFAC that of Martens and Grosse (2015). The optimizer stays what it is:
    schedules, momentum and checkpoints work on the turned gradients; those of a closure are turned after each of its
    calls. After a step ``.grad`` holds what it held before. The Fisher stays fixed until :meth:`NaturalGradient.refresh`. Made for experiments: there is no rescaling, no
    trust region and no running average.

    Args:
        model: any module.
        fisher: Fisher of the model as it is now, any structure, or a mapping from layers to operators.
        optimizer: optimizer over the model's parameters; :class:`torch.optim.SGD` gives the plain natural gradient.
            :class:`torch.optim.LBFGS` cannot be turned.
        damping: number added to every eigenvalue, not negative.

    Returns:
        NaturalGradient: a handle, to refresh the Fisher or to take it away.

    Raises:
        ValueError: a Fisher of another model, a layer whose weight the optimizer does not step or that has a natural gradient
            on it already, one whose weight and bias
            are joined while only one trains, or a damping that leaves a layer singular; by name.
        TypeError: for L-BFGS, or if damping is no real number.

    Warns:
        UserWarning: naming parameters of the optimizer without a Fisher, which keep their plain gradient.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> natural = fg.natural_gradient(model, {"": fg.DiagonalOperator(torch.tensor([[1.0, 4.0]]))}, optimizer)
        >>> before = model.weight.detach().clone()
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 2) for value in (before - model.weight.detach())[0].tolist()]
        [1.0, 0.25]
    """
    natural = NaturalGradient(model, optimizer, damping)
    try:
        natural.refresh(fisher)
    except BaseException:
        natural.remove()
        raise
    turned = {id(parameter) for layer in natural._layers.values() for parameter in layer_parameters(layer)}
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    plain = [n for n, p in model.named_parameters() if id(p) in stepped - turned]
    if plain:
        warnings.warn(
            f"{len(plain)} parameters have no Fisher and keep their plain gradient: {', '.join(plain[:6])}"
            f"{' ...' if len(plain) > 6 else ''}",
            stacklevel=2,
        )
    return natural
