"""Orthonormal blocks: reorthogonalisation against a basis, and random directions that no device changes."""

from __future__ import annotations

import torch
from torch import Tensor

from fishergeo.sketch import gaussian


def directions(size: int, columns: int, seed: int, name: str, first: int = 0) -> Tensor:
    """Gaussian columns of expected norm one, each with a counter of its own.

    Column ``first + j`` depends on seed, name and that number only: neither on the device nor on how many are drawn.

    Args:
        size: rows.
        columns: how many.
        seed: any integer.
        name: of the layer.
        first: counter of the first.

    Returns:
        (size, columns), float64, on the CPU.
    """
    drawn = [gaussian(size, 1, seed, f"{name}#{first + j}").double() for j in range(columns)]
    return torch.cat(drawn, 1) / size**0.5 if drawn else torch.zeros(size, 0, dtype=torch.float64)


def orthonormalise(block: Tensor, basis: Tensor, floor: float) -> Tensor:
    """Orthonormal columns that span what ``block`` adds to ``basis``; directions below ``floor`` are dropped.

    Gram-Schmidt, twice, until the *absolute* inner products with the basis are at rounding level.

    Args:
        block: (size, c).
        basis: (size, m), orthonormal, m may be 0.
        floor: singular values of the remainder that count as rounding.

    Returns:
        (size, r), r ≤ c.
    """
    work = block
    limit = 4 * torch.finfo(block.dtype).eps * len(block) ** 0.5
    for attempt in range(5):
        for _ in range(2):
            work = work - basis @ (basis.T @ work)
        work, triangle = torch.linalg.qr(work)
        if attempt == 0:
            left, singular, _ = torch.linalg.svd(triangle.cpu().double())
            work = work @ left[:, singular > floor].to(work)
        if work.shape[1] == 0 or basis.shape[1] == 0 or float((basis.T @ work).abs().max()) <= limit:
            break
    return work.contiguous()
