"""Rivals with adapters of their own: where they stand, how they start, and that the aligned model stays below them."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import fishergeo as fg
from alignguard.data import collate, encode_example
from alignguard.drift import measured_kl
from alignguard.updates import lora_updates
from studies.rivals import OFT, OSF, CorDA, KappaTargets, MLPTargets, OPLoRA, Rival, Run, make_rival, train_rival
from studies.rivals.base import put_updates

TARGETS = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture
def trained(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    counter = itertools.count()

    def train(rival, lora=None, steps=3, dtype=torch.float32):
        return train_rival(
            rival, tiny_llama(dtype), task_rows, alignment_rows, tmp_path / str(next(counter)), tokenizer=tokenizer,
            lora={"r": 2, "target_modules": TARGETS} if lora is None else lora,
            training={"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
        )  # fmt: skip

    return train


@pytest.fixture
def batch(tokenizer, alignment_rows):
    return collate([encode_example(tokenizer, r["prompt"], r["response"]) for r in alignment_rows], 0)


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


ADAPTERS = {
    "oft": {"block": 8},
    "corda": {"examples": 3},
    "mlp-targets": {},
    "oplora": {"directions": 4},
    "osf": {"share": 0.5},
    "kappa-targets": {"share": 0.3},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_trains_with_the_aligned_model_below_it(
    trained, tiny_llama, tokenizer, alignment_rows, batch, tmp_path, name
):
    lora = {"r": 2, "target_modules": "all-linear"} if name in ("kappa-targets", "mlp-targets", "corda") else None
    result = trained(make_rival(name, ADAPTERS[name]), lora)
    assert len(result.step_seconds) == 3
    base, after = logits(tiny_llama(), batch), logits(result.model, batch)
    assert (after - base).abs().max() > 1e-3
    with result.model.disable_adapter():
        torch.testing.assert_close(logits(result.model, batch), base, rtol=1e-5, atol=1e-6)
    # what is saved is what was trained
    loaded = PeftModel.from_pretrained(tiny_llama(), str(result.adapter_dir)).eval()
    torch.testing.assert_close(logits(loaded, batch), after, rtol=1e-4, atol=1e-5)
    # KL through the adapter's switch is KL from the original model
    through = measured_kl(result.model, None, tokenizer, alignment_rows)
    assert through > 0
    assert through == pytest.approx(measured_kl(result.model, tiny_llama(), tokenizer, alignment_rows), rel=1e-4)


def test_feed_forward_targets_are_those_blocks_and_nothing_else(trained, tiny_llama):
    result = trained(MLPTargets(), {"r": 2, "target_modules": "all-linear"})
    names = {name.removeprefix("base_model.model.") for name in lora_updates(result.model)}
    parts = ("gate_proj", "up_proj", "down_proj")
    assert names == {f"model.layers.{i}.mlp.{part}" for i in range(2) for part in parts}

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = torch.nn.Linear(2, 2)

        def get_output_embeddings(self):
            return None

    with pytest.raises(ValueError, match="no linear layer inside a block named"):
        MLPTargets().adapter(Other(), LoraConfig(), [])


def test_kappa_targets_are_the_roundest_matrices(tiny_llama):
    model = tiny_llama()
    kappas = {
        name: float(torch.linalg.cond(module.weight.detach().double()))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    chosen = sorted(kappas, key=kappas.get)[: int(0.3 * len(kappas))]
    found = KappaTargets(share=0.3).adapter(model, LoraConfig(), [])
    assert set(found.target_modules) == set(chosen) - {"lm_head"}
    assert found.target_parameters is None


def test_oft_turns_inputs_by_blocks(trained, tiny_llama):
    result = trained(OFT(block=8), steps=4)
    module = result.model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    rotation = module.get_delta_weight("default").detach().double()
    eye = torch.eye(len(rotation), dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, eye, rtol=0, atol=1e-3)
    assert (rotation - eye).abs().max() > 1e-3
    blocks = torch.block_diag(*[torch.ones(8, 8)] * 6).bool()
    assert not rotation[~blocks].any()
    # the dense product by which the layer answers
    x, weight = torch.randn(5, 48), module.get_base_layer().weight.detach()
    got = module(x).detach()
    assert min(float((got - x @ turn.float() @ weight.T).abs().max()) for turn in (rotation, rotation.T)) < 1e-4


def test_a_limit_holds_ofts_rotations_back(trained):
    free, held = (trained(OFT(block=8, eps=eps), steps=6) for eps in (None, 1e-3))
    size = lambda model: max(float(p.norm(dim=-1).max()) for n, p in model.named_parameters() if "oft_R" in n)
    assert size(held.model) < 0.5 * size(free.model)


def test_corda_starts_at_the_directions_that_alignment_inputs_use_least(tiny_llama, tokenizer, alignment_rows):
    model = tiny_llama()
    before = copy.deepcopy(model)
    rows = [encode_example(tokenizer, r["prompt"], r["response"]) for r in alignment_rows]
    rival = CorDA(examples=3)
    config = rival.adapter(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), rows)
    adapted = get_peft_model(model, config)
    tapes = {}
    for name, module in before.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS:
            module.register_forward_hook(
                lambda m, inputs, out, name=name: tapes.setdefault(name, []).append(inputs[0].detach()[0].double())
            )
    for row in rows[:3]:
        before(input_ids=torch.tensor([row["input_ids"]]))
    assert len(tapes) == 6
    for name, inputs in tapes.items():
        moments = sum((x / x.max().abs()).T @ (x / x.max().abs()) for x in inputs) / 3
        moments += 0.01 * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
        weight = before.get_submodule(name).weight.detach().double()
        u, s, vh = torch.linalg.svd(weight @ moments, full_matrices=False)
        expected = (u[:, -4:] * s[-4:]) @ vh[-4:] @ torch.linalg.inv(moments)
        module = adapted.get_submodule(f"base_model.model.{name}")
        delta = 2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
        torch.testing.assert_close(delta.detach().double(), expected, rtol=5e-2, atol=2e-3)
        torch.testing.assert_close(module.get_base_layer().weight + delta, before.get_submodule(name).weight)
        assert torch.equal(rival.aligned[name], before.get_submodule(name).weight)


def test_corda_ends_as_twice_the_rank_on_the_aligned_weights(trained, tiny_llama, batch):
    seen = {}

    class Watched(CorDA):
        def finish(self, run):
            seen["before"] = logits(run.model.eval(), batch)
            super().finish(run)

    result = trained(Watched(examples=3))
    torch.testing.assert_close(logits(result.model, batch), seen["before"], rtol=1e-4, atol=1e-5)
    assert {delta.rank for delta in lora_updates(result.model).values()} == {4}
    assert result.examples_read == 3


@pytest.fixture
def run(tiny_llama):
    model = get_peft_model(tiny_llama(torch.float64), LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return Run(model.eval(), [], 0, seed=5)


def test_oplora_keeps_the_leading_singular_triples(run):
    free = {name: delta.to_dense().detach() for name, delta in lora_updates(run.model).items()}
    rival = OPLoRA(directions=5)
    rival.start(run)
    during = {name: delta.to_dense().detach() for name, delta in lora_updates(run.model).items()}
    rival.finish(run)
    assert {n.rsplit(".", 1)[-1] for n, _ in run.model.named_parameters() if "lora_" in n} == {"weight"}
    for name, delta in lora_updates(run.model).items():
        weight = run.model.get_submodule(name).get_base_layer().weight.detach()
        u, s, vh = torch.linalg.svd(weight)
        left = torch.eye(len(u), dtype=torch.float64) - u[:, :5] @ u[:, :5].T
        right = torch.eye(len(vh), dtype=torch.float64) - vh[:5].T @ vh[:5]
        torch.testing.assert_close(delta.to_dense().detach(), left @ free[name] @ right, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(during[name], delta.to_dense().detach())
        moved = weight + delta.to_dense().detach()
        torch.testing.assert_close(moved @ vh[:5].T, u[:, :5] * s[:5])
        torch.testing.assert_close(u[:, :5].T @ moved, s[:5, None] * vh[:5])


def test_oplora_names_a_matrix_that_would_be_left_with_nothing(run):
    with pytest.raises(ValueError, match=r"oplora: directions=32 leaves nothing of .*q_proj"):
        OPLoRA(directions=32).start(run)


def test_osf_trains_away_from_the_leading_directions(trained):
    result = trained(OSF(share=0.25), steps=4)
    module = result.model.get_submodule("base_model.model.model.layers.1.self_attn.o_proj")
    delta = module.get_delta_weight("default").detach()
    u, _, vh = torch.linalg.svd(module.get_base_layer().weight.detach())
    assert delta.norm() > 1e-3
    # a random matrix has half of its norm along a quarter of the directions; Adam's steps are not quite orthogonal
    assert (u[:, :8].T @ delta).norm() < 0.2 * delta.norm()
    assert (delta @ vh[:8].T).norm() < 0.2 * delta.norm()


def test_updates_of_any_rank_take_the_adapters_place_and_are_saved(run, tiny_llama, tmp_path, batch):
    generator = torch.Generator().manual_seed(2)
    updates = {}
    for rank, (name, delta) in enumerate(lora_updates(run.model).items(), 2):
        p, q = delta.shape
        left = torch.randn(p, rank, generator=generator, dtype=torch.float64)
        updates[name] = fg.LowRank(0.1 * left, torch.randn(rank, q, generator=generator, dtype=torch.float64))
    put_updates(run.model, updates)
    for name, delta in lora_updates(run.model).items():
        torch.testing.assert_close(delta.to_dense().detach(), updates[name].to_dense())
    run.model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(torch.float64), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, batch), logits(run.model, batch))


def test_an_adapter_of_its_own_needs_a_model_without_one(tiny_llama, tokenizer, task_rows, tmp_path):
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(ValueError, match="carries its adapter already"):
        train_rival(OFT(), adapted, task_rows, None, tmp_path / "out", tokenizer=tokenizer)
    assert Rival.after_training() and not OFT.after_training()


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("oft", {"block": 1}, "block must be at least 2"),
        ("oft", {"eps": 0}, "eps must lie above 0"),
        ("corda", {"examples": 0}, "examples"),
        ("oplora", {"directions": 0}, "directions"),
        ("osf", {"share": 1.0}, "share must lie inside"),
        ("osf", {"share": 1.5}, "share must lie in"),
        ("kappa-targets", {"share": 0}, "share must lie above 0"),
    ],
)
def test_settings_out_of_range_are_named(name, settings, words):
    with pytest.raises(ValueError, match=words):
        make_rival(name, settings)
