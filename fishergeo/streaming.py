"""Operators that keep nothing: every product reads the data again, for all layers in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fishergeo.accumulators import Accumulator, Layout, Shared
from fishergeo.layer_operators import check_layer_shape
from fishergeo.layers import LayerFilter, select_layers
from fishergeo.losses import KINDS, LossFunction
from fishergeo.moment_accumulators import DiagonalAccumulator
from fishergeo.records import Record
from fishergeo.sketch_accumulator import rows_product
from fishergeo.structures import SIDES, UNITS, check_choice
from fishergeo.sweep import DataOptions, Sweep
from fishergeo.symmetric_operator import SymmetricOperator, checked_rank
from fishergeo.weights import WeightSource

DENSE_LIMIT = 8192
"""The largest operator whose eigenpairs are found by making it dense."""


class ProductAccumulator(Accumulator):
    """Σ F_i X for a fixed block X: of vec(G) vec(G)ᵀ (``layout.side == "both"``), G Gᵀ or Gᵀ G.

    Two-sided, the weight gradient of each example is formed: 2Tpq multiplications, as in an ordinary backward pass,
    and 2pq for every column, against 4Tpq for every column without it.
    """

    def __init__(self, layout: Layout, sums: dict[str, Tensor], block: Tensor) -> None:
        super().__init__(layout, sums)
        self.block = block

    @classmethod
    def expected(cls, layout: Layout) -> dict[str, tuple[int | None, ...]]:
        """The product."""
        return {"product": (layout.p * layout.q if layout.side == "both" else layout.size, None)}

    @classmethod
    def of(cls, layout: Layout, block: Tensor) -> ProductAccumulator:
        """The product with no data."""
        return cls(layout, {"product": torch.zeros_like(block)}, block)

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer."""
        total = self.sums["product"]
        if self.layout.side == "both":
            a, d = self._cast(record, shared)
            for start in range(0, len(d), 8):  # a few at a time, which stay in the cache
                g = torch.bmm(d[start : start + 8].mT, a[start : start + 8]).flatten(1)
                total.addmm_(g.T, g @ self.block)
            return
        near, far, kernel = self._near_and_far(record, shared)
        if near.shape[1] * (near.shape[2] + far.shape[2]) <= near.shape[2] * far.shape[2]:
            total += rows_product(near, torch.bmm(kernel(), near @ self.block))
        else:
            g = torch.bmm(near.mT, far)
            total += torch.bmm(g, g.mT @ self.block).sum(0)


