"""Two processes guard as one: shares of the alignment data, one all-reduce a refresh, the same decisions on both."""

import json

import pytest
import torch
import torch.distributed as dist
from alignment_rows import rows
from architectures import llama, make, move
from forked import distributed
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fishergeo as fg
from alignguard import GuardConfig
from alignguard.guard import Guard
from alignguard.guard.distributed import agreed, pooled_mean, world
from alignguard.training import fit


def moved(dtype=torch.float32):
    model = make(dtype=dtype)
    move(model)
    return model


STRUCTURES = {"kfac": {}, "kfac-sketch": {"sketch_rank": 64}, "gram": {}, "sketch": {"sketch_rank": 64}}


def curvature(structure, count, dtype=torch.float32, **options):
    """Dense curvatures of ``count`` examples; a sketch that has to drop nothing."""
    config = GuardConfig.curvature(
        structure=structure, refresh_examples=count, batch_size=2, **STRUCTURES[structure], **options
    )
    guard = Guard(moved(dtype), rows(8), config)
    seen = []
    estimate = guard.curvature.estimate
    guard.curvature.estimate = lambda mine, *rest: seen.append(len(mine)) or estimate(mine, *rest)
    guard.refresh()
    return {name: layer.operator.to_dense() for name, layer in guard.layers.items()}, seen, guard


