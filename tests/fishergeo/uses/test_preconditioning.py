"""Natural gradient steps against dense inverses, their laws, and what is refused or told."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import EXPERTS, Routed, routed_batch, summed
from uses_cases import LAYERS, STRUCTURES, classifier, dense_fisher, estimated, examples, loss, moved, weights

import fishergeo as fg

SEEDS = st.integers(0, 99)


def backward(model, data):
    model.zero_grad()
    loss(model, data).mean().backward()
    w, b, v = model[0].weight.grad, model[0].bias.grad, model[2].weight.grad
    return {"0+bias": torch.cat([w, b[:, None]], 1).clone(), "2": v.clone()}


def sgd(model, lr=0.5):
    return torch.optim.SGD(model.parameters(), lr=lr)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_step_is_the_dense_inverse_times_the_gradient(structure):
    model, data = classifier(), examples(9)
    fisher, dense, before = estimated(model, data, structure), dense_fisher(model, data, structure), weights(model)
    optimizer = sgd(model)
    with pytest.warns(UserWarning, match=r"1 parameters have no Fisher.*2\.bias"):
        fg.natural_gradient(model, fisher, optimizer, damping=0.1)
    bias = model[2].bias.detach().clone()
    gradient = backward(model, data)
    plain = model[2].bias.grad.clone()
    optimizer.step()
    for name in LAYERS:
        damped = dense[name] + 0.1 * torch.eye(len(dense[name]), dtype=torch.float64)
        expected = before[name] - 0.5 * torch.linalg.solve(damped, gradient[name].flatten()).reshape(before[name].shape)
        assert (weights(model)[name] - expected).norm() <= 1e-8 * expected.norm()
    assert torch.equal(model[2].bias, bias - 0.5 * plain)


@settings(deadline=None, max_examples=6)
@given(seed=SEEDS, structure=st.sampled_from(STRUCTURES))
def test_it_is_a_direction_of_descent(seed, structure):
    model, data = classifier(seed), examples(9, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        natural = fg.natural_gradient(model, estimated(model, data, structure), sgd(model), damping=0.01)
    gradient = backward(model, data)
    assert all(float((natural.inverses[name].apply(g) * g).sum()) > 0 for name, g in gradient.items())


@settings(deadline=None, max_examples=6)
@given(seed=SEEDS)
def test_an_identity_fisher_leaves_the_step_as_it_is(seed):
    one, two = classifier(seed), classifier(seed)
    data = examples(5, seed)
    optimizers = [sgd(one), sgd(two)]
    fisher = {"2": fg.DiagonalOperator(torch.ones(3, 4).double())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fg.natural_gradient(one, fisher, optimizers[0])
    for model, optimizer in zip((one, two), optimizers, strict=True):
        backward(model, data)
        optimizer.step()
    assert torch.allclose(weights(one)["2"], weights(two)["2"], atol=1e-15)


def test_one_step_of_newton_solves_least_squares():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2, bias=False).double()
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()
    squares = lambda model, batch: 0.5 * (model(batch[0]) - batch[1]).square().sum(1)
    optimizer = sgd(model, lr=1.0)
    curvature = {"": fg.KroneckerOperator(torch.eye(2).double(), x.T @ x / 30)}
    fg.natural_gradient(model, curvature, optimizer)
    squares(model, (x, y)).mean().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.linalg.lstsq(x, y).solution.T, atol=1e-10)


def test_a_fisher_is_refreshed_and_the_handle_taken_away():
    model, data = classifier(), examples(9)
    optimizer = sgd(model)
    with pytest.warns(UserWarning, match="no Fisher"):
        natural = fg.natural_gradient(model, estimated(model, data, "kfac"), optimizer, damping=0.1)
    moved(model)
    with pytest.raises(ValueError, match="fingerprint"):
        natural.refresh(estimated(classifier(), data, "kfac"))
    first = natural.inverses["2"].to_dense()
    natural.refresh(estimated(model, data, "kfac"))
    assert not torch.allclose(natural.inverses["2"].to_dense(), first)
    natural.remove()
    before, gradient = weights(model)["2"], backward(model, data)["2"]
    optimizer.step()
    assert torch.allclose(weights(model)["2"], before - 0.5 * gradient, atol=1e-15)
    optimizer.zero_grad()
    optimizer.step()  # nothing to turn


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_gradients_that_a_closure_makes_are_turned(how, momentum):
    """Steps along the gradient (1, 1) under F = diag(1, 4), against steps along (1, 1/4) without a Fisher."""
    moves = []
    for turned in (True, False):
        model = torch.nn.Linear(2, 1, bias=False).double()
        torch.nn.init.zeros_(model.weight)
        chosen = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
        if turned:
            fg.natural_gradient(model, {"": fg.DiagonalOperator(torch.tensor([[1.0, 4.0]]).double())}, chosen)
        batch = torch.tensor([[1.0, 1.0 if turned else 0.25]]).double()

        def closure(model=model, chosen=chosen, batch=batch):
            chosen.zero_grad()
            value = model(batch).sum()
            value.backward()
            return value

        for _ in range(2):
            value = chosen.step(closure) if how == "positional" else chosen.step(closure=closure)
        assert isinstance(value, torch.Tensor)
        moves.append(model.weight.detach())
    assert torch.allclose(*moves, atol=1e-15)
    assert moves[0].tolist() == [[-2.0 - momentum, -0.5 - momentum / 4]]


def test_every_call_of_a_closure_is_turned_once():
    class Twice(torch.optim.SGD):
        """Adds the gradients of two calls, as steps that look ahead do."""

        def step(self, closure=None):
            parameter = self.param_groups[0]["params"][0]
            with torch.enable_grad():
                closure()
                first = parameter.grad.clone()
                closure()
            parameter.grad.add_(first)
            with torch.no_grad():
                parameter -= parameter.grad

    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = Twice(model.parameters(), lr=1.0)
    natural = fg.natural_gradient(model, {"": fg.DiagonalOperator(torch.tensor([[1.0, 4.0]]))}, optimizer)

    def closure():
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()

    optimizer.step(closure)
    assert model.weight.tolist() == [[-2.0, -0.5]]
    natural.remove()
    optimizer.step(closure)
    assert model.weight.tolist() == [[-4.0, -2.5]]


def test_what_cannot_be_turned_is_refused():
    model, data = classifier(), examples()
    fisher = estimated(model, data, "kfac")
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(TypeError, match="LBFGS"):
        fg.natural_gradient(model, fisher, optimizer, damping=1.0)
    assert not optimizer._optimizer_step_pre_hooks
    without_bias = torch.optim.SGD([model[0].weight, model[2].weight])
    with pytest.raises(ValueError, match=r"the optimizer has no weight of layer '0\+bias'"):
        fg.natural_gradient(model, fisher, without_bias, damping=1.0)
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layer '0\+bias' joins a weight and a bias of which only one trains"):
        fg.natural_gradient(model, fisher, sgd(model), damping=1.0)


def test_what_is_refused_is_named():
    model, data = classifier(), examples()
    fisher = estimated(model, data, "kfac")
    with pytest.raises(ValueError, match="fingerprint"):
        fg.natural_gradient(moved(classifier()), fisher, sgd(model))
    with pytest.raises(ValueError, match="damping=0 leaves layer '2' singular"):
        fg.natural_gradient(model, fisher, sgd(model))
    with pytest.raises(ValueError, match="damping"):
        fg.natural_gradient(model, fisher, sgd(model), damping=-1.0)
    optimizer = torch.optim.SGD([model[0].weight, model[0].bias])
    with pytest.raises(ValueError, match="no weight of layer '2'"):
        fg.natural_gradient(model, fisher, optimizer, damping=1.0)
    assert not optimizer._optimizer_step_pre_hooks


def two_weights(operator=None):
    """A weight (1, 2) at zero under F = diag(1, 4), whose gradient is (1, 1)."""
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fisher = {"": fg.DiagonalOperator(torch.tensor([[1.0, 4.0]]))}
    return model, optimizer, fisher, fg.natural_gradient(model, fisher, optimizer)


def test_gradients_that_are_kept_are_not_turned_twice():
    model, optimizer, _, _ = two_weights()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert model.weight.grad.tolist() == [[1.0, 1.0]]
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), -torch.tensor([[2.0, 0.5]]))
    model(torch.ones(1, 2)).sum().backward()  # adds up to (2, 2)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), -torch.tensor([[4.0, 1.0]]))


def test_a_second_natural_gradient_on_one_optimizer_is_refused():
    model, optimizer, fisher, first = two_weights()
    with pytest.raises(ValueError, match=r"layer '' has a natural gradient on this optimizer already; refresh"):
        fg.natural_gradient(model, fisher, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()  # the refused one left no hook
    torch.testing.assert_close(model.weight.detach(), -torch.tensor([[1.0, 0.25]]))
    first.remove()
    fg.natural_gradient(model, fisher, optimizer)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), -torch.tensor([[2.0, 0.5]]))


def test_a_parameter_that_two_layers_hold_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    batches = [torch.eye(2)]
    fisher = fg.estimate_fisher(model, batches, "diagonal", layers=["*", "*+bias"], loss=lambda m, b: m(b)[:, 0])
    assert set(fisher) == {"0", "0+bias"}  # each of them is right by itself
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    uses = [
        lambda: fg.natural_gradient(model, fisher, optimizer, damping=1.0),
        lambda: fg.QuadraticPenalty(model, fisher),
        lambda: fg.merge_weights([model, model], [fisher, fisher]),
        lambda: fg.Laplace(model, fisher),
        lambda: fg.rank_pattern(fisher, budget=20),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"hold one parameter|'0' twice"):
            use()


def test_experts_of_one_stack_get_their_gradients_back():
    model = Routed()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fisher = fg.estimate_fisher(model, [routed_batch()], "diagonal", layers=EXPERTS, loss=summed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fg.natural_gradient(model, fisher, optimizer, damping=1.0)
    summed(model, routed_batch()).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    assert before and all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in before.items())
