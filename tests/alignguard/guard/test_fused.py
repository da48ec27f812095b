"""Kernels that read weights without calling modules: an error that names their options, or a guard that holds."""

import copy

import pytest
import torch
from architectures import MODELS, from_zero, make, move
from dense_penalty import ROWS
from fused_kernels import fuse_mlp, fused, traced

import fishergeo as fg
from alignguard.guard import Guard, GuardConfig
from alignguard.guard.layer_curvature import check_widths
from alignguard.updates import Matrix, WeightUpdates
from fishergeo.estimation import NeverCalled

OPTIONS = ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "unsloth", "use_liger_kernel", "exclude="]


@pytest.fixture
def pair():
    """A model, and the same with its MLPs, three of seven matrices, fused."""
    model = make()
    move(model)
    return model, fuse_mlp(copy.deepcopy(model))


@pytest.mark.parametrize("compute", [fused, traced], ids=["no gradient of W0", "a gradient of W0"])
@pytest.mark.parametrize("structure", ["kfac", "kfac-sketch", "gram", "sketch"])
def test_layers_that_never_fire_are_an_error_that_names_the_kernel_options(structure, compute):
    model = fuse_mlp(make(), compute)
    with pytest.raises(ValueError, match="3 guarded layers never fire while 4 others do") as caught:
        Guard.from_alignment(model, ROWS[None], GuardConfig.curvature(structure=structure))
    assert all(option in str(caught.value) for option in OPTIONS)
    assert "model.layers.0.mlp.down_proj" in str(caught.value)


def test_later_estimates_find_a_kernel_that_was_switched_on_since():
    model = make()
    guard = Guard.from_alignment(model, ROWS[None], GuardConfig.curvature())
    fuse_mlp(model)
    with pytest.raises(ValueError, match="3 guarded layers never fire while 4 others do"):
        guard.refresh()


def test_what_is_excluded_may_be_fused():
    config = GuardConfig.curvature(exclude=("*.mlp.*",))
    assert len(Guard.from_alignment(fuse_mlp(make()), ROWS[None], config).layers) == 4


def test_kl_alone_reads_no_layer_and_is_the_same_under_fused_kernels(pair):
    found = []
    for model in pair:
        guard = from_zero(model, lambda model=model: Guard(model, ROWS[None], GuardConfig()))
        guard.begin_step(0)
        penalty = guard.penalty()
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append((penalty.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(penalty, trained)])))
    (plain, slope), (other, slope_other) = found
    assert plain > 1e-4 and abs(plain - other) < 1e-9 * plain
    assert (slope - slope_other).norm() < 1e-8 * slope.norm()


@pytest.mark.parametrize("verify", [True, False])
def test_the_estimate_itself_says_who_was_never_called(verify):
    model = fuse_mlp(make())
    layers = [f"base_model.model.model.layers.0.{name}.base_layer" for name in ("self_attn.q_proj", "mlp.up_proj")]
    ids = torch.tensor([[3, 4, 5, 6]])
    with pytest.raises(NeverCalled, match="never called, while 1 others were") as caught:
        fg.estimate_fisher(model, [{"input_ids": ids, "labels": ids}], "gram", layers=layers, verify=verify)
    assert caught.value.layers == layers[1:] and caught.value.others == 1


def test_experts_are_left_out_by_the_name_of_their_stack():
    expert = Matrix(
        "mlp.experts.up_proj.3", "mlp.experts.up_proj.3", "dense of an expert", (20_000, 4), None, None, None
    )
    plain = Matrix("mlp.up_proj.3", "mlp.up_proj.3", "dense", (20_000, 4), None, None, None)
    for matrix, name in ((expert, "'mlp.experts.up_proj'"), (plain, "'mlp.up_proj.3'")):
        with pytest.raises(ValueError, match=f"20000 outputs.*exclude={name}"):
            check_widths([matrix], GuardConfig.curvature(structure="kfac"))


def test_one_stack_of_experts_may_be_left_out_where_every_weight_trains():
    torch.manual_seed(0)
    model, names = MODELS["mixtral"](), []
    for exclude in ((), ["*.gate_up_proj"], ["*.experts"]):
        updates = WeightUpdates(model, "full", exclude=exclude)
        names.append({matrix.excludable for matrix in updates.matrices.values() if ".experts." in matrix.plain})
    stacks = {f"model.layers.0.mlp.experts.{own}" for own in ("gate_up_proj", "down_proj")}
    assert names == [stacks, {"model.layers.0.mlp.experts.down_proj"}, set()]
    assert list(WeightUpdates(model, "full", exclude=sorted(stacks)[:1]).skipped.values()).count("excluded") == 1
