"""Fisher geometry over torch."""

from fishergeo.collision import SampledOverlap, geodesic_separation, riemannian_overlap, sampled_riemannian_overlap
from fishergeo.fisher import Fisher, FisherHeader, estimate_fisher
from fishergeo.kronecker_projector import KroneckerMaskProjector, KroneckerProjector
from fishergeo.lowrank import LowRank
from fishergeo.operators import (
    DenseOperator,
    DiagonalOperator,
    KroneckerOperator,
    SpectralOperator,
    SymmetricOperator,
)
from fishergeo.projector import Complement, Projector, SoftProjector
from fishergeo.rank import rank_for_energy

__version__ = "0.1.0"

__all__ = [
    "Complement",
    "DenseOperator",
    "DiagonalOperator",
    "Fisher",
    "FisherHeader",
    "KroneckerMaskProjector",
    "KroneckerOperator",
    "KroneckerProjector",
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
