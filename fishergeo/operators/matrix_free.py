"""Everything a symmetric operator may be given as, and many of them that are multiplied together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fishergeo._checks import check_finite, check_integer, check_symmetric, check_tensor
from fishergeo.operators.base import SymmetricOperator

Product = Callable[[Tensor], Tensor]

BlackBox: TypeAlias = SymmetricOperator | Tensor | Product | LinearOperator


class LayerProducts(Protocol):
    """Many symmetric operators whose products are made together, in one pass over the data.

    Any object with these members will do.

    Attributes:
        sizes: layer -> size of its operator.
        dtype: dtype of the products, a floating one.
        device: device of the products.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.eye(3), torch.zeros(3, 2))]
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        ...
        >>> stream = fg.StreamingFisher(model, batches, loss=loss)
        >>> stream.sizes
        {'': 2}
        >>> stream.multi_matmul({"": torch.eye(2)})[""].shape
        torch.Size([2, 2])
    """

    @property
    def sizes(self) -> Mapping[str, int]:
        """Layer -> size."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the products."""
        ...

    def multi_matmul(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer -> product with that layer's (size, c) block; only the layers in ``blocks`` are multiplied."""
        ...


@dataclass(frozen=True)
class EachOperator:
    """A mapping of single operators as :class:`LayerProducts`."""

    products: Mapping[str, Product]
    sizes: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device

    def multi_matmul(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One product each."""
        return {name: self.products[name](block.to(self.dtype)) for name, block in blocks.items()}


def black_box(
    op: BlackBox, size: int | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Product, int, torch.dtype, torch.device]:
    """Whatever acts on blocks, as (product, size, dtype, device).

    Args:
        op: an operator, a square tensor (dense or sparse), a SciPy LinearOperator of real numbers, or a function of a
            (size, c) block. Blocks are copied before and products after, so that neither an operator that works in place
            nor one that returns the same memory every time is seen to.
        size: size of a function; of anything else, its own or None.
        dtype: dtype of a function's blocks, float64 if left out.
        device: device of a function's blocks, the CPU if left out.

    Returns:
        (product, size, dtype, device).

    Raises:
        TypeError: for anything else, or a tensor that is not floating.
        ValueError: for a matrix that is not square, not symmetric, not finite or of another ``size``, or a function
            without ``size``.
    """
    if isinstance(op, SymmetricOperator | LinearOperator | Tensor):
        found = _of_matrix(op)
        if size is not None and size != found[1]:
            raise ValueError(f"size={size}, but op has size {found[1]}; size is for functions, leave it out")
        return found
    if not callable(op):
        raise TypeError(
            "op must be a SymmetricOperator, a square tensor, a SciPy LinearOperator or a function, got "
            f"{type(op).__name__}"
        )
    if size is None:
        raise ValueError("op is a function: pass size=, the number of rows of the blocks it takes")
    rows = check_integer("size", size, low=1)
    return _guarded(op), rows, dtype or torch.float64, torch.device(device or "cpu")


def _of_matrix(op: SymmetricOperator | LinearOperator | Tensor) -> tuple[Product, int, torch.dtype, torch.device]:
    if isinstance(op, SymmetricOperator):
        return _guarded(op.__matmul__), op.shape[0], op.dtype, op.device
    if isinstance(op, LinearOperator):
        return _of_scipy(op)
    if op.ndim != 2 or op.shape[0] != op.shape[1]:
        raise ValueError(f"op must be square, got shape {tuple(op.shape)}")
    check = check_symmetric if op.layout == torch.strided else _check_sparse
    matrix = check("op", op.detach())
    return matrix.__matmul__, matrix.shape[0], matrix.dtype, matrix.device


def _check_sparse(name: str, value: Tensor) -> Tensor:
    """As :func:`~fishergeo._checks.check_symmetric`, of what is stored alone."""
    matrix = check_tensor(name, value)
    whole = matrix.to_sparse_coo().double()  # since half precision has no sums of sparse tensors
    entries, skew = whole.coalesce().values(), (whole - whole.T).coalesce().values()
    check_finite(name, entries)
    if len(skew) and bool(skew.abs().max() > torch.finfo(matrix.dtype).eps ** 0.5 * entries.abs().max()):
        raise ValueError(f"{name} must be symmetric, the largest entry of |M − Mᵀ| is {float(skew.abs().max()):.3g}")
    return matrix


def _guarded(op: Product) -> Product:
    """The same operator, unable to change a block or a product that it gave before."""

    def product(block: Tensor) -> Tensor:
        result = op(block.clone())
        if not isinstance(result, Tensor) or result.shape != block.shape:
            found = tuple(result.shape) if isinstance(result, Tensor) else f"a {type(result).__name__}"
            raise ValueError(
                f"the operator returned {found} for a block of {tuple(block.shape)}; it must return a tensor of that shape"
            )
        return result.clone()

    return product


def _of_scipy(op: LinearOperator) -> tuple[Product, int, torch.dtype, torch.device]:
    rows, columns = op.shape
    if rows != columns:
        raise ValueError(f"op must be square, got shape {tuple(op.shape)}")
    numpy_dtype = np.dtype(op.dtype or np.float64)
    if numpy_dtype.kind == "c":
        raise TypeError(f"op must be real, got {numpy_dtype}")
    dtype = torch.float32 if numpy_dtype in (np.float32, np.float16) else torch.float64

    def product(block: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(op.matmat(block.numpy()))).to(block.dtype)

    return _guarded(product), rows, dtype, torch.device("cpu")
