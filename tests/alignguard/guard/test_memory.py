"""Readings remembered, and the proximal step that heeds them."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kl import guarded, move, rows, weights

from alignguard.guard import Guard, GuardConfig
from alignguard.guard.legs import memory as memory_module
from alignguard.guard.legs.memory import Memory
from alignguard.guard.legs.optimizers import Metric, measures, metric_of
from fishergeo.planning.dryrun import Meter

SHAPES = ((3, 2), (4,), (2, 3))


def draw(generator):
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def remembered(seed, count=3, length=5):
    """A memory, and (value, gradient, where) of each reading."""
    generator = torch.Generator().manual_seed(seed)
    memory, read = Memory(length), []
    for _ in range(count):
        weights, gradient = draw(generator), flat(draw(generator))
        value = float(torch.rand((), generator=generator)) + 0.1
        memory.add(value, gradient, weights)
        read.append((value, gradient, flat(weights)))
    return memory, read, draw(generator), [t.square() + 0.3 for t in draw(generator)]


def model_of(read, at):
    """By its definition."""
    return sum((k + g @ (at - b) + (g @ (at - b)) ** 2 / (4 * k)) for k, g, b in read) / len(read)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5))
def test_the_value_and_its_slope_are_those_of_the_quadratics(seed, count):
    memory, read, weights, _ = remembered(seed, count)
    at = [w.requires_grad_() for w in weights]
    (3 * memory.value(at)).backward()
    want = flat(weights).detach().requires_grad_()
    (3 * model_of(read, want)).backward()
    assert float(memory.value(at).detach()) == pytest.approx(float(model_of(read, want).detach()), rel=1e-9)
    torch.testing.assert_close(flat([w.grad for w in weights]), want.grad, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), strength=st.sampled_from([0.1, 4.0, 1e6]))
def test_the_step_ends_where_the_slope_there_is_what_it_took(seed, count, strength):
    memory, read, weights, scales = remembered(seed, count)
    floor = torch.stack([g for _, g, _ in read]).square().mean(0).sqrt()
    step = 0.3 / torch.maximum(flat(scales), floor)
    before = flat(weights)
    memory.step(weights, [Metric(0.3, s.square()) for s in scales], strength)
    after = flat(weights).requires_grad_()
    (strength * model_of(read, after)).backward()
    torch.testing.assert_close((after - before).detach(), -step * after.grad, rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 5),
    strength=st.sampled_from([0.1, 4.0, 1e6]),
    climb=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_a_step_that_would_climb_too_far_is_the_best_of_those_that_do_not(seed, count, strength, climb):
    memory, read, weights, scales = remembered(seed, count)
    uphill = draw(torch.Generator().manual_seed(seed + 1))
    floor = torch.stack([g for _, g, _ in read]).square().mean(0).sqrt()
    step, before, along = 0.3 / torch.maximum(flat(scales), floor), flat(weights), flat(uphill)
    free = [w.clone() for w in weights]
    memory.step(free, [Metric(0.3, s.square()) for s in scales], strength)
    metric = [Metric(0.3, s.square(), u) for s, u in zip(scales, uphill, strict=True)]
    unbounded = [w.clone() for w in weights]
    memory.step(unbounded, metric, strength)
    torch.testing.assert_close(flat(unbounded), flat(free))
    memory.step(weights, metric, strength, climb)
    moved, allowed = flat(weights) - before, climb * float(step @ along.square())
    if float(along @ (flat(free) - before)) <= allowed:
        torch.testing.assert_close(flat(weights), flat(free))
        return
    assert float(along @ moved) == pytest.approx(
        allowed, rel=1e-6, abs=1e-8 * float(along.norm() * moved.norm()) + 1e-12
    )
    # The conditions of Karush, Kuhn and Tucker: the slope at the end is the plane's normal alone, and pushes against it.
    after = flat(weights).requires_grad_()
    (strength * model_of(read, after)).backward()
    slope = moved / step + after.grad
    share = float(along @ slope / along.square().sum())
    torch.testing.assert_close(slope, share * along, rtol=1e-5, atol=1e-6 * max(1.0, strength))
    assert share < 0


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6), strength=st.sampled_from([1e-3, 1.0, 1e3, 1e9]), rate=st.sampled_from([1e-4, 1.0, 1e4])
)
def test_no_strength_and_no_rate_overshoots(seed, strength, rate):
    memory, _, weights, _ = remembered(seed)
    before = float(memory.value(weights))
    memory.step(weights, [Metric(rate)] * len(weights), strength)
    assert float(memory.value(weights)) <= before * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 6), climb=st.sampled_from([None, 0.0, 0.1]), moved=st.booleans()
)
def test_after_a_step_and_another_reading_the_value_is_that_of_the_weights_as_they_are(seed, count, climb, moved):
    memory, read, weights, scales = remembered(seed, count)
    generator = torch.Generator().manual_seed(seed + 1)
    uphill, gradient = draw(generator), flat(draw(generator))
    memory.step(weights, [Metric(0.3, s.square(), u) for s, u in zip(scales, uphill, strict=True)], 4.0, climb)
    memory.add(0.2, gradient, weights)
    read = [*read, (0.2, gradient, flat(weights))][-5:]
    if moved:
        weights[1] += 0.1
    want = float(model_of(read, flat(weights)))
    assert float(memory.value(weights)) == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("block", [1, 6, 1 << 16])
def test_neither_blocks_nor_rates_that_differ_change_a_step(monkeypatch, block):
    monkeypatch.setattr(memory_module, "_BLOCK", block)
    memory, read, weights, scales = remembered(7)
    uphill = draw(torch.Generator().manual_seed(8))
    rates = (0.3, 0.3, 0.1)
    floor = torch.stack([g for _, g, _ in read]).square().mean(0).sqrt()
    rate = torch.cat(
        [torch.full(shape, r, dtype=torch.float64).flatten() for shape, r in zip(SHAPES, rates, strict=True)]
    )
    step, before = rate / torch.maximum(flat(scales), floor), flat(weights)
    memory.step(weights, [Metric(r, s.square(), u) for r, s, u in zip(rates, scales, uphill, strict=True)], 2.0)
    after = flat(weights).requires_grad_()
    (2.0 * model_of(read, after)).backward()
    torch.testing.assert_close((after - before).detach(), -step * after.grad, rtol=1e-6, atol=1e-8)


def test_weights_that_are_not_in_a_row_in_memory_are_moved_alike(monkeypatch):
    monkeypatch.setattr(memory_module, "_BLOCK", 4)
    memory, _, weights, scales = remembered(9)
    metric = [Metric(0.3, s.square(), s) for s in scales]
    turned = [weights[0].T.contiguous().T, *(w.clone() for w in weights[1:])]
    assert not turned[0].is_contiguous()
    for at in (weights, turned):
        memory.step(at, metric, 2.0, 0.1)
    torch.testing.assert_close(flat(turned), flat(weights), rtol=1e-9, atol=1e-12)


def test_a_step_holds_nothing_as_large_as_all_weights(monkeypatch):
    monkeypatch.setattr(memory_module, "_BLOCK", 1 << 10)
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((256, 256), (64, 1024))]
    optimizer = OPTIMIZERS["adamw"](weights)
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    memory, size = Memory(2), sum(p.numel() for p in weights)
    memory.add(0.5, torch.ones(size), weights)
    memory.step(weights, metric_of(optimizer, weights), 4.0, 0.0)
    with Meter() as meter:
        memory.step(weights, metric_of(optimizer, weights), 4.0, 0.0)
    assert 0 < meter.peak < size  # a byte a weight


def test_weights_in_half_precision_are_moved_too():
    memory, read, weights, scales = remembered(11)
    before = flat(weights)
    memory.step(weights, [Metric(0.3, s.square()) for s in scales], 2.0)
    half, metric = Memory(5), [Metric(0.3, s.square().bfloat16(), s.bfloat16()) for s in scales]
    at = [part.bfloat16() for part in before.split([6, 4, 6])]
    at = [part.view(shape) for part, shape in zip(at, SHAPES, strict=True)]
    for value, gradient, where in read:
        parts = [p.view(s).bfloat16() for p, s in zip(where.split([6, 4, 6]), SHAPES, strict=True)]
        half.add(value, gradient.bfloat16(), parts)
    half.step(at, metric, 2.0)
    want = flat(weights) - before
    assert (flat(at).double() - before - want).norm() < 0.1 * want.norm()


def test_a_weak_pull_is_gradient_descent():
    memory, read, weights, _ = remembered(3)
    before = flat(weights).requires_grad_()
    model_of(read, before).backward()
    memory.step(weights, [Metric(1e-7)] * len(weights), 1.0)
    torch.testing.assert_close(flat(weights) - before.detach(), -1e-7 * before.grad, rtol=1e-4, atol=1e-14)


def test_an_endless_pull_meets_every_reading_that_fits():
    memory, read, weights, _ = remembered(5, count=3)
    memory.step(weights, [Metric(1.0)] * len(weights), 1e9)
    assert float(memory.value(weights)) < 1e-9  # three equations, sixteen unknowns


def test_a_coordinate_that_the_task_leaves_alone_is_not_free():
    memory = Memory(1)
    gradient = torch.tensor([1.0, 1.0], dtype=torch.float64)
    weights = [torch.zeros(2, dtype=torch.float64)]
    memory.add(0.5, gradient, weights)
    scale = torch.tensor([1e-12, 1.0], dtype=torch.float64)
    memory.step(weights, [Metric(1e-3, scale.square())], 1.0)
    assert torch.equal(weights[0][0], weights[0][1]) and -1e-3 <= weights[0][0] < 0


def test_nothing_remembered_and_no_rate_move_nothing():
    weights = [torch.ones(2)]
    Memory(2).step(weights, [Metric(1.0)], 4.0)
    memory = Memory(2)
    memory.add(0.5, torch.ones(2), weights)
    memory.step(weights, [Metric(0.0)], 4.0)
    memory.step(weights, [Metric(1.0)], 0.0)
    assert torch.equal(weights[0], torch.ones(2))


def test_gradients_of_float32_weights_are_kept_in_half_their_bytes():
    memory, gradient = Memory(1), torch.randn(1000, generator=torch.Generator().manual_seed(0))
    at = [torch.randn(1000, generator=torch.Generator().manual_seed(1))]
    memory.add(0.5, gradient, at)
    (kept,) = memory.state()
    assert kept["gradient"].dtype == torch.bfloat16
    assert float(memory.value(at)) == pytest.approx(0.5, rel=1e-5)  # the offset is that of what is kept


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.0),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, betas=(0.8, 0.95), eps=1e-6),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_metric_is_what_the_optimizer_divides_by(name):
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([p])
    for _ in range(4):
        p.grad = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)  # always the same: the means are it and its square
        before = p.detach().clone()
        optimizer.step()
        (one,) = metric_of(optimizer, [p])
        scale = 1.0 if one.squares is None else one.scale(one.squares)
        torch.testing.assert_close(p.detach() - before, -one.rate * p.grad / scale, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(one.uphill(one.means), p.grad)


def test_momentum_is_what_a_step_must_not_climb():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=1e-2, momentum=0.5)
    for gradient in ([1.0, 0.0], [0.0, 1.0]):
        p.grad = torch.tensor(gradient)
        optimizer.step()
    assert metric_of(optimizer, [p])[0].means.tolist() == [0.5, 1.0]


def test_which_optimizers_are_known():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    assert all(measures(make([p]), [p]) for make in OPTIMIZERS.values())
    assert not measures(torch.optim.AdamW([p]), [p, q])  # one that trains elsewhere
    assert not measures(torch.optim.AdamW([p], amsgrad=True), [p])
    assert not measures(torch.optim.RMSprop([p]), [p])
    assert metric_of(torch.optim.AdamW([p]), [p])[0].rate == 0  # no step yet, no scale


def trained(attach, steps=6, optimizer=OPTIMIZERS["adamw"], **options):
    model = guarded(rows(4))[0]
    chosen = {"kl_every": 2, "kl_memory": 2, "kl_examples": 2, "lambda_kl": 4.0, "kl_tokens": None, **options}
    guard = Guard(model, rows(4), GuardConfig(**chosen))
    move(model)
    made = optimizer(weights(model))
    assert not attach or guard.attach(made)
    losses = []
    for step in range(steps):
        guard.begin_step(step)
        task = sum((p - 1).square().sum() for p in weights(model))
        penalty = guard.penalty()
        losses.append(penalty.requires_grad)
        (task + penalty).backward()
        made.step()
        made.zero_grad()
    return model, guard, made, losses


def test_an_attached_guard_acts_after_the_optimizers_step_and_no_longer_in_the_loss():
    _, guard, made, in_the_loss = trained(True)
    assert not any(in_the_loss) and float(guard.terms["kl"]) > 0
    guard.detach()
    guard.begin_step(6)
    assert guard.penalty().requires_grad
    before = [p.detach().clone() for p in weights(guard.model)]
    made.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(guard.model), strict=True))  # the hook is gone


@pytest.mark.parametrize("climb", [0.0, 0.005])
def test_what_is_remembered_takes_no_more_of_the_tasks_gain_than_it_may(climb):
    _, guard, made, _ = trained(True, lambda_kl=100.0, kl_climb=climb)

    def bounded():
        metric = metric_of(made, weights(guard.model))
        before = [p.detach().clone() for p in weights(guard.model)]
        guard.kl.step(metric)
        now = weights(guard.model)
        climbed = sum(
            float(((p.detach() - b) * m.uphill(m.means)).sum()) for p, b, m in zip(now, before, metric, strict=True)
        )
        gained = sum(float((m.uphill(m.means).square() * m.rate / m.scale(m.squares)).sum()) for m in metric)
        return climbed, gained

    taken, gained = bounded()
    assert taken <= climb * gained + 1e-6 * gained
    guard.config = guard.kl.config = dataclasses.replace(guard.config, kl_climb=None)
    assert bounded()[0] > climb * gained  # it would have taken more


def test_the_means_of_the_optimizer_are_those_of_the_task_alone():
    _, _, made, _ = trained(True, steps=1)
    _, _, other, _ = trained(True, steps=1, lambda_kl=1000.0)
    _, _, mixed, _ = trained(False, steps=1)
    squares = [torch.cat([s["exp_avg_sq"].flatten() for s in o.state.values()]) for o in (made, other, mixed)]
    assert torch.equal(squares[0], squares[1]) and not torch.allclose(squares[0], squares[2])


def test_optimizers_that_say_nothing_leave_the_term_in_the_loss():
    model, guard = guarded(rows(4), kl_every=2, kl_memory=2, kl_examples=2)
    assert not guard.attach(torch.optim.RMSprop(weights(model)))
    move(model)
    guard.begin_step(0)
    assert guard.penalty().requires_grad
    _, plain = guarded(rows(4), kl_every=1, kl_memory=0, kl_examples=2)
    assert not plain.attach(torch.optim.AdamW(weights(plain.model)))  # nothing remembered


def test_a_resumed_run_goes_on_to_the_same_weights():
    model, guard, made, _ = trained(True, steps=3)
    twin = copy.deepcopy(model)
    again = Guard(twin, rows(4), guard.config)
    again.load_state_dict(guard.state_dict())
    other = OPTIMIZERS["adamw"](weights(twin))
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    again.attach(other)
    for one, optimizer in ((guard, made), (again, other)):
        for step in range(3, 6):
            one.begin_step(step)
            (sum((p - 1).square().sum() for p in weights(one.model)) + one.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(twin), strict=True))
