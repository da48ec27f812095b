"""nn.MultiheadAttention against a loop over single examples that differentiates torch's own forward."""

import warnings

import pytest
import torch
from torch import nn

import fishergeo as fg
from fishergeo.capture import select_layers

LENGTHS = (4, 2, 3, 5, 1)
T, S = 5, 6


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Attending(nn.Module):
    """Attention of the batch's x to itself or to its y, padding left out."""

    def __init__(self, form="self", **options):
        super().__init__()
        sizes = {"kdim": 5, "vdim": 3} if form == "dims" else {}
        self.form = form
        self.asked = options.pop("asked", {})
        self.attn = nn.MultiheadAttention(8, 2, **sizes, **{"batch_first": True, **options})
        generator = torch.Generator().manual_seed(0)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)

    def forward(self, batch):
        turn = (lambda x: x) if self.attn.batch_first else (lambda x: x.transpose(0, 1))
        x, y = turn(batch["x"]), turn(batch["y"])
        shifted = x + 0.5
        query, key, value = {
            "self": (x, x, x),
            "cross": (x, y, y),
            "shifted": (shifted, shifted, x),
            "dims": (x, y[..., :5], y[..., 5:]),
        }[self.form]
        out, weights = self.attn(query, key, value, key_padding_mask=batch["pad"], **self.asked)
        out = turn(out).tanh()
        if weights is not None:
            out = out + weights.flatten(1).square().sum(1)[:, None, None]
        return out


def loss(model, batch):
    out = model(batch) * batch["counts"][..., None]
    return (out * torch.linspace(-1, 2, out.shape[-1], dtype=out.dtype)).sum((1, 2))


def batch_of(form):
    keys = T if form in ("self", "shifted") else S
    pad = torch.arange(keys)[None] >= torch.tensor(LENGTHS)[:, None]
    counts = (torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]).double()
    return {"x": draw(5, T, 8), "y": draw(5, S, 8, seed=2), "pad": pad, "counts": counts}


def part(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


def views_of(model, prefix="attn."):
    attn = model.get_submodule(prefix[:-1])
    views = {}
    for name, _ in attn.named_parameters():
        if name.startswith("bias_"):
            continue
        layer = name.replace("_weight", "").replace(".weight", "")
        layer = layer.replace("in_proj_bias", "in_proj.bias")
        views[prefix + layer] = prefix + name
    return views


def oracle(model, views, batch, objective=loss):
    chosen = [model.get_parameter(name) for name in views.values()]
    rows = []
    for i in range(len(batch["x"])):
        rows.append(torch.autograd.grad(objective(model, part(batch, slice(i, i + 1))).sum(), chosen))
    return {name: torch.stack([row[k].reshape(len(row[k]), -1) for row in rows]) for k, name in enumerate(views)}


def check(model, batch, views, objective=loss):
    model.eval()
    batches = [part(batch, slice(0, 2)), part(batch, slice(2, None))]
    found = fg.estimate_fisher(model, batches, ["gram", "exact"], layers=list(views), loss=objective)
    for name, g in oracle(model, views, batch, objective).items():
        flat = g.flatten(1)
        for structure, want in (("gram", (g @ g.mT).mean(0)), ("exact", flat.T @ flat / len(g))):
            assert want.norm() > 1e-10
            assert (found[structure][name].to_dense() - want).norm() <= 1e-10 * want.norm(), (name, structure)


FORMS = {
    "plain": {},
    "no bias": {"bias": False},
    "time-major": {"batch_first": False},
    "bias_k": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True, "add_bias_kv": True},
    "no weights": {"asked": {"need_weights": False}},
    "all weights": {"asked": {"average_attn_weights": False}},
    "dropout": {"dropout": 0.4},
}


