"""A second witness, written by others: curvlinops computes the same matrices where the definitions meet.

Its empirical Fisher takes every term of the loss as a datum, gradients through all positions included. That is ours
where an example has one supervised token (unit "sequence"), or where positions do not mix (unit "token").
"""

import pytest
import torch
from fisher_oracle import assert_close, collate, make_examples, tiny_llama

import fishergeo as fg
from fishergeo.accumulators import STRUCTURES

curvlinops = pytest.importorskip("curvlinops")

NAMES = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
SUM = torch.nn.CrossEntropyLoss(reduction="sum")


class LastToken(torch.nn.Module):
    """The logits that predict the last token, (n, classes)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(input_ids=x["input_ids"], use_cache=False).logits[:, -2]


class EveryToken(LastToken):
    """(n, classes, tokens)."""

    def forward(self, x):
        return self.model(input_ids=x["input_ids"], use_cache=False).logits[:, :-1].mT


def llama():
    model = tiny_llama()
    model.config._attn_implementation = "eager"  # forward-mode differentiation knows no fused attention
    return model


def one_token_batches(lengths=(6, 6, 6, 6, 6)):
    """Examples of which only the last token is supervised, in two uneven batches."""
    batches = []
    for part in (make_examples(lengths[:3]), make_examples(lengths[3:], 1)):
        batch = collate([(ids, torch.where(torch.arange(len(ids)) == len(ids) - 1, ids, -100)) for ids, _ in part])
        batches.append(batch)
    return batches


def theirs(kind, wrapped, batches, names, target, **options):
    data = [({"input_ids": b["input_ids"]}, target(b["input_ids"])) for b in batches]
    weights = [wrapped.model.get_submodule(name).weight for name in names]
    return getattr(curvlinops, kind)(
        wrapped, SUM, weights, data, check_deterministic=False, batch_size_fn=lambda x: len(x["input_ids"]), **options
    )


def last(ids):
    return ids[:, -1]


@pytest.mark.parametrize("name", NAMES)
def test_the_empirical_fisher_of_one_layer(name):
    """Its dense (pq, pq) matrix has our diagonal on its diagonal and our Grams as its two partial traces."""
    model, batches = llama(), one_token_batches()
    count = sum(len(b["input_ids"]) for b in batches)
    p, q = model.get_submodule(name).weight.shape
    operator = theirs("EFLinearOperator", LastToken(model), batches, [name], last)
    dense = (operator @ torch.eye(p * q, dtype=torch.float64)).reshape(p, q, p, q) / count

    def ours(structure, **options):
        return fg.estimate_fisher(model, batches, structure=structure, layers=[name], rank=20, **options)[name]

    assert_close(ours("diagonal").diagonal(), dense.reshape(p * q, p * q).diagonal(), 1e-6)
    for structure in ("gram", "sketch"):
        assert_close(ours(structure).to_dense(), torch.einsum("iaja->ij", dense), 1e-6)
        assert_close(ours(structure, side="input").to_dense(), torch.einsum("aiaj->ij", dense), 1e-6)
    if "exact" in STRUCTURES:
        vectors = torch.randn(p * q, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert_close(ours("exact") @ vectors, dense.reshape(p * q, p * q) @ vectors, 1e-6)


def test_the_token_unit_where_positions_do_not_mix():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False), torch.nn.Tanh(), torch.nn.Linear(7, 4, bias=False))
    model.double()
    x, y = torch.randn(6, 3, 5, dtype=torch.float64), torch.randint(0, 4, (6, 3))

    class PerPosition(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).mT

    def losses(model, batch):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(model(inputs).mT, labels, reduction="none").sum(1)

    operator = curvlinops.EFLinearOperator(PerPosition(), SUM, [model[0].weight], [(x, y)], check_deterministic=False)
    dense = (operator @ torch.eye(35, dtype=torch.float64)).reshape(7, 5, 7, 5)
    fisher = fg.estimate_fisher(model, [(x, y)], structure="gram", unit="token", layers=["0"], loss=losses)
    assert_close(fisher["0"].to_dense() * fisher.header.count, torch.einsum("iaja->ij", dense), 1e-6)


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_kfac_factors(unit):
    model = llama()
    if unit == "sequence":
        batches, wrapped, target = one_token_batches(), LastToken(model), last
    else:
        batches = [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in one_token_batches()]
        wrapped, target = EveryToken(model), lambda ids: ids[:, 1:]
    operator = theirs("KFACLinearOperator", wrapped, batches, NAMES, target, fisher_type="empirical")
    operator.compute_kronecker_factors()
    fisher = fg.estimate_fisher(model, batches, structure="kfac", unit=unit, layers=NAMES)
    for name in NAMES:
        assert_close(fisher[name].input_factor, operator._input_covariances[f"model.{name}"], 1e-6)
        outputs = operator._gradient_covariances[f"model.{name}"] / fisher.header.count
        assert_close(fisher[name].output_factor, outputs, 1e-6)


@pytest.mark.skipif("ekfac" not in STRUCTURES, reason="no EKFAC in this build")
def test_ekfac_where_an_example_has_one_output():
    """Its second moments sum over a sequence's positions before squaring, as ours do."""
    model, batches = llama(), one_token_batches()
    count = sum(len(b["input_ids"]) for b in batches)
    fisher = fg.estimate_fisher(model, batches, structure="ekfac", layers=NAMES)
    for name in NAMES:
        operator = theirs("EKFACLinearOperator", LastToken(model), batches, [name], last, fisher_type="empirical")
        size = model.get_submodule(name).weight.numel()
        assert_close(fisher[name].to_dense(), operator @ torch.eye(size, dtype=torch.float64) / count, 1e-6)
