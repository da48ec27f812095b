"""What a model, its user's hooks and the modes torch is in may be, and that all of it is left as it was."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fishergeo as fg

X = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mean_square(model, batch):
    return model(batch).flatten(1).square().mean(1)


def gram(model, loss, batches, name):
    """1/N Σ G Gᵀ by a loop over single examples."""
    total, count = 0, 0
    for batch in batches:
        parts = batch if isinstance(batch, tuple) else (batch,)
        for i in range(len(parts[0])):
            one = tuple(None if part is None else part[i : i + 1] for part in parts)
            value = loss(model, one if isinstance(batch, tuple) else one[0]).sum()
            (g,) = torch.autograd.grad(value, model.get_submodule(name).weight)
            total, count = total + g @ g.T, count + 1
    return total / count


def check(model, loss, batches, names, tolerance=1e-10):
    model = model.double()
    found = fg.estimate_fisher(model, batches, "gram", layers=list(names), loss=loss)
    model.eval()
    for name in names:
        want = gram(model, loss, batches, name)
        assert want.norm() > 0 and (found[name].to_dense() - want).norm() <= tolerance * want.norm()


# Outputs changed in place.


class InPlace(nn.Module):
    """Changes the output of a layer in one of several ways."""

    def __init__(self, change, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.change = change
        self.a, self.b, self.c = nn.Linear(3, 6, bias), nn.Linear(6, 4, bias), nn.Linear(4, 2)

    def forward(self, x):
        h = self.b(torch.tanh(self.a(x)))
        self.change(h)
        return self.c(torch.tanh(h))


def set_rows(h):
    h[:, 3:] = 0.0


CHANGES = {"rows": set_rows, "scaled": lambda h: h.mul_(3), "relu": lambda h: torch.relu_(h), "twice": lambda h: h.add_(1).mul_(2),
           "view": lambda h: h.view(-1)[::2].mul_(0.5)}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_outputs_changed_in_place_are_captured_as_the_layer_gave_them(change, bias):
    for layers in ("ab", "b"):
        check(InPlace(CHANGES[change], bias), mean_square, [X, X[:2, :4]], layers)


def test_a_batch_that_is_padded_in_place_stands_beside_one_that_is_not():
    class Net(InPlace):
        def forward(self, batch):
            h = self.b(torch.tanh(self.a(batch[0])))
            if batch[1] is not None:
                h[batch[1]] = 0.0
            return h

    pad = torch.zeros(4, 5, dtype=torch.bool)
    pad[1:, 3:] = True
    check(Net(None), mean_square, [(X, None), (X, pad)], "ab")


# Hooks of the user's.


@pytest.mark.parametrize("hook", [
    lambda m, a, out: 3.0 * out,
    lambda m, a, out: out.mul_(2.0),
    lambda m, a, out: torch.tanh(out),
    lambda m, a, out: None,
])  # fmt: skip
def test_a_users_output_hook_comes_after_the_capture(hook):
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    model[0].register_forward_hook(hook)
    check(model, mean_square, [X, X[:, 0]], ["0", "2"])
    assert len(model[0]._forward_hooks) == 1


# Modules whose modes act.


class Merging(nn.Linear):
    """Its low-rank part is merged into the weight by eval() and taken out by train(), as loralib does."""

    def __init__(self):
        super().__init__(3, 4)
        self.low, self.high = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * (self.high.data @ self.low.data)
            self.merged = not mode
        return self

    def forward(self, x):
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.low.T @ self.high.T


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_modules_whose_modes_change_their_weights_are_put_back_to_the_bit(mode, verify):
    torch.manual_seed(0)
    model = nn.Sequential(Merging(), nn.Tanh(), nn.Linear(4, 2), nn.Dropout()).train(mode)
    model[2].train(not mode)
    kept, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    fg.estimate_fisher(model, [X[:, 0].float()], "gram", loss=mean_square, verify=verify, layers="2")
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and model[0].merged == (not mode)
    mean_square(model, X[:, 0].float()).sum().backward()
    assert (model[0].low.grad is None) == (not mode)


def test_a_frozen_batch_norm_stays_frozen():
    class Backbone(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    model = Backbone(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    fg.estimate_fisher(model, [X[:, 0].float()], "gram", loss=mean_square, layers="0")
    assert model.training and model[0].training and not model[1].training


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, nn.utils.spectral_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("use", ["estimate", "stream", "plan"])
def test_reading_a_parametrised_weight_steps_nothing(wrap, use):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).train()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    x = X[:, 0].float()
    if use == "estimate":
        fg.estimate_fisher(model, [x], "gram", loss=mean_square)
    elif use == "stream":
        fg.StreamingFisher(model, [x], loss=mean_square)["2"] @ torch.ones(2)
    else:
        fg.plan(model, "gram", batches=[x], loss=mean_square)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items()) and model.training


# Attention that torch would shorten.


@pytest.mark.parametrize(
    "layers", [["enc.layers.0.linear1"], ["enc.layers.1.linear2", "out"], ["enc.layers.0.linear1", "out"]]
)
def test_a_padded_encoder_of_torchs_own_is_captured(layers):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
            self.enc, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, batch):
            return self.out(self.enc(batch[0], src_key_padding_mask=batch[1]))

    x = torch.randn(4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pad = torch.zeros(4, 5, dtype=torch.bool)
    pad[0, 3:] = True
    loss = lambda m, b: (m(b).square().mean(2) * ~b[1]).sum(1)
    before = torch.backends.mha.get_fastpath_enabled()
    model = Model().double()
    found = fg.estimate_fisher(model, [(x, pad)], "gram", layers=layers, loss=loss)
    assert torch.backends.mha.get_fastpath_enabled() == before
    model.train()  # in which torch takes no shorter way
    for name in layers:
        want = gram(model, loss, [(x, pad)], name)
        assert (found[name].to_dense() - want).norm() <= 1e-10 * want.norm()


# Modes of torch's.


@pytest.mark.parametrize("structure", ["gram", "sketch", "diagonal", "kfac", "kfac-sketch", "ekfac", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_call_is_the_models_alone(structure, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4))
    loss = lambda m, b: m(b).float().square().mean((1, 2))

    def inside(m, b):
        with torch.autocast("cpu", dtype=dtype):
            return loss(m, b)

    options = {"layers": ["0", "1", "3"], "rank": 2}
    want = fg.estimate_fisher(model, [X.float()] * 2, structure, loss=inside, **options)
    with torch.autocast("cpu", dtype=dtype):
        got = fg.estimate_fisher(model, [X.float()] * 2, structure, loss=loss, **options)
        assert torch.is_autocast_enabled("cpu")
    plain = fg.estimate_fisher(model, [X.float()] * 2, structure, loss=loss, **options)
    for name in got:
        assert got[name].dtype == torch.float32
        assert torch.allclose(got[name].trace(), want[name].trace(), rtol=1e-5)
        assert torch.allclose(got[name].trace(), plain[name].trace(), rtol=0.1)


def test_streams_and_shards_run_under_autocast():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fg.StreamingFisher(model, [X.float()], loss=mean_square)["2"] @ torch.ones(4)
        fg.sketch_shards(model, [X.float()], 2, loss=mean_square, rank=2)


def test_what_can_have_no_gradient_is_named_before_any_pass():
    model, calls = nn.Linear(3, 4), []
    batches = (calls.append(1) or X.float() for _ in range(3))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*outside"):
        fg.estimate_fisher(model, batches, "gram", loss=mean_square)
    with torch.inference_mode():
        other = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"'weight' was made under torch\.inference_mode"):
        fg.estimate_fisher(other, batches, "gram", loss=mean_square)
    with pytest.raises(ValueError, match=r"'weight' is on the meta device.*fishergeo\.plan"):
        fg.estimate_fisher(nn.Linear(3, 4, device="meta"), batches, "gram", loss=mean_square)
    assert not calls
    with pytest.raises(ValueError, match=r"runs under torch\.func"):
        fg.estimate_fisher(model, [X[:, 0].float()], "gram", loss=lambda m, b: torch.vmap(m)(b).square().mean(1))


def test_batches_made_under_inference_mode_are_data_like_any():
    model = nn.Linear(3, 4)
    with torch.inference_mode():
        x = X.float().clone()
    got = fg.estimate_fisher(model, [x], "gram", loss=mean_square)
    assert torch.equal(
        got[""].to_dense(), fg.estimate_fisher(model, [X.float()], "gram", loss=mean_square)[""].to_dense()
    )


def test_a_gradient_that_is_rounding_alone_raises_no_false_alarm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 8), nn.LayerNorm(8, elementwise_affine=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg.estimate_fisher(model, [X.float()], "gram", loss=mean_square)  # the mean square after a norm is one


# Tensors that are none of the model's.


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("checkpointed", [None, True, False])
def test_no_gradient_is_left_or_announced_outside_the_model(checkpointed, verify):
    torch.manual_seed(0)
    before, body, after = nn.Linear(3, 3).double(), nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    given = X[:, 0].clone().requires_grad_(True)
    fresh = X[:, 1].clone().requires_grad_(True)
    outside = [given, fresh, *before.parameters(), *after.parameters()]
    after(body(before(given))).sum().backward()
    kept = {t: None if t.grad is None else t.grad.clone() for t in outside}
    called, handles = [], []
    for tensor in outside:
        handles.append(tensor.register_hook(lambda g: called.append("gradient") or g))
        handles.append(tensor.register_post_accumulate_grad_hook(lambda t: called.append("accumulated")))

    inner = lambda m, x: after(m(before(x)))

    def loss(m, b):
        x = b[0] + 0.5 * b[1]
        out = inner(m, x) if checkpointed is None else checkpoint(inner, m, x, use_reentrant=checkpointed)
        return out.square().sum(1)

    found = fg.estimate_fisher(body, [(given, fresh)], "exact", loss=loss, verify=verify)
    if checkpointed is not True:  # whose own backward reaches what it does not name
        assert called == []
        assert all(t.grad is None if g is None else torch.equal(t.grad, g) for t, g in kept.items())
    assert fresh.grad is None and torch.equal(given.grad, kept[given])
    assert all(t.requires_grad for t in outside)
    if checkpointed is None:
        want = [torch.autograd.grad(after(body(before(x + f * 0.5))).square().sum(), body.weight)[0]
                for x, f in zip(X[:, 0], X[:, 1], strict=True)]  # fmt: skip
        assert torch.allclose(found[""].weight_gradients(), torch.stack(want), rtol=1e-12)
    called.clear()
    after(body(before(given))).sum().backward()
    assert called.count("accumulated") == 5 and called.count("gradient") == 5  # the hooks are there again
    for handle in handles:
        handle.remove()
