"""The plan: layers of a kind on one line, and memory that counts activations."""

import dataclasses
import json

import pytest
import torch

from alignguard import GuardConfig
from alignguard.cli import main
from alignguard.guard.guard import CHECKED
from alignguard.training import activation_bytes, plan_text, prepare
from alignguard.training.dry_run import examples_read
from alignguard.updates import coverage_table
from alignguard.updates.covered import Covered

CONFIG = GuardConfig.curvature(refresh_every=2, refresh_examples=2)


@pytest.fixture
def ready(tiny_llama, tokenizer, task_rows, alignment_rows):
    def make(layers=3, **training):
        fields = {"max_steps": 2, "per_device_train_batch_size": 2, **training}
        return prepare(
            tiny_llama(layers=layers), task_rows, alignment_rows, CONFIG, tokenizer=tokenizer, training=fields
        )

    return make


def test_layers_of_a_kind_share_a_line(ready):
    lines = ready().guard.coverage()
    folded, whole = coverage_table(lines, fold=True), coverage_table(lines)
    assert len(lines) == 21 and whole.count("q_proj") == 3 and folded.count("q_proj") == 1
    assert "model.layers.*.self_attn.q_proj (3)" in folded
    assert folded.splitlines()[-1] == whole.splitlines()[-1] == "21 matrices guarded, 0 trained parameters not"


def test_experts_fold_and_what_differs_does_not():
    lines = [Covered(f"layers.{i}.experts.{e}.up", True, "s·BA", (4, 4), 2) for i in range(2) for e in range(3)]
    odd = [Covered("layers.2.experts.0.up", True, "s·BA", (8, 4), 2), Covered("layers.0.bias", False, "a vector")]
    shown = coverage_table([*lines, *odd], fold=True)
    assert "layers.*.experts.*.up (6)" in shown and "layers.2.experts.0.up " in shown and "layers.0.bias" in shown
    assert len(shown.splitlines()) == len(coverage_table([lines[0], *odd]).splitlines())


def test_memory_counts_activations_which_grow_with_the_batch(ready):
    small, large = ready(per_device_train_batch_size=1), ready(per_device_train_batch_size=8)
    state = torch.random.get_rng_state()
    few, many = (activation_bytes(dataclasses.replace(made, guard=None)) for made in (small, large))
    assert many > 4 * few > 0
    many = activation_bytes(large)
    assert many >= activation_bytes(small) > 0 and torch.equal(state, torch.random.get_rng_state())
    deep = activation_bytes(ready(layers=6, per_device_train_batch_size=8))
    assert 1.3 * many < deep < 2.2 * many
    memory = next(line for line in plan_text(large, None, many).splitlines() if line.startswith("memory"))
    assert "weights" in memory and f"activations {many / 2**20:.1f} MiB" in memory and "curvature" in memory


@pytest.mark.parametrize("steps", [5, 23])
@pytest.mark.parametrize("rows", [3, 24])
@pytest.mark.parametrize(
    "config",
    [
        GuardConfig(),
        GuardConfig(kl_memory=0, kl_every=3),
        GuardConfig.curvature(refresh_examples=4),
        GuardConfig.paper(refresh_every=7),
        GuardConfig.combined(refresh_every=6),
        GuardConfig(max_drift=0.5, held_back=2, measure_every=4),
    ],
)
def test_the_plan_reads_what_the_guard_reads(tiny_llama, tokenizer, alignment_rows, config, rows, steps):
    kept = (alignment_rows * 12)[:rows]
    made = prepare(tiny_llama(), alignment_rows, kept, config, tokenizer=tokenizer, training={"max_steps": steps})
    guard, held = made.guard, len(made.guard.alignment.held)
    planned = examples_read(guard, steps, 4)
    guard.begin_run(steps)
    for step in range(steps):
        guard.begin_step(step, 4)
        guard.penalty()
    measured = held * ((steps - 1) // config.measure_every)
    compared = (
        0 if held or not guard.uses_curvature else (guard.refreshes - 1) * min(CHECKED, config.refresh_examples, rows)
    )
    assert planned == pytest.approx(guard.examples_read - compared - 2 / 3 * measured)


def test_what_a_linear_layer_keeps_is_what_is_counted(ready):
    """By hand: a model of one Linear keeps its input, and nothing else."""
    made = ready(layers=1)

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(7, 5)

        def forward(self, input_ids, **rest):
            return self.linear(torch.ones(*input_ids.shape, 7))

    rows = [{"input_ids": [1] * 11, "labels": [1] * 11}]
    object.__setattr__(made, "model", One())
    object.__setattr__(made, "rows", rows)
    object.__setattr__(made, "guard", None)
    assert activation_bytes(made) == 11 * 7 * 4


def test_the_command_line_shows_kinds_and_with_verbose_all(
    tmp_path, capsys, tiny_llama, tokenizer, task_rows, alignment_rows
):
    tiny_llama(layers=3).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    for name, rows in (("t", task_rows), ("k", alignment_rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "fit",
        "--model",
        f"{tmp_path}/m",
        "--task-data",
        f"{tmp_path}/t.jsonl",
        "--alignment-data",
        f"{tmp_path}/k.jsonl",
    ]
    counts = []
    for more in ([], ["--verbose"]):
        assert main([*words, "--dry-run", *more]) == 0
        out = capsys.readouterr().out
        counts.append(out.count("q_proj"))
        assert "activations" in out
    assert counts == [1, 3]