@pytest.mark.parametrize("form", ["self", "cross", "shifted", "dims"])
@pytest.mark.parametrize("options", FORMS)
def test_projections_are_autograds(form, options):
    model = Attending(form, **FORMS[options])
    views = views_of(model)
    roles = ["q_proj", "k_proj", "v_proj"] if form == "dims" else ["in_proj"]
    biases = [] if options == "no bias" else ["attn.in_proj.bias", "attn.out_proj.bias"]
    assert set(views) == {*(f"attn.{role}" for role in roles), "attn.out_proj", *biases}
    check(model, batch_of(form), views)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("mask", ["bool", "float", "causal", "by head"])
def test_masks_of_attention(weights, mask):
    upper = torch.ones(T, T, dtype=torch.bool).triu(1)
    given = {"bool": upper, "float": draw(T, T, seed=3), "causal": upper, "by head": None}[mask]
    asked = {"need_weights": weights, "attn_mask": given, "is_causal": mask == "causal"}
    model = Attending("self", asked=asked)
    batch = batch_of("self")
    if mask == "by head":

        def objective(model, batch):
            model.asked["attn_mask"] = draw(2, T, T, seed=4).repeat(len(batch["x"]), 1, 1)
            return loss(model, batch)
    else:
        objective = loss
    if mask in ("float", "by head"):
        batch["pad"] = torch.zeros_like(batch["pad"], dtype=torch.float64).masked_fill(batch["pad"], -torch.inf)
    check(model, batch, views_of(model), objective)


