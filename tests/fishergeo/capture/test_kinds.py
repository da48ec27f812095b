"""Kinds of layers against a loop over single examples: convolutions of every form, channel norms, derived classes."""

import pytest
import torch
import transformers as hf
from torch import nn

import fishergeo as fg

STRUCTURES = ["gram", "diagonal", "exact"]


def loss(model, batch):
    out = torch.tanh(model(batch)).flatten(1)
    return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).mean(1)


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.3)
    return model.double()


def data(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(model, x, views, objective=loss, tolerance=1e-10):
    """Every layer of ``views`` (name -> parameters -> (p, q) of their gradients) in three structures, two batches."""
    model = randomised(model)
    found = fg.estimate_fisher(model, [x[:2], x[2:]], STRUCTURES, layers=list(views), loss=objective)
    model.eval()
    for name, (parameters, view) in views.items():
        chosen = [model.get_parameter(p) for p in parameters]
        gradients = [view(*torch.autograd.grad(objective(model, x[i : i + 1]).sum(), chosen)) for i in range(len(x))]
        want = sum(g @ g.T for g in gradients) / len(x)
        both = sum(torch.outer(g.flatten(), g.flatten()) for g in gradients) / len(x)
        for got, target in ((found["gram"], want), (found["exact"], both)):
            assert target.norm() > 1e-12
            assert (got[name].to_dense() - target).norm() <= tolerance * target.norm()
        assert (found["diagonal"][name].diagonal() - both.diagonal()).norm() <= tolerance * both.norm()


def flat(g):
    return g.flatten(1)


def column(g):
    return g[:, None]


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (7,)),
    "1d grouped": (nn.Conv1d(4, 6, 3, groups=2, dilation=2), (9,)),
    "2d depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (5, 4)),
    "2d multiplied": (nn.Conv2d(4, 8, (2, 3), groups=4, stride=(2, 1), padding="valid"), (5, 4)),
    "2d same": (nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="reflect"), (5, 4)),
    "3d": (nn.Conv3d(4, 3, 2, stride=(1, 2, 1), padding=1), (3, 4, 3)),
    "3d dilated": (nn.Conv3d(4, 3, (2, 1, 2), dilation=(2, 1, 1), padding_mode="circular", padding=1), (4, 3, 3)),
    "3d grouped": (nn.Conv3d(4, 6, 2, groups=2), (3, 4, 3)),
}


@pytest.mark.parametrize("form", CONVOLUTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions(form, channels_last):
    conv, size = CONVOLUTIONS[form]
    x = data(5, 4, *size)
    if channels_last:
        if len(size) == 1:
            x = x.mT.contiguous().mT
        else:
            x = x.to(memory_format=torch.channels_last if len(size) == 2 else torch.channels_last_3d)
    views = {"0": (["0.weight"], flat), "0.bias": (["0.bias"], column),
             "0+bias": (["0.weight", "0.bias"], lambda w, b: torch.cat([w.flatten(1), b[:, None]], 1))}  # fmt: skip
    check(nn.Sequential(conv, nn.Tanh(), nn.Flatten()), x, views)


TRANSPOSED = {
    "1d": (nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1), (5,)),
    "1d grouped": (nn.ConvTranspose1d(4, 6, 4, stride=3, groups=2, dilation=2), (5,)),
    "2d": (nn.ConvTranspose2d(4, 3, (2, 3), stride=(3, 2), padding=(0, 2), output_padding=(2, 0)), (3, 4)),
    "2d depthwise": (nn.ConvTranspose2d(4, 4, 3, groups=4, padding=1), (3, 4)),
    "2d far": (nn.ConvTranspose2d(4, 2, 2, dilation=3, output_padding=2), (3, 4)),
    "3d": (nn.ConvTranspose3d(4, 2, 2, stride=2, padding=1, output_padding=(1, 0, 1)), (2, 3, 2)),
    "3d grouped": (nn.ConvTranspose3d(4, 6, (1, 2, 2), groups=2, dilation=(1, 2, 1)), (2, 3, 2)),
}


@pytest.mark.parametrize("form", TRANSPOSED)
def test_transposed_convolutions(form):
    conv, size = TRANSPOSED[form]
    views = {"0": (["0.weight"], lambda g: g.flatten(1).T), "0.bias": (["0.bias"], column)}
    check(nn.Sequential(conv, nn.Tanh(), nn.Flatten()), data(5, 4, *size), views)


def test_a_transposed_convolution_of_a_given_output_size():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 3, 3, stride=3)

        def forward(self, x):
            return self.up(x, output_size=[17])

    check(Up(), data(5, 4, 5), {"up": (["up.weight"], lambda g: g.flatten(1).T), "up.bias": (["up.bias"], column)})


