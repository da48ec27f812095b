"""Eigenpairs, traces and spectral densities of operators, and how many eigenvalues count."""

from fishergeo.spectral.block_lanczos import lanczos, lanczos_layers
from fishergeo.spectral.density import SpectralDensity, effective_dimension, spectral_density
from fishergeo.spectral.leading import leading_eigenpairs
from fishergeo.spectral.rank import (
    gavish_donoho_factor,
    marchenko_pastur_edge,
    rank_by_gavish_donoho,
    rank_by_noise_edge,
    rank_by_sign_flips,
    rank_for_energy,
)
from fishergeo.spectral.refine import second_pass
from fishergeo.spectral.spectrum import (
    ConvergenceError,
    ConvergenceWarning,
    Spectrum,
    davis_kahan_bound,
    eigenspace_shift_bound,
)
from fishergeo.spectral.traces import Estimate, diagonal, trace

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "Estimate",
    "SpectralDensity",
    "Spectrum",
    "davis_kahan_bound",
    "diagonal",
    "effective_dimension",
    "eigenspace_shift_bound",
    "gavish_donoho_factor",
    "lanczos",
    "lanczos_layers",
    "leading_eigenpairs",
    "marchenko_pastur_edge",
    "rank_by_gavish_donoho",
    "rank_by_noise_edge",
    "rank_by_sign_flips",
    "rank_for_energy",
    "second_pass",
    "spectral_density",
    "trace",
]
