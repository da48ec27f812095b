"""Operators that others wrote: functions that work in place or reuse their memory, and SciPy's."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

import fishergeo as fg

SIZE = 60
VALUES = torch.arange(float(SIZE), dtype=torch.float64)[:, None]


class Scaling(fg.SymmetricOperator):
    """A subclass of a user's own, which multiplies in place."""

    def __init__(self):
        super().__init__(SIZE, torch.float64, torch.device("cpu"))

    def _matmat(self, block):
        return block.mul_(VALUES)

    def diagonal(self):
        return VALUES[:, 0]


def in_place(block):
    return block.mul_(VALUES)


def through_numpy(block):
    array = block.numpy()
    array *= VALUES.numpy()
    return torch.from_numpy(array)


class Buffer:
    """Gives the same memory every time."""

    def __init__(self):
        self.held = {}

    def __call__(self, block):
        held = self.held.setdefault(block.shape[1], torch.empty_like(block))
        return torch.mul(block, VALUES, out=held)


def sparse(dtype=np.float64):
    return scipy.sparse.linalg.aslinearoperator(scipy.sparse.diags(VALUES[:, 0].numpy().astype(dtype)))


def column_wise():
    diagonal = VALUES[:, 0].numpy()
    return scipy.sparse.linalg.LinearOperator((SIZE, SIZE), matvec=lambda v: diagonal * v.ravel(), dtype=np.float64)


OPERATORS = {"in place": in_place, "numpy": through_numpy, "buffer": Buffer, "subclass": Scaling, "sparse": sparse,
             "columns": column_wise}  # fmt: skip

