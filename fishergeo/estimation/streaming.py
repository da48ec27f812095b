"""Operators that keep nothing: every product reads the data again, for all layers in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from fishergeo._checks import check_choice
from fishergeo.accumulators import Accumulator, DiagonalAccumulator, Layout, ProductAccumulator
from fishergeo.capture import LayerFilter, fingerprint, select_layers
from fishergeo.estimation.options import DataKeywords, DataOptions, check_sums_dtype, chosen_options
from fishergeo.estimation.sweep import Sweep
from fishergeo.operators import DENSE_LIMIT, SymmetricOperator, check_layer_shape, checked_rank

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


class StreamingFisher:
    """Layer name -> an operator whose every product is one pass over the data: F by its definition, never held.

    Indexed by layer it gives that layer's operator. It is no Mapping, lest an eigensolver multiplies layer by layer,
    a pass for each: :meth:`multi_matmul` takes a block for each of several layers and reads the data once for them
    all, one block step of an eigensolver for every layer. Nothing but the products is kept, so the memory does not
    grow with the data.

    Args:
        model: any module; left exactly as it was.
        batches: an iterable that can be read again and again (a list, a loader that does not shuffle), or a function
            that returns a fresh one. They must be the same in every pass.
        kind: whose labels an objective has, a field of :class:`fishergeo.DataOptions`; ``"empirical"`` by default.
            ``"mc"`` draws the same labels in every pass.
        data: options of the data; by default those that ``kind`` and ``keywords`` make.
        side: ``"output"``: 1/N Σ G_i G_iᵀ; ``"input"``: 1/N Σ G_iᵀ G_i; ``"both"``: 1/N Σ vec(G_i) vec(G_i)ᵀ.
        layers: names, globs or a predicate ``(name, module) -> bool``, as for :func:`fishergeo.estimate_fisher`. By
            default all, of which those that the first pass never calls are listed by one warning; their products are 0.
        dtype: dtype of products, float32 or float64; by default float64 for float64 models, else float32.
        progress: whether a progress bar is shown for every pass.
        verify: hold captured gradients against autograd's, as :func:`fishergeo.estimate_fisher` does, in the first pass that each layer takes part in.
        **keywords: fields of :class:`fishergeo.DataOptions` (``unit``, ``loss``, ``seed``, ...), in place of ``data``.

    Attributes:
        data: options of the data.
        sizes: layer -> p, q or pq.
        passes: number of passes over the data so far.
        traces: layer -> exact trace; filled by the first product that the layer takes part in.
        examples: N, known after the first pass.
        tokens: supervised tokens, likewise.

    Raises:
        ValueError: for unknown choices, patterns that match nothing, or a field of the data options beside ``data``.
        TypeError: if the batches can be read only once, or for an unknown keyword.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.eye(3), torch.zeros(3, 2))]
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        ...
        >>> stream = fg.StreamingFisher(model, batches, loss=loss)
        >>> stream[""].shape, (stream[""] @ torch.eye(2)).shape
        ((2, 2), torch.Size([2, 2]))
        >>> stream.passes
        1
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        kind: str | None = None,
        *,
        data: DataOptions | None = None,
        side: str = "output",
        layers: LayerFilter = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
        verify: bool = True,
        **keywords: Unpack[DataKeywords],
    ) -> None:
        self.data = chosen_options("StreamingFisher", data, kind, keywords)
        check_sums_dtype(dtype)
        self.side = check_choice("side", side, ("output", "input", "both"))
        if isinstance(batches, Iterator):
            raise TypeError(
                "batches is an iterator, which can be read only once; pass a list, a DataLoader, or a function that "
                "returns a fresh iterable"
            )
        self.model = model
        self.progress = progress
        self.verify = verify
        self.passes = 0
        self.traces: dict[str, float] = {}
        self.examples = self.tokens = 0.0
        self._batches = batches
        self.layers = select_layers(model, layers)
        weight = next(iter(self.layers.values())).weight
        self.dtype = dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        self.device = weight.device
        # Only the proof tells a layer that has no part in the objective from one that is read elsewhere.
        self._optional = layers is None and verify
        self._unreached: set[str] = set()
        self._layouts = {name: Layout(name, *layer.shape, self.data.unit, side) for name, layer in self.layers.items()}
        self.sizes: dict[str, int] = {name: layout.size for name, layout in self._layouts.items()}
        self._proven: set[str] = set()
        self._mark: str | None = None
        self._operators = {name: StreamingOperator(self, name) for name in self.layers}

    def __getitem__(self, name: str) -> StreamingOperator:
        return self._operators[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._operators)

    def __len__(self) -> int:
        return len(self._operators)

    @property
    def count(self) -> float:
        """What sums are divided by: examples or supervised tokens; 0 before the first pass."""
        return self.examples if self.data.unit == "sequence" else self.tokens

    def multi_matmul(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F @ block for every layer named, in one pass; layers that are left out are not computed.

        Args:
            blocks: layer -> (size, c).

        Returns:
            layer -> (size, c).

        Raises:
            KeyError: for a layer that is not there.
            ValueError: for a block of the wrong shape, or batches without a supervised token.
            RuntimeError: if the data are not those of the first pass, by their counts, or the model is not, by its
                fingerprint; if ``verify`` finds gradients
                that are not autograd's, or layers that are read without being called.
            FloatingPointError: naming the batch and the layer.
        """
        accumulators: dict[str, ProductAccumulator] = {}
        for name, block in blocks.items():
            if name not in self.sizes:
                raise KeyError(f"no layer {name!r} here; there are {', '.join(list(self.sizes)[:6])}")
            if block.ndim != 2 or len(block) != self.sizes[name]:
                raise ValueError(f"block of layer {name!r} must be ({self.sizes[name]}, c), got {tuple(block.shape)}")
            wide = block.detach().to(self.layers[name].weight.device, self.dtype).contiguous()
            accumulators[name] = ProductAccumulator.of(self._layouts[name], wide, name not in self.traces)
        self._pass(accumulators)
        for name, one in accumulators.items():
            if "trace" in one.sums:
                self.traces[name] = float(one.sums["trace"]) / self.count
        return {name: one.sums["product"] / self.count for name, one in accumulators.items()}

    def diagonals(self) -> dict[str, Tensor]:
        """The diagonal of every layer's two-sided Fisher, (p, q), in one pass, in the dtype of products."""
        empty = {
            name: DiagonalAccumulator.empty(self._layouts[name], self.dtype, layer.weight.device)
            for name, layer in self.layers.items()
        }
        self._pass(empty)
        return {name: accumulator.sums["squares"] / self.count for name, accumulator in empty.items()}

    def check_unmoved(self) -> None:
        """Refuse a model whose weights have changed since the first pass: what is known would be of two Fishers.

        Raises:
            RuntimeError: if they have.
        """
        mark = fingerprint(self.model)
        if self._mark is None:
            self._mark = mark
        elif mark != self._mark:
            raise RuntimeError(
                "the model's weights have changed since the first pass; make a new StreamingFisher of it as it is now"
            )

    def _pass(self, accumulators: Mapping[str, Accumulator]) -> None:
        """Feeds the accumulators once; only their layers get hooks, so back-propagation stops at the first of them."""
        named = accumulators.keys() - self._unreached
        layers = {name: layer for name, layer in self.layers.items() if name in named}
        self.check_unmoved()
        if not layers:
            return
        verify = self.verify and not self._proven.issuperset(layers)
        fed = {name: accumulators[name] for name in layers}
        sweep = Sweep(self.model, layers, {"": fed}, self.data, verify=verify, optional=self._optional)
        once = callable(self._batches) and not isinstance(self._batches, Iterable)
        sweep.run(cast(Any, self._batches)() if once else cast(Iterable[Any], self._batches), self.progress)
        if self.passes == 0:
            self.examples, self.tokens = sweep.examples, sweep.tokens
        elif (sweep.examples, sweep.tokens) != (self.examples, self.tokens):
            raise RuntimeError(
                f"batches changed between passes: {self.examples:g} examples of {self.tokens:g} tokens at first, "
                f"{sweep.examples:g} of {sweep.tokens:g} now; do not shuffle, sample or drop"
            )
        if sweep.read_elsewhere:
            raise RuntimeError(
                f"layers {sorted(sweep.read_elsewhere)[:4]} are not called, but the objective depends on their weights: "
                "name the layers that are to be read"
            )
        self.passes += 1
        self._proven |= set(layers)
        self._unreached |= layers.keys() - sweep.layers.keys()


class StreamingOperator(SymmetricOperator):
    """One layer of a :class:`StreamingFisher`.

    Args:
        fisher: that reads the data.
        name: name of the layer.
    """

    def __init__(self, fisher: StreamingFisher, name: str) -> None:
        super().__init__(fisher.sizes[name], fisher.dtype, fisher.layers[name].weight.device, fisher.side)
        self.fisher = fisher
        self.name = name
        self._diagonal: Tensor | None = None

    def _matmat(self, block: Tensor) -> Tensor:
        return _Streamed.apply(block, lambda x: self.fisher.multi_matmul({self.name: x})[self.name])  # type: ignore[no-untyped-call]

    def diagonal(self) -> Tensor:
        """(size,); one pass for the two-sided operator of all layers, a product with the identity for one side."""
        if self.side != "both":
            return self.to_dense().diagonal()
        return self._squares().flatten()

    def trace(self) -> Tensor:
        """Scalar; one pass, in which all layers' traces are found."""
        return self._squares().sum()

    def _squares(self) -> Tensor:
        self.fisher.check_unmoved()
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
        check_layer_shape(*self.fisher.layers[self.name].shape, rows, columns)


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
