"""Subspaces and positive-definite matrices as points of manifolds: angles, distances, means, agreement of estimates."""

from fishergeo.geometry.agreement import (
    Agreement,
    Confidence,
    bootstrap_agreement,
    bootstrap_confidence,
    shard_agreement,
    split_half_agreement,
)
from fishergeo.geometry.angles import principal_angles, subspace_distance, subspace_overlap
from fishergeo.geometry.grassmann import Grassmann, karcher_mean
from fishergeo.geometry.spd import (
    affine_invariant_distance,
    bures_wasserstein_distance,
    fisher_rao_distance,
    log_euclidean_distance,
)

__all__ = [
    "Agreement",
    "Confidence",
    "Grassmann",
    "affine_invariant_distance",
    "bootstrap_agreement",
    "bootstrap_confidence",
    "bures_wasserstein_distance",
    "fisher_rao_distance",
    "karcher_mean",
    "log_euclidean_distance",
    "principal_angles",
    "shard_agreement",
    "split_half_agreement",
    "subspace_distance",
    "subspace_overlap",
]