def _refresh(folder):
    dist.init_process_group("gloo")
    rank, told, reduces = dist.get_rank(), {}, []
    original = dist.all_reduce
    dist.all_reduce = lambda tensor, *a, **k: reduces.append(tensor.dtype) or original(tensor, *a, **k)
    for structure in STRUCTURES:
        for count in (6, 5, 1):  # divided, uneven, and one process with nothing to read
            reduces.clear()
            found, seen, guard = curvature(structure, count)
            told[f"{structure}-{count}"] = {"seen": seen, "reduces": len(reduces), "read": guard.examples_read}
            if rank == 0:
                save_file({k: v.contiguous() for k, v in found.items()}, folder / f"{structure}-{count}.safetensors")
    drawn = [curvature("gram", 6, kind="mc")[2].layers[n].operator.matrix for n in (next(iter(found)),)]
    told["drawn"] = float(drawn[0].sum())
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def test_a_refresh_is_shared_out_and_equals_that_of_one_process(tmp_path):
    assert distributed(_refresh, 2, 29631, tmp_path) == [0, 0]
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    for structure in STRUCTURES:
        for count in (6, 5, 1):
            name = f"{structure}-{count}"
            shares = [told[rank][name]["seen"] for rank in (0, 1)]
            assert shares == [[(count + 1) // 2], [count // 2] if count > 1 else []], "each example is read once"
            assert all(told[rank][name]["read"] == count for rank in (0, 1))
            if "sketch" not in structure:  # whose states are gathered, being no plain sums
                assert all(told[rank][name]["reduces"] == 1 for rank in (0, 1)), "one all-reduce a refresh"
            ours, theirs = load_file(tmp_path / f"{name}.safetensors"), curvature(structure, count)[0]
            for layer, dense in theirs.items():
                assert (ours[layer] - dense).norm() <= 1e-6 * dense.norm() * (10 if "sketch" in structure else 1), name
    assert told[0]["drawn"] == told[1]["drawn"]


CONFIG = GuardConfig.curvature(
    structure="gram", adaptive=True, max_drift=0.05, refresh_every=2, measure_every=1, refresh_budget=1.0, held_back=3,
    refresh_examples=4, refresh_tolerance=0.02,
)  # fmt: skip


def _decide(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    guard = Guard(moved(), rows(8, seed=rank), CONFIG)  # other examples, so other drifts
    predict = guard.predicted_drift
    guard.predicted_drift = lambda: predict() * (1 + 0.2 * rank)
    path, own = [], []
    for step in range(12):
        guard.begin_step(step, task_examples=16 + 16 * rank)
        path.append({**guard.budget.state_dict(), **guard.freshness.state_dict(), "refreshes": guard.refreshes})
        own.append([guard.start.drift([0, 2] if rank == 0 else [1]), guard.predicted_drift()])
        move(guard.model, 0.03, seed=step)
    (folder / f"path-{rank}.json").write_text(json.dumps([path, own]))
    dist.destroy_process_group()


def test_processes_that_see_other_data_decide_alike(tmp_path):
    assert distributed(_decide, 2, 29632, tmp_path) == [0, 0]
    (first, ours), (second, theirs) = (json.loads((tmp_path / f"path-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert 2 < first[-1]["refreshes"] < 12 and first[-1]["multiplier"] != 1.0
    assert all(abs(a[0] - b[0]) > 1e-6 for a, b in zip(ours[1:], theirs[1:], strict=True)), "or the test shows nothing"
    # the measurement is the mean over the examples that each process read
    last = next(path for path in first if path["measured_at"] == 11)
    assert last["drift"] == pytest.approx((2 * ours[11][0] + theirs[11][0]) / 3, rel=1e-4)


def _sharded(folder):
    """Sharded parameters: as many passes on each process, or all examples on each."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    whole = llama()
    found = []
    for count in (4, 3):
        torch.manual_seed(0)
        model = llama()
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        config = GuardConfig.curvature(refresh_examples=count, batch_size=1, held_back=3, max_drift=1.0)
        guard = Guard(model, rows(10), config, method="full")
        guard.refresh()
        guard._measure()
        if dist.get_rank() == 0:
            single = Guard(whole, rows(10), config, method="full")
            reads = single.rows[:count]
            alone = fg.estimate_fisher(
                whole, [single.alignment.batch([row]) for row in reads], structure="kfac", loss=guard_loss,
                layers=[m.layer for m in single.updates.matrices.values()],
            )  # fmt: skip
            for name, layer in guard.layers.items():
                torch.testing.assert_close(layer.operator.to_dense(), alone[name].to_dense(), rtol=1e-4, atol=1e-7)
        found.append(guard.examples_read)
    assert found == [7, 6]
    dist.destroy_process_group()


def guard_loss(model, batch):
    from alignguard.objective import response_loss

    return response_loss(model, batch)


def test_sharded_parameters_are_refreshed_without_waiting_for_each_other(tmp_path):
    assert distributed(_sharded, 2, 29633, tmp_path) == [0, 0]


def _fit(folder, base, task, kept, world_size):
    training = {"max_steps": 6, "per_device_train_batch_size": 4 // world_size, "use_cpu": True, "logging_steps": 1,
                "train_sampling_strategy": "sequential", "warmup_steps": 0, "learning_rate": 1.0, "optim": "sgd",
                "max_grad_norm": 0.0}  # fmt: skip
    if world_size > 1:
        training["ddp_backend"] = "gloo"
    config = GuardConfig.curvature(adaptive=True, max_drift=0.05, refresh_every=1, measure_every=1, refresh_budget=1.0,
                         held_back=2, refresh_examples=2, refresh_tolerance=0.01, lambda_alignment=0.1)  # fmt: skip
    result = fit(base, task, kept, config, folder, lora={"r": 2}, training=training)
    assert world()[1] == world_size
    rank = world()[0]
    state = {
        **result.guard.budget.state_dict(),
        **result.guard.freshness.state_dict(),
        "refreshes": result.guard.refreshes,
    }
    (folder.parent / f"state-{world_size}-{rank}.json").write_text(json.dumps(state))
    weights = {n: p.detach().clone() for n, p in result.model.named_parameters() if p.requires_grad}
    save_file(weights, folder.parent / f"weights-{world_size}-{rank}.safetensors")


def test_an_adaptive_budget_run_of_two_processes_is_that_of_one(
    tmp_path, tiny_llama, tokenizer, task_rows, alignment_rows
):
    tiny_llama(layers=1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = (tmp_path / "base", task_rows, alignment_rows)
    assert distributed(_fit, 1, 29634, tmp_path / "one", *data, 1) == [0]
    assert distributed(_fit, 2, 29635, tmp_path / "two", *data, 2) == [0, 0]
    states = [json.loads((tmp_path / f"state-2-{rank}.json").read_text()) for rank in (0, 1)]
    alone = json.loads((tmp_path / "state-1-0.json").read_text())
    assert states[0] == states[1] and states[0]["refreshes"] == alone["refreshes"] > 1
    assert states[0]["multiplier"] == pytest.approx(alone["multiplier"], rel=1e-3)
    one, two, other = (load_file(tmp_path / f"weights-{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(two[n], other[n]) for n in two), "both hold the same weights"
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-4 * one[name].norm() + 1e-7, name
    assert (tmp_path / "two" / "adapter" / "README.md").is_file()


def test_one_process_needs_no_process_group():
    assert world() == (0, 1) and agreed(0.1) == 0.1
    assert pooled_mean([1.0, 2.0], torch.nn.Linear(1, 1), lambda part: sum(part) / len(part)) == 1.5
