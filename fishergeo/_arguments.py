"""Checks of arguments that the geometry modules share: each names the argument, what is wrong and what to do."""

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object, *, min_dim: int = 0) -> torch.Tensor:
    """Return `value` if it is a strided real floating tensor with at least `min_dim` dimensions, none of them empty.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
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


def check_same_kind(first_name: str, first, second_name: str, second) -> None:
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
    """Refuse NaN and infinity.

    Raises:
        ValueError: `value` has entries that are not finite.
    """
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        count = int((~finite).sum())
        raise ValueError(f"{name} has {count} entries that are NaN or infinite, of {value.numel()}")


def check_integer(name: str, value: object, *, low: int, high: int | None = None) -> int:
    """Return `value` if it is an integer in [low, high].

    Raises:
        TypeError: not an int.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name} must be at least {low}{upper}, got {value}")
    return value


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
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