NORMS = {
    "batch vector": (nn.BatchNorm1d(4), ()),
    "batch 1d": (nn.BatchNorm1d(4), (5,)),
    "batch 2d": (nn.BatchNorm2d(4), (5, 3)),
    "batch 3d": (nn.BatchNorm3d(4), (2, 3, 2)),
    "synced": (nn.SyncBatchNorm(4), (3,)),
    "group": (nn.GroupNorm(2, 4), (5, 3)),
    "group vector": (nn.GroupNorm(2, 4), ()),
    "instance": (nn.InstanceNorm2d(4, affine=True), (5, 3)),
    "instance tracked": (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (5,)),
}


@pytest.mark.parametrize("form", NORMS)
def test_scales_of_channel_norms(form):
    norm, size = NORMS[form]
    views = {"0": (["0.weight"], column), "0.bias": (["0.bias"], column)}
    check(nn.Sequential(norm, nn.Tanh(), nn.Flatten()), data(5, 4, *size), views)


def test_batch_norm_keeps_its_running_statistics():
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))).train()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    fg.estimate_fisher(model, [data(3, 3, 4, 4)], "gram", layers=["0", "1"], loss=loss)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items()) and model[1].training


def test_what_mixes_examples_or_knows_none_is_refused_by_name():
    mixing = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).double()
    with pytest.raises(ValueError, match=r"'0' is a BatchNorm1d that has no running statistics"):
        fg.estimate_fisher(mixing, [data(4, 3)], "gram", layers="0", loss=loss)
    for conv in (nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3), nn.Conv1d(5, 3, 3)):
        lone = lambda m, b: m(b[0]).square().mean()[None]
        with pytest.raises(ValueError, match="without a batch"):
            x = data(1, 5, 5) if isinstance(conv, nn.Conv1d) else data(1, 2, 5, 5)
            fg.estimate_fisher(conv.double(), [x], "gram", layers="", loss=lone)


# Derived classes.


class Equalised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 0.25, self.bias)


class Negated(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, -2 * weight, bias)


