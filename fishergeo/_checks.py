"""Checks of arguments that the geometry modules share: each names the argument, what is wrong and what to do."""

import numbers
from typing import Any

import torch

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)


def check_tensor(name: str, value: object, *, min_dim: int = 0) -> torch.Tensor:
    """Return `value` if it is a strided real floating tensor with at least `min_dim` dimensions, none of them empty.

    Args:
        name: the argument's name, for the message.
        value: value that the caller passed.
        min_dim: the fewest dimensions allowed.

    Returns:
        The same tensor.

    Raises:
        TypeError: not a tensor, or not of dtype float16, bfloat16, float32 or float64.
        ValueError: too few dimensions, or a dimension of size zero.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be a real floating tensor, got {value.dtype}; convert it with .to(torch.float32)")
    if value.ndim < min_dim:
        raise ValueError(f"{name} must have at least {min_dim} dimensions, got shape {tuple(value.shape)}")
    if 0 in value.shape:
        raise ValueError(f"{name} is empty: shape {tuple(value.shape)}")
    return value


def check_same_kind(first_name: str, first: Any, second_name: str, second: Any) -> None:
    """Refuse two arrays that do not share dtype and device; anything with `.dtype` and `.device` can be compared.

    Raises:
        TypeError: the dtypes differ.
        ValueError: the devices differ.
    """
    if first.dtype != second.dtype:
        raise TypeError(
            f"{first_name} is {first.dtype} but {second_name} is {second.dtype}; convert one with .to(dtype)"
        )
    if first.device != second.device:
        raise ValueError(
            f"{first_name} is on {first.device} but {second_name} is on {second.device}; move one with .to(device)"
        )


def check_finite(name: str, value: torch.Tensor) -> None:
    """Refuse NaN and infinity, and a tensor of the meta device, of which nobody can say.

    Raises:
        ValueError: `value` has entries that are not finite, or no entries at all.
    """
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device and has no entries; load it first")
    # A finite sum has finite terms, and takes no memory; only where it is not finite are the entries looked at.
    if bool(torch.isfinite(value.detach().sum())):
        return
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        count = int((~finite).sum())
        raise ValueError(f"{name} has {count} entries that are NaN or infinite, of {value.numel()}")


def check_integer(name: str, value: object, *, low: int, high: int | None = None) -> int:
    """Return `value` as an int if it is an integer, numpy's too, in [low, high].

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = int(value)
    if number < low or (high is not None and number > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name} must be at least {low}{upper}, got {value}")
    return number


def check_number(name: str, value: object, *, low: float = float("-inf"), high: float = float("inf")) -> float:
    """Return `value` as a float if it is a finite real number in [low, high].

    Raises:
        TypeError: not a real number.
        ValueError: NaN, infinite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    number = float(value)
    if not (low <= number <= high) or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be a finite number in [{low:g}, {high:g}], got {value}")
    return number


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {name}={value!r}")
    return value


def check_not_negative(name: str, value: torch.Tensor) -> None:
    """Refuse negative entries.

    Raises:
        ValueError: the least entry is negative; the message prints it.
    """
    if bool((value < 0).any()):
        raise ValueError(f"{name} must not be negative, the least is {value.min().item():.3g}; clamp them first")


def check_descending(name: str, value: object) -> torch.Tensor:
    """Return `value` if it is one finite descending sequence.

    Raises:
        TypeError: not a floating tensor.
        ValueError: not one dimension, empty, NaN or infinite, or not descending.
    """
    values = check_tensor(name, value, min_dim=1)
    if values.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(values.shape)}")
    check_finite(name, values)
    if bool((values[1:] > values[:-1]).any()):
        raise ValueError(f"{name} must be descending; sort them with .sort(descending=True).values")
    return values


def check_symmetric(name: str, value: object) -> torch.Tensor:
    """Return `value` if it is a batch of finite symmetric matrices, each to the square root of epsilon of its size.

    Raises:
        TypeError: not a floating tensor.
        ValueError: not square, NaN or infinite, or not symmetric; the message prints the defect.
    """
    matrix = check_tensor(name, value, min_dim=2)
    if matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name} must be square, got shape {tuple(matrix.shape)}")
    check_finite(name, matrix)
    plain = matrix.detach()
    defect, size = (part.abs().amax((-2, -1)) for part in (plain - plain.mT, plain))
    wrong = defect > torch.finfo(matrix.dtype).eps ** 0.5 * size
    if bool(wrong.any()):
        raise ValueError(f"{name} must be symmetric, the largest entry of |M − Mᵀ| is {float(defect[wrong].max()):.3g}")
    return matrix


def check_broadcast(first_name: str, first: torch.Size, second_name: str, second: torch.Size) -> torch.Size:
    """Return what two batch shapes broadcast to.

    Raises:
        ValueError: they do not broadcast.
    """
    try:
        return torch.broadcast_shapes(first, second)
    except RuntimeError:
        raise ValueError(
            f"{first_name} has batch shape {tuple(first)} and {second_name} {tuple(second)}, which do not broadcast"
        ) from None


def check_generator(name: str, value: object) -> torch.Generator:
    """Return `value` if it is a random generator.

    Raises:
        TypeError: it is not; a seed is not enough.
    """
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator, got {type(value).__name__}")
    return value


def orthonormality_defect(basis: torch.Tensor) -> float:
    """Largest entry of |UᵀU − I| over the batch, computed in float32 or wider.

    Args:
        basis: shape (..., p, m).

    Returns:
        The defect; 0 for m = 0.
    """
    wide = basis.detach().to(torch.promote_types(basis.dtype, torch.float32))
    gram = wide.mT @ wide
    if gram.numel() == 0:
        return 0.0
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return float(gram.abs().max())


def check_basis(name: str, basis: object) -> torch.Tensor:
    """Return `basis` if its columns are orthonormal: to 1e-5, or the square root of its dtype's epsilon if larger.

    Args:
        name: the argument's name, for the message.
        basis: shape (..., p, m), m from 0 to p.

    Raises:
        TypeError: not a floating tensor.
        ValueError: fewer than two dimensions, more columns than rows, NaN or infinity, or columns that are not
            orthonormal; the message prints the defect.
    """
    if isinstance(basis, torch.Tensor) and basis.ndim >= 2 and basis.shape[-1] == 0:
        check_tensor(name, basis.new_zeros(*basis.shape[:-1], 1), min_dim=2)
        return basis
    checked = check_tensor(name, basis, min_dim=2)
    if checked.shape[-1] > checked.shape[-2]:
        raise ValueError(
            f"{name} has shape {tuple(checked.shape)}: more columns than rows cannot be orthonormal; is it transposed?"
        )
    check_finite(name, checked)
    # In float64, 1e-5 lets a basis pass that was computed in float32.
    defect, allowed = orthonormality_defect(checked), max(torch.finfo(checked.dtype).eps ** 0.5, 1e-5)
    if defect > allowed:
        raise ValueError(
            f"{name} is not orthonormal: the largest entry of |UᵀU − I| is {defect:.3g}, allowed is {allowed:.1g} for "
            f"{checked.dtype}; orthonormalise its columns, e.g. with torch.linalg.qr({name}).Q"
        )
    return checked


def refuse_second_order(name: str) -> None:
    """Refuse a backward pass with create_graph=True through a function whose gradient is written by hand.

    torch's once_differentiable lets such a pass through when the incoming gradient is a constant, and would then take
    the outgoing one for a constant too: a silently wrong second derivative.

    Args:
        name: the public function, for the message.

    Raises:
        RuntimeError: always, inside a backward pass with create_graph=True.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivatives: call backward without create_graph=True")
