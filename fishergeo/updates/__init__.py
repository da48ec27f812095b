"""A weight update in factors: low-rank algebra, projectors that split it, and terms that charge it."""

from fishergeo.updates.collision import (
    SampledOverlap,
    geodesic_separation,
    riemannian_overlap,
    sampled_riemannian_overlap,
)
from fishergeo.updates.kronecker_projectors import KroneckerMaskProjector, KroneckerProjector
from fishergeo.updates.lowrank import LowRank, as_update, check_finite_update, layer_cosines
from fishergeo.updates.projectors import Complement, Projector, SoftProjector
from fishergeo.updates.stacked import stacked_congruence, stacked_quadratic

__all__ = [
    "Complement",
    "KroneckerMaskProjector",
    "KroneckerProjector",
    "LowRank",
    "Projector",
    "SampledOverlap",
    "SoftProjector",
    "as_update",
    "check_finite_update",
    "geodesic_separation",
    "layer_cosines",
    "riemannian_overlap",
    "sampled_riemannian_overlap",
    "stacked_congruence",
    "stacked_quadratic",
]