class Masked(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * torch.ones_like(self.weight).tril(), self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Normed(nn.Linear):
    """A constant times the map, but one that depends on the weight."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm().detach() ** 2 * self.weight.norm(), self.bias)


class Scaled(nn.Linear):
    """Its bias is scaled, too, and has another gradient than the output."""

    def forward(self, x):
        return 0.5 * nn.functional.linear(x, self.weight, self.bias)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("bias", [True, False])
def test_a_derived_class_that_scales_its_weight_is_known_by_its_forward(bias):
    model = nn.Sequential(Equalised(3, 4, bias), nn.Tanh(), nn.Linear(4, 2))
    views = {"0": (["0.weight"], flat), "2": (["2.weight"], flat)}
    check(model, data(5, 3), views | ({"0.bias": (["0.bias"], column)} if bias else {}))
    check(
        nn.Sequential(Negated(4, 6, 3, groups=2, bias=bias), nn.Flatten()),
        data(5, 4, 5, 5),
        {"0": (["0.weight"], flat)},
    )


@pytest.mark.parametrize("kind", [Masked, Normed, Scaled])
def test_a_derived_class_that_computes_something_else_is_refused(kind):
    model = randomised(nn.Sequential(kind(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=rf"'0' is a {kind.__name__}, whose forward is no multiple"):
        fg.estimate_fisher(model, [data(5, 3)], "gram", loss=loss)
    fg.estimate_fisher(model, [data(5, 3)], "gram", loss=loss, layers="2")


def test_standardised_convolutions_and_pairs_are_refused():
    with pytest.raises(ValueError, match="'0' is a Standardised"):
        fg.estimate_fisher(
            nn.Sequential(Standardised(3, 4, 2)).double(), [data(3, 3, 4, 4)], "gram", layers="0", loss=loss
        )
    with pytest.raises(ValueError, match="'' is a Pair that gives a tuple"):
        fg.estimate_fisher(Pair(3, 4).double(), [data(3, 3)], "gram", layers="", loss=lambda m, b: m(b)[0].sum(1))


def test_bits_weight_standardised_convolution_is_refused():
    config = hf.BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4, num_labels=3)
    model = hf.BitForImageClassification(config).double().eval()
    batch = {"pixel_values": data(3, 3, 32, 32), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match="WeightStandardizedConv2d, whose forward"):
        fg.estimate_fisher(model, [batch], "gram", layers="bit.embedder.convolution")


# What layers that read one tensor share, and what an embedding's padding row is owed.


def of_batches(model, batches, structure, loss, **options):
    return fg.estimate_fisher(model, batches, structure, loss=loss, **options)


class Side(nn.Module):
    """Several modules that read one tensor."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return torch.cat([torch.tanh(module(x)).flatten(1) for module in self.children()], 1).square().mean(1)


@pytest.mark.parametrize("structure", ["kfac", "kfac-sketch", "ekfac", "diagonal", "exact"])
@pytest.mark.parametrize("case", ["transposed", "embeddings", "scaled"])
def test_layers_that_read_one_tensor_otherwise_share_nothing(case, structure):
    torch.manual_seed(0)

    class Halved(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, 0.5 * self.weight, self.bias)

    modules = {
        "transposed": lambda: {"a": nn.ConvTranspose1d(4, 2, 2), "b": nn.ConvTranspose1d(4, 2, 2, groups=2)},
        "embeddings": lambda: {
            "a": nn.Embedding(5, 3),
            "b": nn.Embedding(9, 3),
            "c": nn.Embedding(5, 3, padding_idx=1),
        },
        "scaled": lambda: {"a": nn.Linear(4, 3), "b": Halved(4, 3)},
    }[case]()
    x = torch.randint(0, 5, (6, 4)) if case == "embeddings" else torch.randn(6, 4, 3).double()
    x = x.mT if case == "scaled" else x
    model = Side(**modules).double()
    layers = [f"{name}+bias" for name in modules] if case == "scaled" else list(modules)
    loss = lambda m, b: m(b)
    together = of_batches(model, [x], structure, loss, layers=layers)
    for layer in layers:
        alone = of_batches(model, [x], structure, loss, layers=[layer])
        torch.testing.assert_close(together[layer].to_dense(), alone[layer].to_dense())


def test_a_factor_of_a_derived_linear_is_none_of_its_bias():
    class Halved(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, 0.5 * self.weight, self.bias)

    torch.manual_seed(0)
    model, x = nn.Sequential(Halved(3, 2), nn.Tanh()).double(), torch.randn(5, 3).double()
    loss = lambda m, b: m(b).square().sum(1)
    want = torch.zeros(2, 4).double()
    for row in x:
        w, b = torch.autograd.grad(loss(model, row[None]).sum(), [model[0].weight, model[0].bias])
        want += torch.cat([w, b[:, None]], 1).square() / len(x)
    for structure in ("diagonal", "exact"):
        found = of_batches(model, [x], structure, loss, layers="0+bias")["0+bias"].diagonal()
        torch.testing.assert_close(found.view(2, 4), want)


def test_a_padding_row_has_no_curvature_and_counts_nowhere():
    torch.manual_seed(0)
    ids = torch.randint(0, 6, (8, 10))
    ids[:, 5:] = 0
    loss = lambda m, b: (m[1](torch.tanh(m[0](b))).sum(2) * (b != 0)).square().mean(1)

    def fisher(padding_idx, batch, structure):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(6, 3, padding_idx=padding_idx), nn.Linear(3, 2)).double()
        return fg.estimate_fisher(model, [batch], structure, layers="0", loss=loss)["0"]

    for structure in ("kfac", "kfac-sketch"):
        by_row = fisher(0, ids, structure).diagonal().view(3, 6).sum(0)
        assert abs(float(by_row[0])) < 1e-12 * float(by_row.sum()) and bool((by_row[1:] > 0).all())
    factor = fisher(0, ids, "kfac").factors()[1]
    counted = nn.functional.one_hot(ids[ids != 0], 6).double().mean(0)
    torch.testing.assert_close(factor, torch.diag(counted))


def test_a_derived_embedding_that_trains_its_padding_row_keeps_it():
    class Trained(nn.Embedding):
        def forward(self, ids):
            return 2 * nn.functional.embedding(ids, self.weight)

    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    loss = lambda m, b: torch.tanh(m(b)).sum((1, 2)).square()
    ids = torch.tensor([[1, 2, 0], [0, 3, 3]])
    for kind in (Trained, Scaled):
        torch.manual_seed(0)
        model = kind(4, 3, padding_idx=0).double()
        nn.init.normal_(model.weight)
        want = 0
        for row in ids:
            (g,) = torch.autograd.grad(loss(model, row[None]).sum(), model.weight)
            want = want + g.mT.square() / len(ids)
        # The first batch says nothing of the padding row.
        batches = [torch.tensor([[1, 2, 3], [1, 2, 2]]), ids]
        first = fg.estimate_fisher(model, batches[:1], "diagonal", layers="", loss=loss)[""].diagonal().view(3, 4)
        found = fg.estimate_fisher(model, batches, "diagonal", layers="", loss=loss)[""].diagonal().view(3, 4)
        torch.testing.assert_close(2 * found - first, want)
        assert bool((want[:, 0] > 0).all()) == (kind is Trained)
