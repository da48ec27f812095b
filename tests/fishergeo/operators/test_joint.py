"""The joint Fisher of several layers against gradients laid end to end, and what the sum over layers leaves out."""

import itertools

import pytest
import torch
from fisher_oracle import NAMES, assert_close, collate, make_examples, oracle, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import fishergeo as fg


def estimated(examples, cuts=(2,), **options):
    model = tiny_llama()
    edges = [0, *cuts, len(examples)]
    batches = [collate(examples[a:b]) for a, b in itertools.pairwise(edges)]
    fisher = fg.estimate_fisher(model, batches, structure="exact", layers=list(NAMES), **options)
    return model, fg.JointFisher(dict(fisher))


def updates(fisher, seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: operator.layer_shape for name, operator in fisher.operators.items()}
    return {
        name: fg.LowRank(
            torch.randn(p, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, q, generator=generator, dtype=torch.float64),
        )
        for name, (p, q) in shapes.items()
    }


@settings(deadline=None, max_examples=8)
@given(lengths=st.lists(st.integers(4, 14), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_it_is_the_quadratic_form_of_gradients_laid_end_to_end(lengths, seed):
    examples = make_examples(lengths, seed)
    model, joint = estimated(examples, cuts=(1,))
    gradients, _ = oracle(model, examples)
    moved = updates(joint, seed)
    end_to_end = torch.cat([gradients[name].flatten(1) for name in NAMES], 1)
    delta = torch.cat([(moved[name].left @ moved[name].right).flatten() for name in NAMES])
    assert_close(joint.inner(moved), end_to_end @ delta)
    assert_close(joint.quadratic(moved), (end_to_end @ delta).square().mean())
    assert_close(joint.dual(), end_to_end @ end_to_end.T / len(examples))
    assert_close(joint.trace(), end_to_end.square().sum() / len(examples))
    dense = {name: one.left @ one.right for name, one in moved.items()}
    assert_close(joint.inner(dense), joint.inner(moved))


def test_a_layer_that_does_not_move_adds_nothing_and_one_alone_is_its_own_block():
    _, joint = estimated(make_examples([6, 9, 7]))
    moved = updates(joint, 0)
    name = NAMES[1]
    assert_close(joint.quadratic({name: moved[name]}), joint.operators[name].quadratic(moved[name]))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 999))
def test_it_lies_between_nothing_and_the_number_of_layers_times_the_sum_of_blocks(seed):
    _, joint = estimated(make_examples([6, 9, 7]))
    moved = updates(joint, seed)
    blocks = sum(float(joint.operators[name].quadratic(moved[name])) for name in NAMES)
    assert -1e-12 <= float(joint.quadratic(moved)) <= len(NAMES) * blocks * (1 + 1e-10)


def test_effects_that_cancel_between_layers_cost_nothing_although_every_block_charges_them():
    _, joint = estimated(make_examples([8]), cuts=())
    first, second = NAMES[:2]
    moved = updates(joint, 3)
    ratio = float(joint.inner({first: moved[first]}) / joint.inner({second: moved[second]}))
    cancelling = {first: moved[first], second: moved[second] * -ratio}
    blocks = sum(float(joint.operators[name].quadratic(delta)) for name, delta in cancelling.items())
    assert blocks > 0 and float(joint.quadratic(cancelling)) < 1e-20 * blocks


def test_its_gradient_in_the_factors_is_that_of_the_dense_form():
    model, joint = estimated(make_examples([6, 9, 7]))
    moved = updates(joint, 1)
    for one in moved.values():
        one.left.requires_grad_(True)
    joint.quadratic(moved).backward()
    gradients, _ = oracle(model, make_examples([6, 9, 7]))
    inner = joint.inner(moved).detach()
    for name, one in moved.items():
        expected = torch.einsum("i,ipq->pq", 2 * inner / len(inner), gradients[name]) @ one.right.T
        assert_close(one.left.grad, expected)


def test_what_does_not_belong_together_is_refused_by_name():
    one = fg.ExactOperator(torch.eye(2), torch.ones(2, 1), torch.tensor([1, 1]), count=2)
    other = fg.ExactOperator(torch.eye(2), torch.ones(2, 1), torch.tensor([2]), count=1)
    with pytest.raises(ValueError, match="operators is empty"):
        fg.JointFisher({})
    with pytest.raises(ValueError, match="layer 'b' has seen 1 examples and 'a' 2"):
        fg.JointFisher({"a": one, "b": other})
    with pytest.raises(TypeError, match="layer 'a' has a DenseOperator; estimate the Fisher with structure='exact'"):
        fg.JointFisher({"a": fg.DenseOperator(torch.eye(2))})
    joint = fg.JointFisher({"a": one})
    with pytest.raises(ValueError, match="updates names layers that this Fisher does not have: 'b'"):
        joint.quadratic({"b": torch.zeros(2, 1)})
    with pytest.raises(ValueError, match="updates is empty"):
        joint.quadratic({})
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        joint.quadratic({"a": torch.zeros(3, 1)})
