"""What happens inside the forward of a module of stacked experts (E, ·, ·), expert by expert.

Such a module (transformers' MixtralExperts and its many kin) gathers the rows of the tokens that chose an expert and
multiplies them by that expert's slice of the parameter. A torch function mode, active during that forward alone, sees
both and hands each product to an observer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Observer = Callable[[str, int, Tensor, Tensor, int, Tensor], Tensor]
"""``(parameter, expert, rows (R, q), tokens (R,), total, output (R, p)) -> output`` to go on with."""

_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


class _Watch(TorchFunctionMode):
    """One run of the module's forward.

    Args:
        path: path of the module, for errors.
        weights: parameter name -> the tensor that the forward will slice.
        hidden: the tokens it will gather from, (N, width).
        observe: see :data:`Observer`.
    """

    def __init__(self, path: str, weights: dict[str, Tensor], hidden: Tensor, observe: Observer) -> None:
        super().__init__()
        self.path = path
        self.weights = weights
        self.hidden = hidden
        self.observe = observe
        self.tokens: Tensor | None = None
        self.slices: dict[str, tuple[Tensor, int]] = {}
        self.taken = dict.fromkeys(weights, 0)
        self.used = dict.fromkeys(weights, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__:
            self._indexed(args[0], args[1], output)
        elif (func is functional.linear or func in _PRODUCTS) and len(args) >= 2:
            for name, (weight, expert) in self.slices.items():
                if args[1] is weight:
                    return self._product(name, expert, args[0], output)
        return output

    def _indexed(self, source: Tensor, index: Any, output: Tensor) -> None:
        if source is self.hidden and isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.long:
            self.tokens = index
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        for name, weight in self.weights.items():
            if source is weight and single:
                self.slices[name] = (output, int(index))
                self.taken[name] += 1

    def _product(self, name: str, expert: int, rows: Tensor, output: Tensor) -> Tensor:
        if self.tokens is None or rows.ndim != 2 or len(rows) != len(self.tokens):
            raise self._refusal(name, "multiplies rows that cannot be traced to tokens")
        self.used[name] += 1
        return self.observe(name, expert, rows, self.tokens, len(self.hidden), output)

    def check(self) -> None:
        """Every slice must have met its product, and some slice must have been taken."""
        for name, taken in self.taken.items():
            if taken == 0:
                raise self._refusal(name, "is never sliced expert by expert")
            if taken != self.used[name]:
                raise self._refusal(name, "is sliced, but its slices are not used in a plain product")

    def _refusal(self, name: str, what: str) -> ValueError:
        return ValueError(
            f"layers: {self.path!r}: in its forward {name} {what}, so its experts cannot be captured; leave "
            f"'{self.path}.{name}.*' out of layers"
        )


@contextmanager
def watched(path: str, module: nn.Module, parameters: Collection[str], observe: Observer) -> Iterator[None]:
    """Within, every forward of ``module`` runs expert by expert under the observer's eyes.

    Args:
        path: path of the module, for errors.
        module: with parameters (E, ·, ·); where its config chooses between implementations (transformers'
            ``experts_implementation``), the eager one is taken for each call and the choice put back after it.
        parameters: names of those to watch.
        observe: see :data:`Observer`.

    Raises:
        ValueError: in the forward, where products cannot be told apart by expert or traced to tokens, by name.
    """
    replaced = module.__dict__.get("forward")
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        if hidden.ndim != 2:
            raise ValueError(
                f"layers: {path!r} reads tokens of shape {tuple(hidden.shape)}, not (tokens, width), so its experts "
                "cannot be captured; leave them out of layers"
            )
        # Under a parametrisation (peft's target_parameters) the attribute is the computed tensor, the same all along.
        watch = _Watch(path, {name: getattr(module, name) for name in parameters}, hidden, observe)
        with _eager(module), watch:
            output = original(*args, **kwargs)
        watch.check()
        return output

    module.forward = forward
    try:
        yield
    finally:
        if replaced is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = replaced


@contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    """The module's config asking for the loop over experts."""
    config = getattr(module, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    if config is None or chosen in (None, "eager"):
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = chosen
