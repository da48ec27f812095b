"""Fisher geometry over torch."""

from geoopt import Sphere, Stiefel, SymmetricPositiveDefinite

from fishergeo.angles import principal_angles, subspace_distance, subspace_overlap
from fishergeo.collision import SampledOverlap, geodesic_separation, riemannian_overlap, sampled_riemannian_overlap
from fishergeo.distributed import all_reduce
from fishergeo.estimate import estimate_fisher
from fishergeo.exact_operator import ExactOperator
from fishergeo.fisher import Fisher, FisherHeader
from fishergeo.grassmann import Grassmann, karcher_mean
from fishergeo.kronecker_projector import KroneckerMaskProjector, KroneckerProjector
from fishergeo.layer_operators import DiagonalOperator, EigenKroneckerOperator, KroneckerOperator
from fishergeo.lowrank import LowRank
from fishergeo.operators import SpectralOperator
from fishergeo.plan import LayerPlan, Plan, plan
from fishergeo.projector import Complement, Projector, SoftProjector
from fishergeo.rank import rank_for_energy
from fishergeo.spd import (
    affine_invariant_distance,
    bures_wasserstein_distance,
    fisher_rao_distance,
    log_euclidean_distance,
)
from fishergeo.stability import (
    Agreement,
    Confidence,
    bootstrap_agreement,
    bootstrap_confidence,
    davis_kahan_bound,
    eigenspace_shift_bound,
    layer_cosines,
    split_half_agreement,
)
from fishergeo.streaming import StreamingFisher
from fishergeo.structures import Structure
from fishergeo.symmetric_operator import DenseOperator, SumOperator, SymmetricOperator
from fishergeo.weights import FirstTokens

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "Complement",
    "Confidence",
    "DenseOperator",
    "DiagonalOperator",
    "EigenKroneckerOperator",
    "ExactOperator",
    "FirstTokens",
    "Fisher",
    "FisherHeader",
    "Grassmann",
    "KroneckerMaskProjector",
    "KroneckerOperator",
    "KroneckerProjector",
    "LayerPlan",
    "LowRank",
    "Plan",
    "Projector",
    "SampledOverlap",
    "SoftProjector",
    "SpectralOperator",
    "Sphere",
    "Stiefel",
    "StreamingFisher",
    "Structure",
    "SumOperator",
    "SymmetricOperator",
    "SymmetricPositiveDefinite",
    "affine_invariant_distance",
    "all_reduce",
    "bootstrap_agreement",
    "bootstrap_confidence",
    "bures_wasserstein_distance",
    "davis_kahan_bound",
    "eigenspace_shift_bound",
    "estimate_fisher",
    "fisher_rao_distance",
    "geodesic_separation",
    "karcher_mean",
    "layer_cosines",
    "log_euclidean_distance",
    "plan",
    "principal_angles",
    "rank_for_energy",
    "riemannian_overlap",
    "sampled_riemannian_overlap",
    "split_half_agreement",
    "subspace_distance",
    "subspace_overlap",
]
