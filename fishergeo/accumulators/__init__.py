"""The running sums behind each Fisher structure."""

from fishergeo.accumulators.base import Accumulator, Layout, Made, Owned, Shared
from fishergeo.accumulators.exact import ExactAccumulator
from fishergeo.accumulators.kronecker import EkfacAccumulator, KfacAccumulator, KfacSketchAccumulator
from fishergeo.accumulators.moments import DiagonalAccumulator
from fishergeo.accumulators.products import ProductAccumulator
from fishergeo.accumulators.sketch import SketchAccumulator
from fishergeo.accumulators.structures import (
    ACCUMULATORS,
    SHARINGS,
    SIDES,
    STRUCTURES,
    UNITS,
    Structure,
    Structures,
    named_structures,
)

__all__ = [
    "ACCUMULATORS",
    "SHARINGS",
    "SIDES",
    "STRUCTURES",
    "UNITS",
    "Accumulator",
    "DiagonalAccumulator",
    "EkfacAccumulator",
    "ExactAccumulator",
    "KfacAccumulator",
    "KfacSketchAccumulator",
    "Layout",
    "Made",
    "Owned",
    "ProductAccumulator",
    "Shared",
    "SketchAccumulator",
    "Structure",
    "Structures",
    "named_structures",
]