USES = {
    "lanczos": lambda op, size: fg.lanczos(op, 3, **size).values,
    "trace": lambda op, size: fg.trace(op, 24, **size).value,
    "hutch++": lambda op, size: fg.trace(op, 24, "hutch++", **size).value,
    "hutchinson": lambda op, size: fg.trace(op, 24, "hutchinson", **size).value,
    "whole": lambda op, size: fg.trace(op, 2 * SIZE, **size).value,
    "diagonal": lambda op, size: fg.diagonal(op, 24, **size).value,
    "nystrom": lambda op, size: fg.nystrom(op, 5, **size).eigh(1)[0],
    "density": lambda op, size: fg.spectral_density(op, 4, 20, **size).moment(1).value,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("form", OPERATORS)
def test_an_operator_of_any_form_is_what_it_multiplies_by(form, use):
    op = OPERATORS[form]
    op = op() if form in ("buffer", "subclass", "sparse", "columns") else op
    size = {"size": SIZE} if form in ("in place", "numpy", "buffer") else {}
    want = USES[use](lambda block: VALUES * block, {"size": SIZE})
    assert torch.allclose(USES[use](op, size), want, rtol=1e-12)


def test_scipy_operators_keep_their_precision_and_stand_among_others():
    assert fg.trace(sparse(np.float32), 24).value.dtype == torch.float32
    found = fg.lanczos_layers({"a": sparse(), "b": fg.DenseOperator(torch.diag(VALUES[:, 0]))}, 2)
    assert [round(float(v), 6) for name in "ab" for v in found[name].values] == [59.0, 58.0] * 2
    sketch = fg.NystromSketch(SIZE, 5)
    sketch.add_operator(sparse())
    again = fg.NystromSketch(SIZE, 5)
    again.add_operator(fg.DenseOperator(torch.diag(VALUES[:, 0])))
    assert torch.allclose(sketch.product, again.product)


@pytest.mark.parametrize(("op", "error", "words"), [
    (scipy.sparse.linalg.aslinearoperator(np.ones((2, 3))), ValueError, "square"),
    (scipy.sparse.linalg.aslinearoperator(np.eye(8) * 1j), TypeError, "real"),
    (np.eye(8), TypeError, "SciPy LinearOperator"),
    (lambda block: block.numpy(), ValueError, "returned a ndarray"),
    (lambda block: block[:, 0], ValueError, "returned .8,. for a block"),
])  # fmt: skip
def test_what_is_no_operator_is_named(op, error, words):
    with pytest.raises(error, match=words):
        fg.trace(op, 4, size=8)


# Numbers that are small or large, or not numbers.


@pytest.mark.parametrize("method", ["xtrace", "hutch++", "hutchinson"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trace_scales_with_its_operator(method, dtype):
    a = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    a = a @ a.T
    one = fg.trace(a, 20, method)
    for exponent in (-80, 80) if dtype == torch.float32 else (-530, 500):
        other = fg.trace(a * 2.0**exponent, 20, method)
        assert torch.allclose(other.value.double() / 2.0**exponent, one.value.double(), rtol=1e-5)
        assert torch.allclose(other.error.double() / 2.0**exponent, one.error.double(), rtol=1e-4)


@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
def test_a_diagonal_scales_with_its_operator(method):
    a = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    a = a @ a.T
    one = fg.diagonal(a, 20, method)
    for exponent in (-80, 80):
        other = fg.diagonal(a * 2.0**exponent, 20, method)
        assert torch.allclose(other.value / 2.0**exponent, one.value, rtol=1e-4)
        assert torch.allclose(other.error / 2.0**exponent, one.error, rtol=1e-4)


def test_leading_eigenpairs_of_what_is_not_finite_are_refused():
    for size in (6, 600):
        matrix = torch.eye(size)
        matrix[1, 1] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinite"):
            fg.leading_eigenpairs(matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zeros", [0, 1, 3, 5])
def test_eigenvectors_are_orthonormal_where_examples_have_no_gradient(dtype, zeros):
    generator = torch.Generator().manual_seed(0)
    d, a = (torch.randn(5, width, generator=generator).to(dtype) for width in (4, 3))
    d[5 - zeros :] = 0
    op = fg.ExactOperator(d, a, torch.ones(5, dtype=torch.long), 5)
    values, vectors = op.eigh()
    assert torch.allclose(vectors.T @ vectors, torch.eye(5, dtype=dtype), atol=1e-5)
    assert torch.allclose((vectors * values) @ vectors.T, op.to_dense(), atol=1e-5)
    assert torch.allclose(op.power(0.5).to_dense() @ op.power(0.5).to_dense(), op.to_dense(), atol=1e-5)


@pytest.mark.parametrize("structure", ["gram", "sketch", "diagonal", "kfac", "kfac-sketch", "ekfac"])
def test_sums_that_underflow_are_named(structure):
    model, x = torch.nn.Linear(3, 4), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    loss = lambda m, b: m(b).sum(1) * 1e-24
    with pytest.raises(FloatingPointError, match=r"layer '': its gradients are about .*float64"):
        fg.estimate_fisher(model, [x], structure, loss=loss, rank=2)
    wide = fg.estimate_fisher(model, [x], structure, loss=loss, rank=2, dtype=torch.float64)[""]
    one = fg.estimate_fisher(model, [x], structure, loss=lambda m, b: m(b).sum(1), rank=2, dtype=torch.float64)[""]
    assert float(wide.trace() / one.trace()) == pytest.approx(1e-48, rel=1e-5)


@pytest.mark.parametrize("what", ["inputs", "gradients"])
def test_gradients_that_are_zero_do_not_count_as_underflow(what):
    loss = lambda m, b: m(b).sum(1) * (0 if what == "gradients" else 1)
    x = torch.zeros(5, 3) if what == "inputs" else torch.ones(5, 3)
    found = fg.estimate_fisher(torch.nn.Linear(3, 4), [x], "gram", loss=loss)
    assert float(found[""].trace()) == 0


def test_the_effective_dimension_of_scipys_operator_is_that_of_its_eigenvalues():
    want = float((VALUES / (VALUES + 3.0)).sum())
    for op in (sparse(), column_wise()):
        assert abs(fg.effective_dimension(op, damping=3.0) - want) < 1e-12 * want
    lopsided = np.triu(np.ones((4, 4)))
    with pytest.raises(ValueError, match="op must be symmetric"):
        fg.effective_dimension(scipy.sparse.linalg.aslinearoperator(lopsided), damping=1.0)
    huge = scipy.sparse.linalg.aslinearoperator(scipy.sparse.eye(9000))
    with pytest.raises(ValueError, match="spectral_density"):
        fg.effective_dimension(huge, damping=1.0)


LAYOUTS = {"coo": torch.Tensor.to_sparse, "csr": torch.Tensor.to_sparse_csr, "csc": torch.Tensor.to_sparse_csc}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_matrix_is_looked_at_like_a_dense_one(layout):
    sparsely, lopsided = LAYOUTS[layout], torch.diag(torch.arange(1.0, 9.0))
    assert float(fg.trace(sparsely(lopsided), 16).value) == 36
    assert float(fg.trace(sparsely(torch.zeros(8, 8)), 16).value) == 0
    lopsided[0, 5] = 1.0
    with pytest.raises(ValueError, match=r"op must be symmetric, the largest entry of .* is 1\b"):
        fg.lanczos(sparsely(lopsided), 1)
    with pytest.raises(ValueError, match="op must be symmetric"):
        fg.NystromSketch(8, 2).add_operator(sparsely(lopsided))
    with pytest.raises(ValueError, match="op has 1 entries that are NaN or infinite"):
        fg.trace(sparsely(torch.diag(torch.tensor([1.0, torch.inf]))), 4)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="op must be a real floating tensor"):
            fg.lanczos(sparsely(torch.eye(8, dtype=dtype)), 1)


def test_entries_of_a_sparse_matrix_that_are_listed_twice_count_once_summed():
    twice = torch.sparse_coo_tensor(torch.tensor([[0, 0, 1], [1, 1, 0]]), torch.tensor([1.0, 2.0, 3.0]), (2, 2))
    assert fg.lanczos(twice, 1).values.tolist() == pytest.approx([3.0])