def test_causal_without_padding():
    model = Attending("self", asked={"need_weights": False, "is_causal": True})
    model.asked["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)

    def objective(model, batch):
        return loss(model, {**batch, "pad": None})

    check(model, batch_of("self"), views_of(model), objective)


def test_weight_and_bias_together():
    model = Attending("cross")
    x = {**batch_of("cross"), "pad": torch.zeros(5, S, dtype=torch.bool)}
    found = fg.estimate_fisher(model, [x], "gram", layers=["attn.in_proj+bias"], loss=loss)
    both = oracle(model.eval(), {"w": "attn.in_proj_weight", "b": "attn.in_proj_bias"}, x)
    g = torch.cat([both["w"], both["b"]], 2)
    want = (g @ g.mT).mean(0)
    assert (found["attn.in_proj+bias"].to_dense() - want).norm() <= 1e-10 * want.norm()


def encoder(batch_first=True, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=batch_first, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).double()


@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_an_encoder_whose_fast_path_would_pass_it_by(norm_first):
    model = encoder(norm_first=norm_first)
    views = {**views_of(model, "layers.0.self_attn."), **views_of(model, "layers.1.self_attn.")}

    def objective(model, batch):
        out = model(batch["x"], src_key_padding_mask=batch["pad"]).tanh() * batch["counts"][..., None]
        return (out * torch.linspace(-1, 2, 8, dtype=out.dtype)).sum((1, 2))

    check(model, batch_of("self"), views, objective)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_no_filter_takes_the_input_projections_too():
    names = [f"layers.{i}.{part}" for i in range(2)
             for part in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")]  # fmt: skip
    assert set(select_layers(encoder())) == set(names)
    assert list(select_layers(Attending("dims"))) == [f"attn.{each}_proj" for each in ("q", "k", "v", "out")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fg.estimate_fisher(Attending(), [batch_of("self")], "gram", loss=loss)
    assert set(found) == {"attn.in_proj", "attn.out_proj"}


def test_a_wrong_projection_is_found():
    from fishergeo.capture.kinds import attention

    model = Attending()
    right = attention.Projection.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.Projection, "forward", lambda self, x: 1.01 * right(self, x))
        with pytest.raises(ValueError, match="'attn' is a MultiheadAttention whose outputs are not those"):
            fg.estimate_fisher(model, [batch_of("self")], "gram", layers=["attn.in_proj"], loss=loss)
    with pytest.MonkeyPatch.context() as patch:
        attend = attention._attend
        patch.setattr(attention, "_attend", lambda *all: (attend(*all)[0].detach(), None))
        model.asked = {"need_weights": False}
        with pytest.raises((RuntimeError, ValueError)):
            fg.estimate_fisher(model, [batch_of("self")], "gram", layers=["attn.in_proj"], loss=loss)
    assert "forward" not in model.attn.__dict__


def test_refusals():
    with pytest.raises(
        ValueError, match=r"'attn' is a MultiheadAttention; name its projections, such as 'attn.in_proj'"
    ):
        select_layers(Attending(), ["attn"])
    with pytest.raises(ValueError, match=r"'attn.in_proj' is no weight but the bias of three"):
        select_layers(Attending("dims"), ["attn.in_proj"])

    class Own(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = Attending()
    model.attn = Own(8, 2, batch_first=True).double()
    with pytest.raises(ValueError, match=r"'attn.in_proj' matches no layer"):
        select_layers(model, ["attn.in_proj"])

    class Alone(Attending):
        def forward(self, batch):
            return torch.stack([self.attn(x, x, x)[0] for x in batch["x"]])

    with pytest.raises(ValueError, match="'attn' is a MultiheadAttention that reads 2-dimensional"):
        fg.estimate_fisher(Alone(), [batch_of("self")], "gram", layers=["attn.in_proj"], loss=loss)

    class Training(Attending):
        def forward(self, batch):
            self.attn.train()
            return super().forward(batch)

    with pytest.raises(ValueError, match="'attn' was put into training mode"):
        fg.estimate_fisher(Training(dropout=0.5), [batch_of("self")], "gram", layers=["attn.in_proj"], loss=loss)
    with pytest.raises((ValueError, RuntimeError), match="linear1"):  # time-major

        def objective(model, batch):
            return model(batch["x"].transpose(0, 1)).transpose(0, 1).tanh().sum((1, 2))

        fg.estimate_fisher(
            encoder(False), [batch_of("self")], "gram", layers=["*.in_proj", "*.linear1"], loss=objective
        )


class Tied(nn.Module):
    """Two attentions, one after the other, with one input projection."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.b.in_proj_weight = self.a.in_proj_weight

    def forward(self, batch):
        x = batch["x"] + self.a(batch["x"], batch["x"], batch["x"])[0]
        return self.b(x, x, x)[0]


def test_attentions_with_one_input_projection():
    torch.manual_seed(0)
    check(Tied().double(), batch_of("self"), {"b.in_proj": "a.in_proj_weight", "a.out_proj": "a.out_proj.weight"})


class ByHand(nn.Module):
    """Self-attention of the same weights, its projections three linear maps."""

    def __init__(self, attn):
        super().__init__()
        self.heads = attn.num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8).double() for _ in range(4))
        with torch.no_grad():
            for i, layer in enumerate((self.q, self.k, self.v)):
                layer.weight.copy_(attn.in_proj_weight[8 * i : 8 * i + 8])
                layer.bias.copy_(attn.in_proj_bias[8 * i : 8 * i + 8])
            self.out.weight.copy_(attn.out_proj.weight)
            self.out.bias.copy_(attn.out_proj.bias)

    def forward(self, batch):
        x = batch["x"]
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)).tanh()


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_kfac_of_the_projections_is_that_of_three_linear_maps(structure):
    attention = Attending(asked={"need_weights": False}).eval()
    other = ByHand(attention.attn).eval()
    batch = batch_of("self")
    batch = batch | {"pad": torch.zeros_like(batch["pad"]), "counts": torch.ones_like(batch["counts"])}
    got = fg.estimate_fisher(attention, [batch], structure, layers=["attn.in_proj", "attn.out_proj"], loss=loss)
    want = fg.estimate_fisher(other, [batch], structure, layers=["q", "k", "v", "out"], loss=loss)
    close = lambda a, b: (a - b).norm() <= 1e-10 * b.norm()
    assert close(got["attn.out_proj"].to_dense(), want["out"].to_dense())
    if structure == "ekfac":  # eigenbases of a joint output factor are not those of its blocks
        return
    joint = got["attn.in_proj"].to_dense().view(24, 8, 24, 8)
    for i, name in enumerate("qkv"):
        block = joint[8 * i : 8 * i + 8, :, 8 * i : 8 * i + 8].reshape(64, 64)
        assert close(block, want[name].to_dense()), name
