"""The structures there are, by name: which accumulator keeps each, and with which options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fishergeo._checks import check_choice, check_integer
from fishergeo.accumulators.base import Accumulator
from fishergeo.accumulators.exact import ExactAccumulator
from fishergeo.accumulators.kronecker import EkfacAccumulator, KfacAccumulator, KfacSketchAccumulator
from fishergeo.accumulators.moments import DiagonalAccumulator, GramAccumulator
from fishergeo.accumulators.sketch import SketchAccumulator

ACCUMULATORS: dict[str, type[Accumulator]] = {
    "sketch": SketchAccumulator,
    "gram": GramAccumulator,
    "diagonal": DiagonalAccumulator,
    "kfac": KfacAccumulator,
    "kfac-sketch": KfacSketchAccumulator,
    "ekfac": EkfacAccumulator,
    "exact": ExactAccumulator,
}

STRUCTURES = tuple(ACCUMULATORS)

UNITS = ("sequence", "token")

SIDES = ("output", "input")

SHARINGS = ("expand", "reduce")


@dataclass(frozen=True)
class Structure:
    """One structure to estimate, with options of its own.

    Args:
        name: ``"sketch"``, ``"gram"``, ``"diagonal"``, ``"kfac"``, ``"kfac-sketch"``, ``"ekfac"`` or ``"exact"``.
        side: ``"output"`` or ``"input"``, for gram and sketch.
        rank: eigenpairs of the sketch, or of each factor of kfac-sketch, at least 1.
        sharing: ``"expand"`` or ``"reduce"``, for kfac, kfac-sketch and the basis of ekfac.
        basis_examples: for ekfac: None takes two passes, the first of which finds the eigenbases on all data. A
            number takes one sweep: the bases are fixed by the first batches that hold so many examples, and the
            moments are those of the examples after them.
        probes: for sketch: Gaussian columns held back to measure its error with, at least 0;
            ``fisher[layer].error()`` then bounds what the sketch lacks. 8 cost an eighth of a sketch of rank 64.

    Raises:
        ValueError: for unknown choices or numbers out of range.
        TypeError: for a rank or a number of probes that is no integer.

    Examples:
        >>> fg.Structure("kfac", sharing="reduce").name
        'kfac'
    """

    name: str
    side: str = "output"
    rank: int = 64
    sharing: str = "expand"
    basis_examples: int | None = None
    probes: int = 0

    def __post_init__(self) -> None:
        check_choice("structure", self.name, STRUCTURES)
        check_choice("side", self.side, SIDES)
        check_choice("sharing", self.sharing, SHARINGS)
        check_integer("rank", self.rank, low=1)
        check_integer("probes", self.probes, low=0)
        if self.basis_examples is not None and (self.basis_examples < 1 or self.name != "ekfac"):
            raise ValueError(
                f"basis_examples={self.basis_examples}: the number of examples, at least 1, that fix the eigenbases "
                "of structure='ekfac'"
            )
        if self.probes and self.name != "sketch":
            raise ValueError(f"probes={self.probes}: the columns, at least 0, that structure='sketch' is measured with")


Structures = str | Structure | Sequence[str | Structure] | Mapping[str, str | Structure]


def named_structures(
    structure: Structures,
    *,
    side: str = "output",
    rank: int = 64,
    sharing: str = "expand",
    basis_examples: int | None = None,
    probes: int = 0,
) -> dict[str, Structure]:
    """What was asked for, under the names that the result will have.

    Args:
        structure: one name or :class:`Structure`, several, or several under names of one's own.
        side: side of structures that are only named; so are all options that follow.
        rank: rank of sketches.
        sharing: sharing of kfac, kfac-sketch and ekfac.
        basis_examples: basis examples of ekfac.
        probes: probes of sketches.

    Raises:
        ValueError: if nothing is asked for, or the same name twice.
    """
    if isinstance(structure, str | Structure):
        items: list[tuple[str, str | Structure]] = [("", structure)]
    elif isinstance(structure, Mapping):
        items = list(structure.items())
    else:
        items = [(one if isinstance(one, str) else one.name, one) for one in structure]
    if not items:
        raise ValueError(f"structure is empty; take some of {', '.join(STRUCTURES)}")
    named: dict[str, Structure] = {}
    for key, one in items:
        if key in named:
            raise ValueError(f"structure {key!r} is asked for twice; pass a mapping with names of your own")
        if isinstance(one, str):
            of_ekfac = basis_examples if one == "ekfac" else None
            one = Structure(one, side, rank, sharing, of_ekfac, probes if one == "sketch" else 0)
        named[key] = one
    return named
