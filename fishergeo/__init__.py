"""Fisher geometry over torch."""

from geoopt import Sphere, Stiefel, SymmetricPositiveDefinite

from fishergeo.block_lanczos import lanczos, lanczos_layers
from fishergeo.capture import FirstTokens
from fishergeo.distributed import all_reduce
from fishergeo.estimate import estimate_fisher
from fishergeo.fisher import Fisher, FisherHeader
from fishergeo.geometry import (
    Agreement,
    Confidence,
    Grassmann,
    affine_invariant_distance,
    bootstrap_agreement,
    bootstrap_confidence,
    bures_wasserstein_distance,
    davis_kahan_bound,
    eigenspace_shift_bound,
    fisher_rao_distance,
    karcher_mean,
    log_euclidean_distance,
    principal_angles,
    shard_agreement,
    split_half_agreement,
    subspace_distance,
    subspace_overlap,
)
from fishergeo.leading import leading_eigenpairs
from fishergeo.noise_edge import (
    gavish_donoho_factor,
    marchenko_pastur_edge,
    rank_by_gavish_donoho,
    rank_by_noise_edge,
    rank_by_sign_flips,
)
from fishergeo.operators import (
    DenseOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    ExactOperator,
    KroneckerOperator,
    LayerProducts,
    SpectralKroneckerOperator,
    SpectralOperator,
    SumOperator,
    SymmetricOperator,
)
from fishergeo.plan import LayerPlan, Plan, plan
from fishergeo.rank import rank_for_energy
from fishergeo.second_pass import second_pass
from fishergeo.shards import sketch_shards
from fishergeo.sketching import ErrorEstimate, FrequentDirections, NystromSketch, SketchOperator, nystrom
from fishergeo.spectral_density import SpectralDensity, effective_dimension, spectral_density
from fishergeo.spectrum import ConvergenceError, ConvergenceWarning, Spectrum
from fishergeo.streaming import StreamingFisher
from fishergeo.structures import Structure
from fishergeo.trace_estimators import Estimate, diagonal, trace
from fishergeo.updates import (
    Complement,
    KroneckerMaskProjector,
    KroneckerProjector,
    LowRank,
    Projector,
    SampledOverlap,
    SoftProjector,
    geodesic_separation,
    layer_cosines,
    riemannian_overlap,
    sampled_riemannian_overlap,
    stacked_congruence,
    stacked_quadratic,
)

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "Complement",
    "Confidence",
    "ConvergenceError",
    "ConvergenceWarning",
    "DenseOperator",
    "DiagonalOperator",
    "EigenKroneckerOperator",
    "ErrorEstimate",
    "Estimate",
    "ExactOperator",
    "FirstTokens",
    "Fisher",
    "FisherHeader",
    "FrequentDirections",
    "Grassmann",
    "KroneckerMaskProjector",
    "KroneckerOperator",
    "KroneckerProjector",
    "LayerPlan",
    "LayerProducts",
    "LowRank",
    "NystromSketch",
    "Plan",
    "Projector",
    "SampledOverlap",
    "SketchOperator",
    "SoftProjector",
    "SpectralDensity",
    "SpectralKroneckerOperator",
    "SpectralOperator",
    "Spectrum",
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
    "diagonal",
    "effective_dimension",
    "eigenspace_shift_bound",
    "estimate_fisher",
    "fisher_rao_distance",
    "gavish_donoho_factor",
    "geodesic_separation",
    "karcher_mean",
    "lanczos",
    "lanczos_layers",
    "layer_cosines",
    "leading_eigenpairs",
    "log_euclidean_distance",
    "marchenko_pastur_edge",
    "nystrom",
    "plan",
    "principal_angles",
    "rank_by_gavish_donoho",
    "rank_by_noise_edge",
    "rank_by_sign_flips",
    "rank_for_energy",
    "riemannian_overlap",
    "sampled_riemannian_overlap",
    "second_pass",
    "shard_agreement",
    "sketch_shards",
    "spectral_density",
    "split_half_agreement",
    "stacked_congruence",
    "stacked_quadratic",
    "subspace_distance",
    "subspace_overlap",
    "trace",
]
