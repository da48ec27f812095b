"""One conformance suite for every symmetric operator: each claim against the dense matrix."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import assert_close

import fishergeo as fg

P, Q = 4, 3


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def psd(size, seed=0):
    factor = random(size, size, seed=seed)
    return factor @ factor.T


def orthogonal(rows, columns, seed=0):
    return torch.linalg.qr(random(rows, columns, seed=seed))[0]


def exact(examples):
    """Examples of one, two and three rows in turn."""
    lengths = torch.tensor([1 + i % 3 for i in range(examples)])
    rows = int(lengths.sum())
    return fg.ExactOperator(random(rows, P), random(rows, Q, seed=1), lengths, examples)


def streaming(side):
    torch.manual_seed(0)
    model = torch.nn.Linear(Q, P).double()
    batches = [random(n, 2, Q, seed=n) for n in (3, 1, 2)]
    loss = lambda model, batch: model(batch).sin().sum((1, 2))
    return fg.StreamingFisher(model, batches, side=side, loss=loss)[""]


CASES = {
    "dense output": lambda: fg.DenseOperator(psd(P)),
    "dense input": lambda: fg.DenseOperator(psd(Q), side="input"),
    "spectral output": lambda: fg.SpectralOperator(torch.tensor([3.0, 1.0]).double(), orthogonal(P, 2)),
    "spectral input": lambda: fg.SpectralOperator(torch.tensor([3.0, 1.0]).double(), orthogonal(Q, 2), side="input"),
    "spectral with rest": lambda: fg.SpectralOperator(torch.tensor([3.0, 0.1]).double(), orthogonal(P, 2), rest=0.7),
    "diagonal": lambda: fg.DiagonalOperator(random(P, Q).square()),
    "kronecker": lambda: fg.KroneckerOperator(psd(P), psd(Q, 1)),
    "spectral kronecker": lambda: fg.SpectralKroneckerOperator(
        fg.SpectralOperator(torch.tensor([3.0, 1.0]).double(), orthogonal(P, 2), rest=0.2),
        fg.SpectralOperator(torch.tensor([2.0, 0.1]).double(), orthogonal(Q, 2, 1), side="input", rest=0.5),
    ),
    "eigen-kronecker": lambda: fg.EigenKroneckerOperator(orthogonal(P, P), orthogonal(Q, Q, 1), random(P, Q).square()),
    "exact of few": lambda: exact(5),
    "exact of many": lambda: exact(20),
    "streaming": lambda: streaming("both"),
    "streaming output": lambda: streaming("output"),
    "streaming input": lambda: streaming("input"),
    "sum": lambda: fg.DenseOperator(psd(P)) + 0.5 * fg.DenseOperator(psd(P, 1)),
    "sum of sides": lambda: fg.KroneckerOperator(psd(P), psd(Q, 1)) * 2.0 + fg.DiagonalOperator(random(P, Q).square()),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def operator(request):
    return CASES[request.param]()


def test_the_dense_matrix_is_symmetric_and_of_the_shape(operator):
    dense = operator.to_dense()
    assert tuple(dense.shape) == operator.shape and dense.dtype == operator.dtype
    assert_close(dense, dense.T, 1e-14)


def test_products_with_vectors_and_blocks(operator):
    block = random(operator.shape[0], 5, seed=7)
    assert_close(operator @ block, operator.to_dense() @ block, 1e-13)
    assert_close(operator @ block[:, 0], operator.to_dense() @ block[:, 0], 1e-13)
    with pytest.raises(ValueError, match=r"operator of shape"):
        operator @ random(operator.shape[0] + 1)


def test_diagonal_and_trace(operator):
    assert_close(operator.diagonal(), operator.to_dense().diagonal(), 1e-13)
    assert_close(operator.trace(), operator.to_dense().trace(), 1e-13)


def test_eigenpairs_are_the_largest_descending_and_orthonormal(operator):
    k = 2
    values, vectors = operator.eigh(k)
    expected = torch.linalg.eigvalsh(operator.to_dense()).flip(0)[:k]
    assert_close(values, expected, 1e-12)
    assert_close(vectors.T @ vectors, torch.eye(k, dtype=torch.float64), 1e-12)
    assert_close(operator.to_dense() @ vectors, vectors * values, 1e-10)
    assert bool((vectors.gather(0, vectors.abs().argmax(0)[None]) > 0).all())
    for wrong in (0, operator.shape[0] + 1):
        with pytest.raises(ValueError, match="k="):
            operator.eigh(wrong)


def test_scipy_sees_the_same_operator(operator):
    linear = operator.to_scipy()
    block = random(operator.shape[0], 2, seed=3).numpy()
    assert np.allclose(linear @ block, operator.to_dense().numpy() @ block)
    value = scipy.sparse.linalg.eigsh(linear, k=1, return_eigenvectors=False)[0]
    assert np.isclose(value, float(operator.eigh(1)[0][0]))


@pytest.mark.parametrize("damping", [0.3, 2.0])
def test_inverse_solve_power_and_logdet_with_damping(operator, damping):
    shifted = operator.to_dense() + damping * torch.eye(operator.shape[0], dtype=torch.float64)
    rhs = random(operator.shape[0], 2, seed=5)
    assert_close(operator.inverse(damping).to_dense(), torch.linalg.inv(shifted), 1e-11)
    assert_close(operator.solve(rhs, damping), torch.linalg.solve(shifted, rhs), 1e-11)
    assert_close(operator.solve(rhs[:, 0], damping), torch.linalg.solve(shifted, rhs[:, 0]), 1e-11)
    assert_close(operator.logdet(damping), torch.logdet(shifted), 1e-11)
    cube_root = operator.power(1 / 3, damping).to_dense()
    assert_close(cube_root @ cube_root @ cube_root, shifted, 1e-11)
    half = operator.power(-0.5, damping)
    assert_close(half @ (shifted @ half.to_dense()), torch.eye(operator.shape[0], dtype=torch.float64), 1e-11)


def test_the_square_root_squares_back(operator):
    root = operator.sqrt()
    assert_close(root @ root.to_dense(), operator.to_dense(), 1e-11)
    assert float(torch.linalg.eigvalsh(root.to_dense())[0]) >= -1e-9


def test_sums_and_multiples(operator):
    both = 2.0 * operator + operator * 0.5
    assert_close(both.to_dense(), 2.5 * operator.to_dense(), 1e-13)
    with pytest.raises(ValueError, match="differ"):
        operator + fg.DenseOperator(psd(P + 17))
    with pytest.raises(TypeError):
        operator * operator


def dense_quadratic(operator, delta):
    dense = operator.to_dense()
    if operator.side == "output":
        return torch.trace(delta.T @ dense @ delta)
    if operator.side == "input":
        return torch.trace(delta @ dense @ delta.T)
    return delta.flatten() @ dense @ delta.flatten()


def test_quadratic_forms_of_dense_and_factored_updates_and_their_gradients(operator):
    left, right = random(P, 2, seed=8).requires_grad_(), random(2, Q, seed=9).requires_grad_()
    expected = dense_quadratic(operator, left @ right)
    expected_gradients = torch.autograd.grad(expected, (left, right), retain_graph=True)
    for actual in (operator.quadratic(left @ right), operator.quadratic(fg.LowRank(left, right))):
        assert_close(actual, expected, 1e-12)
        for one, other in zip(torch.autograd.grad(actual, (left, right)), expected_gradients, strict=True):
            assert_close(one, other, 1e-12)


@pytest.mark.parametrize("factors_train", [False, True], ids=["fixed factors", "trained factors"])
def test_second_derivatives_of_a_kronecker_quadratic(factors_train):
    s, a = psd(P), psd(Q, 1)
    left, right = random(P, 2).requires_grad_(), random(2, Q).requires_grad_()
    if factors_train:
        s.requires_grad_()

    def value(left, right):
        return fg.KroneckerOperator(s, a).quadratic(fg.LowRank(left, right))

    assert torch.autograd.gradcheck(value, (left, right)) and torch.autograd.gradgradcheck(value, (left, right))
    if factors_train:
        (gradient,) = torch.autograd.grad(value(left, right), s)
        assert_close(gradient, (left @ right) @ a @ (left @ right).T, 1e-12)


def test_what_it_does_to_weights_is_half_the_gradient_of_the_quadratic_form(operator):
    deltas = random(2, 3, P, Q, seed=4)
    moved = operator.apply(deltas)
    for place in ((0, 0), (1, 2)):
        leaf = deltas[place].clone().requires_grad_(True)
        (half,) = torch.autograd.grad(0.5 * operator.quadratic(leaf), leaf)
        assert_close(moved[place], half, 1e-11)
        assert_close(operator.apply(deltas[place]), moved[place], 1e-12)
    with pytest.raises(ValueError, match="does not fit"):
        operator.apply(random(P + 1, Q + 1))


def test_eigenvalues_are_those_of_the_dense_matrix(operator):
    found = operator.eigenvalues().sort().values
    assert found.dtype == torch.float64
    assert_close(found, torch.linalg.eigvalsh(operator.to_dense()), 1e-11)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_several_updates_meet_every_example_at_once(count):
    operator = exact(7)
    deltas = random(count, P, Q, seed=6)
    every = torch.stack([operator.inner(delta) for delta in deltas])
    assert_close(operator.inner(deltas), every, 1e-12)
    assert_close(torch.einsum("npq,kpq->kn", operator.weight_gradients(), deltas), every, 1e-12)
    assert_close(torch.einsum("npq,npq->", *[operator.weight_gradients()] * 2) / 7, operator.trace(), 1e-12)


def test_quadratic_forms_refuse_what_does_not_fit(operator):
    with pytest.raises(ValueError, match="does not fit"):
        operator.quadratic(random(P + 1, Q + 1))
    with pytest.raises(ValueError, match="does not fit"):
        operator.quadratic(fg.LowRank(random(P + 1, 1), random(1, Q + 1)))


def test_products_are_differentiable(operator):
    block = random(operator.shape[0], 2, seed=4).requires_grad_()
    (gradient,) = torch.autograd.grad((operator @ block).square().sum(), block)
    assert_close(gradient, 2 * operator.to_dense() @ (operator.to_dense() @ block), 1e-12)


def test_singular_operators_need_damping_for_negative_powers():
    singular = CASES["spectral output"]()
    with pytest.raises(ValueError, match="damping"):
        singular.inverse()
    for damping in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="damping must be"):
            singular.inverse(damping)
    assert singular.logdet() == -torch.inf


def of_too_few_rows(seed):
    """(8, 8) float32, the Gram of 7 rows: rounding makes its zero eigenvalue as often positive as negative."""
    rows = random(7, 8, seed=seed).float()
    return rows.T @ rows


def eigenbasis(matrix):
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.float(), vectors.float()


NEARLY_SINGULAR = {
    "dense": fg.DenseOperator,
    "sum": lambda gram: 0.5 * fg.DenseOperator(gram) + 0.5 * fg.DenseOperator(gram),
    "spectral": lambda gram: fg.SpectralOperator(*(part.flip(-1) for part in eigenbasis(gram))),
    "spectral with rest": lambda gram: fg.SpectralOperator(
        eigenbasis(gram)[0][1:].flip(0), eigenbasis(gram)[1][:, 1:].flip(1), rest=1e-7
    ),
    "kronecker of a singular output factor": lambda gram: fg.KroneckerOperator(gram, torch.eye(3)),
    "kronecker of a singular input factor": lambda gram: fg.KroneckerOperator(torch.eye(3), gram),
    "kronecker of two singular factors": lambda gram: fg.KroneckerOperator(gram, gram),
    "eigen-kronecker": lambda gram: fg.KroneckerOperator(gram, torch.eye(3)).rotated(),
    "exact of many": lambda gram: fg.ExactOperator(
        torch.ones(21, 1), torch.linalg.svd(gram)[1].sqrt().diag()[:7].repeat(3, 1), torch.ones(21).long(), 21
    ),
}


@pytest.mark.parametrize("kind", NEARLY_SINGULAR)
@pytest.mark.parametrize("seed", range(8))
def test_what_rounding_makes_of_zero_is_no_eigenvalue(kind, seed):
    operator = NEARLY_SINGULAR[kind](of_too_few_rows(seed))
    with pytest.raises(ValueError, match=r"singular to the precision of torch\.float32"):
        operator.inverse()
    with pytest.raises(ValueError, match="singular"):
        operator.solve(torch.ones(operator.shape[0]))
    with pytest.raises(ValueError, match="singular"):
        operator.power(-0.5)
    with pytest.raises(ValueError, match="singular"):
        operator.inverse(1e-8)  # less than what rounding did to the eigenvalues
    assert operator.logdet() == -torch.inf
    shifted = operator.to_dense().double() + torch.eye(operator.shape[0]).double()
    assert_close(operator.inverse(1.0).to_dense().double(), torch.linalg.inv(shifted), 1e-4)


def test_small_entries_of_a_diagonal_are_no_rounding():
    operator = fg.DiagonalOperator(torch.tensor([[1e-12, 1.0], [4.0, 1e-20]]))
    assert_close(operator.inverse().diagonal(), torch.tensor([1e12, 1.0, 0.25, 1e20]), 1e-6)
    assert float(operator.logdet()) == pytest.approx(np.log(4e-32), rel=1e-6)
    with pytest.raises(ValueError, match="singular"):
        fg.DiagonalOperator(torch.tensor([[1e-40, 1.0]])).inverse()  # 1e40 is no number of float32


def test_kronecker_factors_are_as_singular_as_each_is_alone():
    """Both have a condition of 1e4, their product of 1e8, which is more than float32 could tell from a singular matrix."""
    bases = [orthogonal(size, size, seed=size) for size in (P, Q)]
    exact = [(u * torch.logspace(0, -4, len(u)).double()) @ u.T for u in bases]
    operator = fg.KroneckerOperator(*(one.float() for one in exact))
    inverses = [torch.linalg.inv(one.double()) for one in operator.factors()]
    assert_close(operator.inverse().to_dense().double(), torch.kron(*inverses), 1e-4)
    expected = Q * torch.logdet(exact[0]) + P * torch.logdet(exact[1])
    assert float(operator.logdet()) == pytest.approx(float(expected), rel=1e-3)


def with_nan(matrix):
    matrix = matrix.clone()
    matrix[0, 1] = matrix[1, 0] = torch.nan
    return matrix


@pytest.mark.parametrize("size", [P, 40])
@pytest.mark.parametrize("kind", ["dense", "sum", "diagonal", "kronecker", "exact"])
def test_nan_is_not_read_as_eigenvalues(kind, size):
    """torch's eigensolver gives a matrix with NaN the eigenvalues of another one, without an error."""
    operator = {
        "dense": lambda: fg.DenseOperator(with_nan(psd(size))),
        "sum": lambda: fg.DenseOperator(with_nan(psd(size))) + fg.DenseOperator(psd(size)),
        "diagonal": lambda: fg.DiagonalOperator(with_nan(psd(size)).square()),
        "kronecker": lambda: fg.KroneckerOperator(psd(2), with_nan(psd(size))),
        "exact": lambda: fg.ExactOperator(random(3, 2), with_nan(random(3, size)), torch.ones(3).long(), 3),
    }[kind]()
    for question in (operator.inverse, operator.sqrt, operator.logdet, lambda: operator.power(0.5, damping=1.0)):
        with pytest.raises(ValueError, match="NaN"):
            question()
    if kind not in ("diagonal", "exact"):
        with pytest.raises(ValueError, match="NaN"):
            operator.eigh()


