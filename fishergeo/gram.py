"""Sums of XᵀX, at half the arithmetic where BLAS offers it."""

from __future__ import annotations

from typing import Any

import scipy.linalg.blas
import torch
from torch import Tensor

_SYRK: dict[torch.dtype, Any] = {torch.float32: scipy.linalg.blas.ssyrk, torch.float64: scipy.linalg.blas.dsyrk}


def add_gram_(total: Tensor, rows: Tensor) -> None:
    """Adds XᵀX to the lower triangle of ``total``, in place; the upper one is left in no particular state.

    On the CPU by the symmetric rank-k update of BLAS, which takes half the multiplications of a product; elsewhere
    by a product. Read the sum with :func:`mirrored`.

    Args:
        total: (d, d), contiguous.
        rows: X, (m, d), the same dtype.
    """
    syrk = _SYRK.get(total.dtype)
    # A subclass (a shard, a tensor without storage) has no memory of its own to hand over.
    unfit = type(total) is not Tensor or total.device.type != "cpu" or len(rows) == 0 or not total.is_contiguous()
    if syrk is None or unfit or rows.requires_grad or total.requires_grad:
        total.addmm_(rows.T, rows)
        return
    # NumPy views of the transposes are in the Fortran order that BLAS wants, so nothing is copied; the upper triangle
    # in that order is the lower one of the tensor.
    columns = rows.contiguous().numpy().T
    target = total.numpy().T
    result = syrk(1.0, columns, beta=1.0, c=target, trans=0, lower=0, overwrite_c=1)
    if result.ctypes.data != target.ctypes.data:
        total.copy_(torch.from_numpy(result.T))


def mirrored(total: Tensor) -> Tensor:
    """The symmetric matrix whose lower triangle is that of ``total``; a new tensor."""
    lower = total.tril()
    return lower + lower.tril(-1).T
