"""One-pass sketches of positive semi-definite matrices, and bounds on what they lack."""

from fishergeo.sketching.error import ErrorEstimate, SketchOperator
from fishergeo.sketching.frequent_directions import FrequentDirections
from fishergeo.sketching.nystrom_sketch import NystromSketch, nystrom
from fishergeo.sketching.psd_sketch import PsdSketch, compress, factor_eigh, nystrom_factor, probe_matrix, segments

__all__ = [
    "ErrorEstimate",
    "FrequentDirections",
    "NystromSketch",
    "PsdSketch",
    "SketchOperator",
    "compress",
    "factor_eigh",
    "nystrom",
    "nystrom_factor",
    "probe_matrix",
    "segments",
]