@pytest.mark.parametrize("kind", [fg.DenseOperator, fg.DiagonalOperator, lambda m: fg.KroneckerOperator(m, m)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_operators_of_other_than_floating_dtypes_are_refused(kind, dtype):
    with pytest.raises(TypeError, match="real floating dtype"):
        kind(torch.eye(2).to(dtype))


def test_sides_that_there_are_not_are_refused(operator):
    for side in ("outputs", "both", None):
        with pytest.raises(ValueError, match="side must be one of"):
            operator.partial_trace(side)
    with pytest.raises(ValueError, match="side must be one of"):
        fg.DenseOperator(psd(P), side="outputs")


def test_one_quadratic_form_takes_one_update(operator):
    for wrong in (random(2, P, Q), random(P, 2, Q), random(P), fg.LowRank(random(P, P, 1), random(P, 1, Q))):
        with pytest.raises(ValueError, match="does not fit"):
            operator.quadratic(wrong)
    with pytest.raises(ValueError, match="does not fit"):
        operator.apply(random(P * Q))


@pytest.mark.parametrize("name", ["diagonal", "kronecker", "spectral kronecker", "eigen-kronecker", "exact of few"])
def test_multiples_and_sums_know_the_shape_of_their_layer(name):
    operator = CASES[name]()
    for one in (operator, 2 * operator, operator + operator):
        with pytest.raises(ValueError, match=rf"layer of shape \({P}, {Q}\)"):
            one.apply(random(Q, P))
        with pytest.raises(ValueError, match=rf"layer of shape \({P}, {Q}\)"):
            one.quadratic(random(Q, P))


def test_the_change_of_every_example_asks_for_one_update_or_several():
    for wrong in (random(2, 1, P, Q), random(P * Q), fg.LowRank(random(2, P, 1), random(2, 1, Q))):
        with pytest.raises(ValueError, match="does not fit"):
            exact(5).inner(wrong)


@settings(deadline=None, max_examples=20)
@given(rank=st.integers(1, 4), rows=st.integers(1, 300), seed=st.integers(0, 20))
def test_tiles_of_the_factored_diagonal_form_cover_every_row(rank, rows, seed):
    operator = fg.DiagonalOperator(random(rows, 5, seed=seed).square())
    left, right = random(rows, rank, seed=seed + 1), random(rank, 5, seed=seed + 2)
    assert_close(operator.quadratic(fg.LowRank(left, right)), operator.quadratic(left @ right), 1e-12)


def sketch():
    torch.manual_seed(0)
    model, rows = torch.nn.Linear(Q, P).double(), [random(5, 2, Q)]
    return fg.estimate_fisher(model, rows, rank=2, probes=2, loss=lambda m, b: m(b).sin().sum((1, 2)))[""]


@pytest.mark.parametrize("name", [*(name for name in CASES if not name.startswith("streaming")), "sketch"])
def test_an_operator_is_made_again_of_its_tensors(name):
    operator = sketch() if name == "sketch" else CASES[name]()
    kind, tensors = type(operator).__name__, operator.tensors()
    again = fg.operator_from_tensors(kind, tensors, operator.side)
    assert type(again) is type(operator) and again.side == operator.side
    assert (again.shape, again.dtype, again.device) == (operator.shape, operator.dtype, operator.device)
    assert again.tensors().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.tensors().items())
    block = random(operator.shape[0], 3, seed=5)
    assert torch.equal(again @ block, operator @ block)
    if name == "sketch":
        assert again.error() == operator.error()


def test_a_compact_operator_has_contiguous_tensors_and_no_more_than_products_need(operator):
    turned = operator
    if not isinstance(operator, fg.SumOperator) and operator.compact() is not operator:
        turned = operator.from_tensors(
            {n: (t if t.ndim < 2 else t.mT.contiguous().mT) for n, t in operator.tensors().items()}, operator.side
        )
    found = turned.compact()
    assert_close(found.to_dense(), operator.to_dense())
    if found is not turned:
        assert all(tensor.is_contiguous() for tensor in found.tensors().values())
    assert type(sketch().compact()) is fg.SpectralOperator


def test_an_operator_that_reads_data_has_no_tensors_and_an_unknown_class_is_named():
    with pytest.raises(TypeError, match="StreamingOperator is not made of tensors"):
        streaming("both").tensors()
    with pytest.raises(ValueError, match="no operator class 'Nonsense'"):
        fg.operator_from_tensors("Nonsense", {})


def test_the_factors_of_an_operator_are_those_of_its_kronecker_product(operator):
    factors = operator.factors()
    if operator.side == "both" and factors == (None, None):
        return
    dense = [
        torch.eye(size).double() if one is None else one if isinstance(one, torch.Tensor) else one.to_dense()
        for one, size in zip(factors, (P, Q), strict=True)
    ]
    delta = random(P, Q, seed=9)
    assert_close(operator.quadratic(delta), ((dense[0] @ delta) * (delta @ dense[1])).sum())


@pytest.mark.parametrize("name", ["diagonal", "eigen-kronecker", "kronecker"])
def test_second_derivatives_in_factors_are_those_of_the_dense_form(name):
    operator, left, right = CASES[name](), random(P, 2), random(2, Q, seed=1)
    hessians = [
        torch.autograd.functional.hessian(lambda x, form=form: operator.quadratic(form(x)), left)
        for form in (lambda x: fg.LowRank(x, right), lambda x: x @ right)
    ]
    assert_close(*hessians)
    assert torch.autograd.gradgradcheck(
        lambda l, r: operator.quadratic(fg.LowRank(l, r)), (left.requires_grad_(), right.requires_grad_())
    )


def test_entries_that_ask_for_a_gradient_get_it_from_factors_too():
    entries, update = random(P, Q).square().requires_grad_(), fg.LowRank(random(P, 2), random(2, Q, seed=1))
    (found,) = torch.autograd.grad(fg.DiagonalOperator(entries).quadratic(update), entries)
    assert_close(found, update.to_dense().square())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quadratic_forms_of_half_precision_do_not_leave_its_range(dtype):
    update = fg.LowRank(torch.full((100, 1), 1e-4), torch.ones(1, 100))
    for operator, wanted in (
        (fg.DiagonalOperator(torch.full((100, 100), 50.0, dtype=dtype)), 50 * 1e-4),
        (fg.KroneckerOperator(torch.eye(100, dtype=dtype), 50 * torch.eye(100, dtype=dtype)), 50 * 1e-4),
        (fg.DenseOperator(torch.eye(100, dtype=dtype)) * 3.0, 3 * 1e-4),
    ):
        for form in (update, update.to_dense()):
            value = operator.quadratic(form)
            assert value.dtype == torch.float32 and float(value) == pytest.approx(wanted, rel=1e-3)


def test_functions_of_an_indefinite_operator_are_its_own_or_refused():
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()  # 3 and -1
    operator, eye = fg.DenseOperator(matrix), torch.eye(2).double()
    assert_close(operator.inverse(2.0).to_dense(), torch.linalg.inv(matrix + 2 * eye))
    assert_close(operator.solve(torch.tensor([1.0, -1.0]).double(), 2.0), torch.tensor([1.0, -1.0]).double())
    assert_close(operator.logdet(2.0), torch.logdet(matrix + 2 * eye))
    for call in (operator.sqrt, lambda: operator.inverse(0.5), operator.logdet):
        with pytest.raises(ValueError, match="not positive semi-definite: its least eigenvalue is -1"):
            call()
    noise = -20 * torch.finfo(torch.float32).eps  # as a float32 sum of thousands of batches leaves it
    assert fg.DenseOperator(torch.diag(torch.tensor([4.0, noise]))).sqrt().to_dense().diagonal().tolist() == [2.0, 0.0]
    lifted = fg.DenseOperator(torch.diag(torch.tensor([1.0, -3e-4])))  # what damping lifts is not taken for noise
    assert float(lifted.inverse(0.01).to_dense()[1, 1]) == pytest.approx(1 / (0.01 - 3e-4), rel=1e-5)
    for half, entry in ((torch.float16, -0.03), (torch.bfloat16, -0.08)):
        with pytest.raises(ValueError, match="not positive semi-definite"):
            fg.DenseOperator(torch.diag(torch.tensor([1.0, entry])).to(half)).inverse(0.01)
    entries = fg.DiagonalOperator(torch.tensor([[3.0, -1e-9]]).double())
    with pytest.raises(ValueError, match="least eigenvalue is -1e-09"):
        entries.power(0.5)


def test_known_pairs_come_in_order_and_zeros_count_among_them():
    vectors = orthogonal(P, 2)
    unsorted = fg.SpectralOperator(torch.tensor([1.0, 5.0]).double(), vectors)
    assert float(unsorted.eigh(1)[0]) == 5
    assert_close(unsorted.eigh(1)[1].abs(), vectors[:, 1:].abs())
    below = fg.SpectralOperator(torch.tensor([-1.0, -2.0]).double(), vectors)
    assert_close(below.eigh(3)[0], torch.linalg.eigvalsh(below.to_dense()).flip(0)[:3], 1e-10)


def test_a_log_determinant_is_not_rounded_to_the_dtype_of_the_operator():
    operator = fg.DiagonalOperator(torch.full((1000, 1000), 3.0))
    assert float(operator.logdet(1.0)) == pytest.approx(1e6 * torch.tensor(4.0).double().log().item(), rel=1e-13)


@pytest.mark.parametrize(("entry", "exponent"), [(1e20, 3.0), (1e-20, -3.0)])
def test_a_power_that_leaves_the_dtypes_range_is_refused(entry, exponent):
    operator = fg.DiagonalOperator(torch.full((2, 2), entry))
    with pytest.raises(ValueError, match=f"exponent={exponent:g} of"):
        operator.power(exponent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quadratic_forms_of_a_stack_do_not_leave_the_range_of_half_precision(dtype):
    torch.manual_seed(0)
    make = lambda size: (lambda m: m @ m.T)(torch.randn(size, size)).to(dtype)
    operators = [fg.KroneckerOperator(1e3 * make(6), 1e3 * make(5)) for _ in range(3)]
    delta = fg.LowRank(torch.randn(3, 6, 2).to(dtype), torch.randn(3, 2, 5).to(dtype))
    found = fg.stacked_quadratic(operators, delta)
    each = torch.stack([op.quadratic(delta[place]) for place, op in enumerate(operators)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, each, rtol=1e-4, atol=0)


def test_an_inverse_does_not_grow_with_damping():
    operator = fg.DenseOperator(torch.diag(torch.tensor([1.0, -1.5e-6])))  # as rounding leaves zero in a sum of batches
    for damping in (1.4e-6, 2.1e-6, 2.5e-6, 4e-6, 1e-3):
        found = operator.inverse(damping).to_dense().diagonal()
        torch.testing.assert_close(found, 1 / (torch.tensor([1.0, 0.0]) + damping), rtol=1e-4, atol=0)
