"""Fisher geometry over torch."""

from fishergeo.collision import SampledOverlap, geodesic_separation, riemannian_overlap, sampled_riemannian_overlap
from fishergeo.fisher import Fisher, FisherHeader, estimate_fisher
from fishergeo.lowrank import LowRank
from fishergeo.operators import (
    DenseOperator,
    DiagonalOperator,
    KroneckerOperator,
    SpectralOperator,
    SymmetricOperator,
)
from fishergeo.projector import Projector, SoftProjector
from fishergeo.rank import rank_for_energy

__version__ = "0.1.0"

__all__ = [
    "DenseOperator",
    "DiagonalOperator",
    "Fisher",
    "FisherHeader",
    "KroneckerOperator",
    "LowRank",
    "Projector",
    "SampledOverlap",
    "SoftProjector",
    "SpectralOperator",
    "SymmetricOperator",
    "estimate_fisher",
    "geodesic_separation",
    "rank_for_energy",
    "riemannian_overlap",
    "sampled_riemannian_overlap",
]
