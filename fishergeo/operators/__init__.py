"""Symmetric operators behind one protocol: dense, spectral, diagonal, Kronecker-factored, exact, or known by products alone."""

from fishergeo.operators.base import (
    DENSE_LIMIT,
    ROUNDINGS,
    DenseOperator,
    SumOperator,
    SymmetricOperator,
    check_layer_shape,
    checked_rank,
    fix_signs,
    operator_from_tensors,
)
from fishergeo.operators.diagonal import DiagonalOperator
from fishergeo.operators.exact import ExactOperator
from fishergeo.operators.joint import JointFisher
from fishergeo.operators.kronecker import (
    EigenKroneckerOperator,
    FactoredKronecker,
    KroneckerOperator,
    SpectralKroneckerOperator,
)
from fishergeo.operators.matrix_free import BlackBox, EachOperator, LayerProducts, Product, black_box
from fishergeo.operators.spectral import SpectralOperator

__all__ = [
    "DENSE_LIMIT",
    "ROUNDINGS",
    "BlackBox",
    "DenseOperator",
    "DiagonalOperator",
    "EachOperator",
    "EigenKroneckerOperator",
    "ExactOperator",
    "FactoredKronecker",
    "JointFisher",
    "KroneckerOperator",
    "LayerProducts",
    "Product",
    "SpectralKroneckerOperator",
    "SpectralOperator",
    "SumOperator",
    "SymmetricOperator",
    "black_box",
    "check_layer_shape",
    "checked_rank",
    "fix_signs",
    "operator_from_tensors",
]