class StreamingFisher(Mapping[str, SymmetricOperator]):
    """Layer name -> an operator whose every product is one pass over the data.

    :meth:`products` takes a block for each of several layers and reads the data once for them all: one block step of
    an eigensolver for every layer. Nothing but the products is kept, so the memory does not grow with the data.

    Args:
        model: as in :func:`fishergeo.estimate_fisher`.
        batches: an iterable that can be read again and again and gives the same batches.
        side: ``"both"``: 1/N Σ vec(G_i) vec(G_i)ᵀ; ``"output"``: 1/N Σ G_i G_iᵀ; ``"input"``: 1/N Σ G_iᵀ G_i.
        kind: as in :func:`fishergeo.estimate_fisher`; "mc" draws the same labels in every pass.
        unit: the same.
        layers: the same.
        loss: the same.
        seed: of sampled labels.
        dtype: of products; float64 for float64 models, else float32, if None.
        token_weights: as in :func:`fishergeo.estimate_fisher`.
        example_weights: the same.
        max_draws: the same.
        progress: a progress bar for every pass.

    Attributes:
        passes: how many times the data have been read.

    Raises:
        ValueError: for unknown choices, or patterns that match nothing.
        TypeError: if the batches can be read only once.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        side: str = "both",
        kind: str = "empirical",
        unit: str = "sequence",
        layers: LayerFilter = None,
        loss: LossFunction | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        token_weights: WeightSource = None,
        example_weights: WeightSource = None,
        max_draws: int = 256,
        progress: bool = False,
    ) -> None:
        check_choice("side", side, ("both", *SIDES))
        check_choice("kind", kind, KINDS)
        check_choice("unit", unit, UNITS)
        if isinstance(batches, Iterator):
            raise TypeError(
                "batches are read once for every product, and these can be read once; pass a list or loader"
            )
        self.model = model
        self.batches = batches
        self.side = side
        self.dtype = dtype
        self.progress = progress
        self.passes = 0
        self._options = DataOptions(kind, unit, loss, token_weights, example_weights, max_draws=max_draws, seed=seed)
        self._layers = select_layers(model, layers)
        self._layouts = {name: Layout(name, *layer.shape, unit, side) for name, layer in self._layers.items()}
        self._operators = {name: StreamingOperator(self, name) for name in self._layers}

    def __getitem__(self, name: str) -> StreamingOperator:
        return self._operators[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._operators)

    def __len__(self) -> int:
        return len(self._operators)

    def products(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F X for a block of every layer named, in one pass; layers not named are not captured.

        Args:
            blocks: layer -> (size,) or (size, k).

        Returns:
            layer -> the product, of the same shape.

        Raises:
            KeyError: for a layer that is not among the chosen.
            ValueError: if a block does not fit.
        """
        accumulators: dict[str, Accumulator] = {}
        for name, block in blocks.items():
            operator = self._operators[name]
            if block.ndim not in (1, 2) or len(block) != operator.shape[0]:
                raise ValueError(
                    f"layer {name!r}: block {tuple(block.shape)} does not fit an operator {operator.shape}"
                )
            wide = block.detach().to(operator.device, operator.dtype).reshape(len(block), -1).contiguous()
            accumulators[name] = ProductAccumulator.of(self._layouts[name], wide)
        count = self._pass(accumulators)
        return {
            name: (accumulators[name].sums["product"] / count).reshape(block.shape) for name, block in blocks.items()
        }

    def diagonals(self) -> dict[str, Tensor]:
        """The diagonal of every layer's two-sided Fisher, (p, q), in one pass; sums over it are those of any side."""
        empty = {
            name: DiagonalAccumulator.empty(self._layouts[name], operator.dtype, operator.device)
            for name, operator in self._operators.items()
        }
        count = self._pass(empty)
        return {name: accumulator.sums["squares"] / count for name, accumulator in empty.items()}

    def _pass(self, accumulators: dict[str, Accumulator]) -> float:
        """Feeds the accumulators; returns the units."""
        layers = {name: layer for name, layer in self._layers.items() if name in accumulators}
        sweep = Sweep(self.model, layers, {"": accumulators}, self._options)
        self.passes += 1
        sweep.run(self.batches, self.progress)
        return sweep.examples if self._options.unit == "sequence" else sweep.tokens


class StreamingOperator(SymmetricOperator):
    """One layer of a :class:`StreamingFisher`.

    Args:
        fisher: that reads the data.
        name: of the layer.
    """

    def __init__(self, fisher: StreamingFisher, name: str) -> None:
        self.fisher = fisher
        self.name = name
        self.side = fisher.side
        self._weight = fisher._layers[name].weight
        self._diagonal: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(pq, pq), (p, p) or (q, q)."""
        p, q = self.fisher._layers[self.name].shape
        size = {"both": p * q, "output": p, "input": q}[self.side]
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        return self.fisher.dtype or (torch.float64 if self._weight.dtype == torch.float64 else torch.float32)

    @property
    def device(self) -> torch.device:
        """The device of products."""
        return self._weight.device

    def _matmat(self, block: Tensor) -> Tensor:
        return _Streamed.apply(block, lambda x: self.fisher.products({self.name: x})[self.name])  # type: ignore[no-untyped-call]

    def diagonal(self) -> Tensor:
        """(size,); one pass for the two-sided operator of all layers, a product with the identity for one side."""
        if self.side != "both":
            return self.to_dense().diagonal()
        return self._squares().flatten()

    def trace(self) -> Tensor:
        """Scalar; one pass, in which all layers' traces are found."""
        return self._squares().sum()

    def _squares(self) -> Tensor:
        if self._diagonal is None:
            for name, squares in self.fisher.diagonals().items():
                self.fisher[name]._diagonal = squares
        return cast(Tensor, self._diagonal)

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """By one pass with the identity, where the operator is small; see :class:`SymmetricOperator`.

        Raises:
            ValueError: if it is not: an eigensolver that needs products only is then the way.
        """
        checked_rank(k, self.shape[0])
        if self.shape[0] > DENSE_LIMIT:
            raise ValueError(
                f"layer {self.name!r}: an operator of size {self.shape[0]} is not made dense; hand it to an "
                "eigensolver that needs products only, or estimate structure='exact'"
            )
        return super().eigh(k)

    def _check_delta(self, rows: int, columns: int) -> None:
        check_layer_shape(*self.fisher._layers[self.name].shape, rows, columns)


class _Streamed(torch.autograd.Function):
    """A symmetric product: its backward is the product with the upstream gradient, another pass."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.product = product
        return product(block)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.product(upstream), None
