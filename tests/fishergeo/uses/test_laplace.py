"""The Laplace approximation against dense Gaussians, its laws, and what is refused."""

import copy
import math

import pytest
import torch
from architectures import make, move
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import EXPERTS, Routed, expert_gradients, routed_batch
from uses_cases import (
    LAYERS,
    STRUCTURES,
    batches,
    classifier,
    dense_fisher,
    estimated,
    examples,
    gradients,
    moved,
    psd,
    random,
    weights,
)

import fishergeo as fg

SEEDS = st.integers(0, 99)


def outputs(model, batch):
    return model(batch[0])


def covariances(model, data, structure, tau):
    dense = dense_fisher(model, data, structure)
    return {n: torch.linalg.inv(len(data[0]) * f + tau * torch.eye(len(f), dtype=f.dtype)) for n, f in dense.items()}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_variance_of_linearised_outputs_is_the_dense_one(structure):
    model, data, asked = classifier(), examples(9), examples(4, seed=30)
    laplace = fg.Laplace(model, estimated(model, data, structure), prior_precision=0.7)
    jacobians = [gradients(model, asked, lambda out, y, c=c: out[c]) for c in range(3)]
    expected = 0.0
    for name, sigma in covariances(model, data, structure, 0.7).items():
        j = torch.stack([one[name].flatten(1) for one in jacobians], 1)
        expected = expected + j @ sigma @ j.mT
    found = laplace.predictive_covariance(batches(asked, 3), outputs)
    assert found.shape == (4, 3, 3) and (found - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_evidence_is_that_of_the_dense_gaussian(structure):
    model, data = classifier(), examples(9)
    laplace = fg.Laplace(model, estimated(model, data, structure), prior_precision=0.7)
    for tau, found in ((0.7, laplace.log_marginal_likelihood(-5.0)), (2.0, laplace.log_marginal_likelihood(-5.0, 2.0))):
        expected = -5.0
        for name, sigma in covariances(model, data, structure, tau).items():
            w = weights(model)[name].flatten()
            expected += float(0.5 * (torch.logdet(sigma) + len(w) * math.log(tau) - tau * w @ w))
        assert abs(found - expected) <= 1e-8 * abs(expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_draws_have_the_covariance_of_the_dense_gaussian(structure):
    model, data = classifier(), examples(9)
    laplace = fg.Laplace(model, estimated(model, data, structure), prior_precision=1.0)
    drawn = laplace.sample(20_000)
    for name, sigma in covariances(model, data, structure, 1.0).items():
        away = (drawn[name] - weights(model)[name]).flatten(1)
        assert (away.T @ away / len(away) - sigma).norm() <= 0.05 * sigma.norm()
        assert away.mean(0).norm() <= 0.05 * sigma.diagonal().sum().sqrt()


@pytest.mark.parametrize("side", ["output", "input"])
def test_one_sided_operators(side):
    model, matrix = classifier(), psd(3 if side == "output" else 4)
    laplace = fg.Laplace(model, {"2": fg.DenseOperator(matrix, side)}, 0.5, examples=10)
    whole = torch.kron(matrix, torch.eye(4).double()) if side == "output" else torch.kron(torch.eye(3).double(), matrix)
    w = weights(model)["2"].flatten()
    volume = torch.logdet(10 * whole + 0.5 * torch.eye(12).double())
    expected = float(0.5 * (12 * math.log(0.5) - 0.5 * w @ w - volume))
    assert abs(laplace.log_marginal_likelihood(0.0) - expected) <= 1e-9 * abs(expected)


@settings(deadline=None, max_examples=8)
@given(seed=SEEDS, structure=st.sampled_from(STRUCTURES))
def test_variances_are_positive_and_shrink_with_the_prior(seed, structure):
    model, data, asked = classifier(seed), examples(6, seed), examples(2, seed + 50)
    fisher = estimated(model, data, structure)
    loose, tight = (fg.Laplace(model, fisher, tau).predictive_covariance([asked], outputs) for tau in (0.5, 5.0))
    for one in (loose, tight, loose - tight):
        assert float(torch.linalg.eigvalsh(one).min()) >= -1e-12 * float(loose.abs().max())


@settings(deadline=None, max_examples=6)
@given(seed=SEEDS)
def test_without_curvature_it_is_the_prior(seed):
    model, asked = classifier(seed), examples(3, seed)
    laplace = fg.Laplace(model, {"2": fg.DiagonalOperator(torch.zeros(3, 4).double())}, 4.0, examples=1)
    j = torch.stack([gradients(model, asked, lambda out, y, c=c: out[c])["2"].flatten(1) for c in range(3)], 1)
    assert torch.allclose(laplace.predictive_covariance([asked], outputs), j @ j.mT / 4, atol=1e-12)
    w = weights(model)["2"]
    assert abs(laplace.log_marginal_likelihood(0.0) + 2 * float(w.square().sum())) <= 1e-9


@settings(deadline=None, max_examples=6)
@given(seed=SEEDS)
def test_more_examples_like_the_seen_ones_leave_less_doubt(seed):
    model, data = classifier(seed), examples(6, seed)
    fisher = estimated(model, data, "kfac")
    few, many = (
        fg.Laplace(model, fisher, 1.0, examples=n).predictive_covariance([data], outputs).diagonal(dim1=1, dim2=2)
        for n in (6, 60)
    )
    assert bool((many <= few).all())


def test_draws_are_put_in_and_taken_out_again_to_the_bit():
    model, data = classifier(), examples()
    laplace = fg.Laplace(model, estimated(model, data, "ekfac"))
    before, drawn = copy.deepcopy(model.state_dict()), laplace.sample(2, seed=3)
    assert torch.equal(laplace.sample(2, seed=3)["2"], drawn["2"])
    assert not torch.equal(laplace.sample(2, seed=4)["2"], drawn["2"])
    with laplace.using({name: each[1] for name, each in drawn.items()}) as there:
        assert there is model and torch.equal(weights(model)["0+bias"], drawn["0+bias"][1])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    moved(model)
    assert torch.equal(laplace.mean["2"], before["2.weight"])  # of the weights that the Fisher is of


def test_a_draw_of_an_adapted_weight_is_what_the_model_then_acts_with():
    adapted = make()
    move(adapted)
    name = next(n for n, _ in adapted.named_modules() if n.endswith("q_proj.base_layer"))
    laplace = fg.Laplace(adapted, {name: fg.DiagonalOperator(torch.ones(16, 16).double())}, 1.0, examples=4)
    drawn = laplace.sample(1)[name][0]
    x = random(2, 16)
    wrapper = adapted.get_submodule(name.removesuffix(".base_layer"))
    with laplace.using({name: drawn}), torch.no_grad():
        assert torch.allclose(wrapper(x), x @ drawn.T, atol=1e-12)


def test_what_is_refused_is_named():
    model, data = classifier(), examples()
    fisher = estimated(model, data, "kfac")
    with pytest.raises(ValueError, match="fingerprint"):
        fg.Laplace(moved(classifier()), fisher)
    with pytest.raises(ValueError, match="examples="):
        fg.Laplace(model, {"2": fisher["2"]})
    with pytest.raises(ValueError, match="prior_precision"):
        fg.Laplace(model, fisher, 0.0)
    with pytest.raises(ValueError, match="singular"):
        fg.Laplace(model, fisher, 1e-20)
    with pytest.raises(ValueError, match="prior_precision lacks layer '2'"):
        fg.Laplace(model, fisher, {"0+bias": 1.0})
    laplace = fg.Laplace(model, fisher, dict.fromkeys(LAYERS, 1.0))
    with pytest.raises(ValueError, match=r"leaves layer .* singular to the precision of torch.float64"):
        laplace.log_marginal_likelihood(-1.0, 1e-20)
    with pytest.raises(ValueError, match=r"^layer '2': .* not positive semi-definite"):
        fg.Laplace(model, {"2": fg.DenseOperator(torch.diag(torch.tensor([1.0, 1.0, -1.0])))}, 0.1, examples=1)
    with pytest.raises(ValueError, match="count"):
        laplace.sample(0)
    with pytest.raises(ValueError, match="'3'"), laplace.using({"3": torch.ones(2, 2)}):
        pass
    reshaped = laplace.mean[LAYERS[0]].reshape(1, -1)
    with pytest.raises(ValueError, match="outputs by inputs"), laplace.using({LAYERS[0]: reshaped}):
        pass
    with pytest.raises(ValueError, match="must be"):
        laplace.predictive_covariance([data], lambda model, batch: model(batch[0]).sum(1))
    with pytest.raises(ValueError, match="no batch"):
        laplace.predictive_covariance([], outputs)


@pytest.mark.parametrize("names", [EXPERTS[1:], EXPERTS])
def test_examples_that_an_expert_does_not_see_have_their_own_variance(names):
    model, x = Routed(), routed_batch(5, 1)
    fisher = {name: fg.DiagonalOperator(random(3, 4, seed=5).square()) for name in names}
    found = fg.Laplace(model, fisher, 0.7, examples=3).predictive_covariance(
        [x[:2], x[2:]], lambda model, x: model(x).flatten(1)
    )
    columns = [expert_gradients(model, x, lambda model, x, c=c: model(x).flatten(1)[:, c]) for c in range(3)]
    expected = 0.0
    for name in names:
        j = torch.stack([one[name].flatten(1) for one in columns], 1)
        expected = expected + (j / (3 * fisher[name].entries + 0.7).flatten()) @ j.mT
    assert found.shape == (5, 3, 3) and (found - expected).norm() <= 1e-10 * expected.norm()


def test_one_example_proves_nothing_of_several():
    class TimeFirst(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 6), torch.nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x.transpose(0, 1)))).mean(0)

    torch.manual_seed(0)
    model, x = TimeFirst().double(), torch.randn(4, 4, 3, dtype=torch.float64)
    laplace = fg.Laplace(model, {"a": fg.DiagonalOperator(torch.ones(6, 3).double())}, examples=4)
    with pytest.raises(RuntimeError, match="not autograd's"):
        laplace.predictive_covariance([x[:1], x], lambda model, x: model(x))
