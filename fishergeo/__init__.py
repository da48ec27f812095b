"""Fisher geometry over torch."""

from geoopt import Sphere, Stiefel, SymmetricPositiveDefinite

from fishergeo.angles import principal_angles, subspace_distance, subspace_overlap
from fishergeo.black_box import LayerProducts
from fishergeo.block_lanczos import lanczos, lanczos_layers
from fishergeo.collision import SampledOverlap, geodesic_separation, riemannian_overlap, sampled_riemannian_overlap
from fishergeo.fisher import Fisher, FisherHeader, estimate_fisher
from fishergeo.grassmann import Grassmann, karcher_mean
from fishergeo.kronecker_projector import KroneckerMaskProjector, KroneckerProjector
from fishergeo.layer_operators import DiagonalOperator, EigenKroneckerOperator, KroneckerOperator
from fishergeo.lowrank import LowRank
from fishergeo.operators import DenseOperator, SpectralOperator, SumOperator, SymmetricOperator
from fishergeo.projector import Complement, Projector, SoftProjector
from fishergeo.rank import rank_for_energy
from fishergeo.spd import (
    affine_invariant_distance,
    bures_wasserstein_distance,
    fisher_rao_distance,
    log_euclidean_distance,
)
from fishergeo.spectrum import ConvergenceError, ConvergenceWarning, Spectrum
from fishergeo.stability import (
    Agreement,
    bootstrap_agreement,
    davis_kahan_bound,
    eigenspace_shift_bound,
    layer_cosines,
    split_half_agreement,
)

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "Complement",
    "ConvergenceError",
    "ConvergenceWarning",
    "DenseOperator",
    "DiagonalOperator",
    "EigenKroneckerOperator",
    "Fisher",
    "FisherHeader",
    "Grassmann",
    "KroneckerMaskProjector",
    "KroneckerOperator",
    "KroneckerProjector",
    "LayerProducts",
    "LowRank",
    "Projector",
    "SampledOverlap",
    "SoftProjector",
    "SpectralOperator",
    "Spectrum",
    "Sphere",
    "Stiefel",
    "SumOperator",
    "SymmetricOperator",
    "SymmetricPositiveDefinite",
    "affine_invariant_distance",
    "bootstrap_agreement",
    "bures_wasserstein_distance",
    "davis_kahan_bound",
    "eigenspace_shift_bound",
    "estimate_fisher",
    "fisher_rao_distance",
    "geodesic_separation",
    "karcher_mean",
    "lanczos",
    "lanczos_layers",
    "layer_cosines",
    "log_euclidean_distance",
    "principal_angles",
    "rank_for_energy",
    "riemannian_overlap",
    "sampled_riemannian_overlap",
    "split_half_agreement",
    "subspace_distance",
    "subspace_overlap",
]
