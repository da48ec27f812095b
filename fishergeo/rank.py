"""How many leading directions of a spectrum to keep."""

from collections.abc import Sequence

import torch

from fishergeo._checks import check_descending, check_not_negative, check_number


def rank_for_energy(
    values: torch.Tensor | Sequence[float], total: float | torch.Tensor | None = None, energy: float = 0.8
) -> int:
    """Smallest m whose m leading values hold at least the share `energy` of the total.

    The rule of AlignGuard-LoRA (arXiv 2508.02079): the protected rank holds at least 80 % of the Fisher's trace.

    Args:
        values: leading eigenvalues, shape (k,), any floating dtype, descending, not negative.
        total: the trace that they are a share of, a number or scalar tensor; their sum when left out.
        energy: the share, in (0, 1].

    Returns:
        m from 1 to k, or 0 where there is no energy at all. k if even all known values do not reach the share: they
        are all that is known, and the caller who needs more asks the eigensolver for more.

    Raises:
        TypeError: values are not floating, or an argument is not a number.
        ValueError: values are not one descending, finite, non-negative sequence, `total` is less than their sum, or
            `energy` lies outside (0, 1].

    Examples:
        >>> fg.rank_for_energy([5.0, 3.0, 1.0, 1.0], energy=0.8)
        2
    """
    if not isinstance(values, torch.Tensor):
        try:
            values = torch.tensor(list(values), dtype=torch.float64)
        except (TypeError, ValueError):
            raise TypeError(f"values must be a tensor or a sequence of numbers, got {type(values).__name__}") from None
    spectrum = check_descending("values", values).detach().to(torch.float64)
    check_not_negative("values", spectrum)
    share = check_number("energy", energy, high=1)
    if share <= 0:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    held = spectrum.cumsum(0)
    known = float(held[-1])
    whole = (
        known if total is None else check_number("total", float(total) if isinstance(total, torch.Tensor) else total)
    )
    # A trace that was summed in another order or in single precision may be a rounding less than the sum.
    if whole < known * (1 - 1e-5):
        raise ValueError(f"total is {whole:.6g}, less than the sum {known:.6g} of the values it should contain")
    if known == 0:
        return 0
    reached = held >= share * max(whole, known) * (1 - 1e-12)
    return int(reached.to(torch.int64).argmax()) + 1 if bool(reached.any()) else spectrum.numel()
