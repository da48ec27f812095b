"""Every architecture and adapter: the penalty and its gradient against the dense formula on peft's own merge."""

import copy

import alignment_rows
import pytest
import torch
from architectures import ADAPTERS, EXPERTS, MODELS, llama, make, merged_weights, move, weight_of
from dense_penalty import CONFIG, ROWS, TOLERANCE, check, dense_penalty, random_fisher
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model

import fishergeo as fg
from alignguard.guard import Guard, GuardConfig
from alignguard.updates import WeightUpdates, coverage_table

CASES = [(name, "lora") for name in MODELS] + [("llama", kind) for kind in [*ADAPTERS, "two"] if kind != "lora"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_penalty_and_gradient_equal_the_dense_formula_on_the_merged_weights(name, kind, dtype):
    model = make(name, kind, dtype)
    start = merged_weights(model) if kind in ("pissa", "olora") else _base(model)
    guard = Guard(model, ROWS.get(name, ROWS[None]), CONFIG)
    check(model, guard, start, CONFIG, dtype)


def _base(model):
    with model.disable_adapter():
        return {k: v for k, v in merged_weights_of_base(model).items()}


def merged_weights_of_base(model):
    return {n: p.detach().clone() for n, p in copy.deepcopy(model).unload().named_parameters()}


@pytest.mark.parametrize("name", ["gpt2", "t5", "classifier", "llama", "mixtral"])
def test_curvature_is_estimated_for_every_kind_of_model_and_read_right(name):
    model = make(name)
    guard = Guard(model, ROWS.get(name, ROWS[None]), CONFIG)
    check(model, guard, _base(model), CONFIG, torch.float64, estimate=True)
    assert set(guard.layers) == set(guard.updates.matrices) and guard.examples_read == 2


def test_kfac_and_the_soft_projector_on_dense_and_factored_updates():
    config = GuardConfig.curvature(
        lambda_alignment=0.7,
        lambda_task=0.3,
        lambda_collision=0.2,
        alpha=0.4,
        energy=0.6,
        projection="soft",
        whole_update=False,
    )
    model = make("llama", "saved")
    guard = Guard(model, ROWS[None], config)
    check(model, guard, _base(model), config, torch.float64)
    assert any(m.rank is None for m in guard.updates.matrices.values())
    layer = next(iter(guard.layers.values()))
    assert float(layer.projector.weights.max()) < 1 and 0.5 in layer.projector.weights.round(decimals=12)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_alignment_term_is_the_quadratic_penalty_around_the_start(method):
    model = make("llama") if method == "lora" else MODELS["llama"]().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    guard = Guard(model, ROWS[None], GuardConfig.curvature(structure="kfac", lambda_alignment=0.7), method=method)
    fisher = random_fisher(guard, torch.float64, "kfac")
    guard.use_fisher(fisher)
    penalty = fg.QuadraticPenalty(model, fisher, strength=1.4)
    move(model)
    assert float(penalty().detach()) > 1e-3
    torch.testing.assert_close(penalty(), guard.penalty().to(penalty().dtype), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_full_fine_tuning_charges_the_dense_update(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    guard = Guard(model, ROWS[None], CONFIG, method="full", offload="cpu")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    move(model)
    guard.use_fisher(random_fisher(guard, torch.float64))
    leaves = {n: (p.detach() - start[n]).requires_grad_(True) for n, p in model.named_parameters()}
    expected = dense_penalty(
        guard, {m.name: weight_of(leaves, m.plain) for m in guard.updates.matrices.values()}, CONFIG
    )
    expected.backward()
    penalty = guard.penalty()
    penalty.backward()
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)
    for n, p in model.named_parameters():
        if p.grad is not None:
            assert (p.grad - leaves[n].grad).norm() <= 1e-9 * leaves[n].grad.norm(), n
    kept = sum(t.numel() for t in guard.updates.references().values())
    assert kept == sum(p.numel() for p in model.parameters() if p.grad is not None), (
        "one copy of what is guarded, no more"
    )
    assert any("embed" in n or "wte" in n for n in guard.updates.skipped)


def test_the_dense_penalty_keeps_no_update_in_the_graph():
    model = llama(tie_word_embeddings=False)
    guard = Guard(model, ROWS[None], GuardConfig.curvature(structure="gram"), method="full")
    move(model)
    guard.use_fisher(random_fisher(guard, torch.float32))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.shape) or t, lambda t: t):
        guard.penalty()
    shapes = {tuple(m.shape) for m in guard.updates.matrices.values()}
    assert not [s for s in held if tuple(s) in shapes]


def llama_start():
    torch.manual_seed(0)
    return {n: p.detach() for n, p in llama().named_parameters()}


def test_start_snapshots_measure_from_the_model_before_training():
    for kind in ("pissa", "olora"):
        model = make("llama", kind, torch.float32)
        guard = Guard(model, ROWS[None], GuardConfig.curvature(lambda_alignment=0.0, lambda_kl=1.0))
        assert not guard.updates.base_is_reference
        assert all(float(matrix.read().norm()) < 1e-5 for matrix in guard.updates.matrices.values())
        assert abs(float(guard.penalty())) < 1e-5, "KL to the start, not to the residual base"
        move(model)
        assert float(guard.penalty()) > 1e-4
        plain = llama_start()
        for matrix in guard.updates.matrices.values():
            torch.testing.assert_close(matrix.weight(), weight_of(plain, matrix.plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "lora") for name in MODELS), *(("llama", k) for k in ("rslora", "saved", "two", "pissa"))],
)
def test_an_adapter_that_was_trained_before_is_charged_from_the_weights_at_the_start(name, kind, dtype):
    model = make(name, kind, dtype)
    move(model, seed=5)
    start = merged_weights(model)
    guard = Guard(model, ROWS.get(name, ROWS[None]), CONFIG)
    assert not guard.updates.base_is_reference
    assert all(float(m.read().norm() if m.rank else m.read().abs().max()) == 0 for m in guard.updates.matrices.values())
    for matrix in guard.updates.matrices.values():
        torch.testing.assert_close(matrix.weight(), weight_of(start, matrix.plain), rtol=0, atol=1e-6)
    check(model, guard, start, CONFIG, dtype)


def test_an_adapter_whose_product_is_random_at_the_start_is_charged_from_there():
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")).double()
    start = merged_weights(model)
    guard = Guard(model, ROWS[None], CONFIG)
    check(model, guard, start, CONFIG, torch.float64)


def test_a_fresh_adapter_keeps_no_copies_and_is_switched_off_to_read_the_base():
    for name in MODELS:
        updates = WeightUpdates(make(name))
        assert updates.base_is_reference and not any("B0A0" in m.kind for m in updates.matrices.values())
        assert all(key.endswith("|weight") for key in updates.references())  # of a classifier's head, trained whole


def test_small_steps_from_a_large_adapter_are_measured_to_rounding_of_the_steps():
    model = make("llama", dtype=torch.float32)
    move(model, 3.0, seed=5)
    updates = WeightUpdates(model)
    before = merged_weights(model.double())
    move(model.float(), 1e-4)
    after = merged_weights(model.double())
    squares = sum(float((after[n] - before[n]).square().sum()) for n in after)
    model.float()
    assert updates.distance() == pytest.approx(squares**0.5, rel=1e-3)


def logits(model):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in ROWS[None]])


@pytest.mark.parametrize("config", [GuardConfig(), GuardConfig(max_drift=0.5, held_back=1)], ids=["kl", "budget"])
def test_drift_of_a_continued_run_is_from_what_the_model_said_at_the_start(config):
    model = make("llama")
    move(model, 0.3, seed=5)
    told = torch.log_softmax(logits(model), -1)
    guard = Guard(model, ROWS[None], config)
    assert abs(guard.measured_drift()) < 1e-6 and abs(float(guard.penalty())) < 1e-6
    move(model, 0.1)
    now = torch.log_softmax(logits(model), -1)
    nats = (told.exp() * (told - now)).sum(-1)
    # the token before a supervised one predicts it: two of the first row, one of the second
    of_rows = [float(nats[1] + nats[2]), float(nats[4])]
    found = [of_rows[ROWS[None].index(row)] for row in (guard.start or guard.kl.reference).rows]
    assert guard.measured_drift() == pytest.approx(sum(found) / len(found), rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("lambda_alignment", [0.0, 1.0])
def test_drift_is_of_whole_responses_where_kl_reads_their_first_tokens(method, lambda_alignment):
    model = make("llama")
    move(model, 0.3, seed=5)
    if method == "full":
        model = model.merge_and_unload().requires_grad_(True)
    found = {}
    for tokens in (1, None):
        options = {"lambda_alignment": lambda_alignment, "refresh_every": 1, "first_refresh": None, "kl_memory": 0}
        config = GuardConfig(kl_tokens=tokens, refresh_examples=2, **options)
        guard = Guard(copy.deepcopy(model), alignment_rows.rows(20), config, method=method)
        guard.begin_step(0)
        move(guard.model, 0.05)
        if lambda_alignment:
            guard.begin_step(1)
        found[tokens] = guard.measured_drift(), guard.gauge.measured or 0.0
    assert found[1] == pytest.approx(found[None], rel=1e-6) and found[1][0] > 1e-4
    assert (found[1][1] > 1e-4) == bool(lambda_alignment)


def test_whole_responses_that_there_is_no_room_for_are_not_measured_by_their_first_tokens():
    model = make("llama", dtype=torch.float32).unload().requires_grad_(True)
    row = {"input_ids": [5] * 1001, "labels": [-100] + [5] * 1000}
    guard = Guard(model, [row] * 2, GuardConfig(kl_cache_mb=1), method="full")
    assert guard.measured_drift() is None
    few = [{"input_ids": [5] * 501, "labels": [-100] + [5] * 500}] * 2
    guard = Guard(model, few, GuardConfig(kl_cache_mb=1), method="full")
    assert len(guard._readable().rows) == 1 and guard.measured_drift() == 0


@pytest.mark.parametrize("part", ["excluded", "bias", "saved", "tokens"])
def test_what_an_adapter_holds_outside_the_guard_is_part_of_the_start_too(part):
    fields = {
        "excluded": {"target_modules": ["q_proj", "k_proj"]}, "bias": {"target_modules": ["q_proj"], "lora_bias": True},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 9]}},
    }[part]  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=2, **fields)).eval()
    config = GuardConfig(exclude=("*.k_proj",) if part == "excluded" else ())
    assert Guard(model, ROWS[None], config).updates.base_is_reference
    name = {
        "excluded": "k_proj.lora_B",
        "bias": "lora_B.default.bias",
        "saved": "norm.modules_to_save",
        "tokens": "delta",
    }
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.requires_grad and name[part] in path:
                parameter += 0.5
    guard = Guard(model, ROWS[None], config)
    assert not guard.updates.base_is_reference
    assert abs(guard.measured_drift()) < 1e-6 and abs(float(guard.penalty())) < 1e-6


def test_a_model_that_is_moved_after_the_guard_is_made_takes_the_start_with_it():
    model = make("llama", dtype=torch.float32)
    move(model, seed=5)
    updates = WeightUpdates(model)
    model.double()  # another type here, another device in a trainer
    assert all(m.read().dtype == torch.float64 and m.read().norm() < 1e-6 for m in updates.matrices.values())


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_a_continued_run_is_resumed_from_its_own_start_alone(kind):
    def begun(seed):
        model = make("llama", kind, torch.float32)
        move(model, seed=seed)
        return model

    model = begun(5)
    guard = Guard(model, ROWS[None], GuardConfig())
    move(model)
    state, value = guard.state_dict(), guard.measured_drift()
    again = begun(5)
    other = Guard(again, ROWS[None], GuardConfig())
    again.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    assert other.measured_drift() == value > 1e-4
    for elsewhere in (begun(6), model, *([make("llama", dtype=torch.float32)] if kind == "lora" else [])):
        with pytest.raises(ValueError, match=r"other weights than the run began at|trained before"):
            Guard(elsewhere, ROWS[None], GuardConfig()).load_state_dict(state)


@pytest.mark.parametrize("config", [GuardConfig(), GuardConfig(max_drift=0.5, held_back=1)], ids=["kl", "budget"])
def test_a_fresh_run_is_resumed_by_tools_that_load_the_adapter_before_the_guard_is_made(config):
    model = make("llama", "saved", torch.float32)
    guard = Guard(model, ROWS[None], config)
    move(model)
    state, value, norm = guard.state_dict(), guard.measured_drift(), guard.updates.distance()
    other = Guard(model, ROWS[None], config)
    assert abs(other.measured_drift()) < 1e-6
    for _ in range(2):  # and from its own checkpoint once more
        other.load_state_dict(state)
        assert other.updates.base_is_reference and other.measured_drift() == value > 1e-4
        assert other.updates.distance() == pytest.approx(norm, rel=1e-6)
        state, other = other.state_dict(), Guard(model, ROWS[None], config)


def test_full_fine_tuning_is_resumed_from_its_own_start_alone():
    model = MODELS["llama"]()
    guard = Guard(model, ROWS[None], GuardConfig(), method="full")
    state = guard.state_dict()
    move(model)
    with pytest.raises(ValueError, match="other weights than the run began at"):
        Guard(model, ROWS[None], GuardConfig(), method="full").load_state_dict(state)


def test_full_fine_tuning_of_a_model_with_layers_of_an_adapter_inside_is_refused():
    inner = make("llama").base_model.model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"carries layers of an adapter already.*unload"):
        WeightUpdates(inner, method="full")


def test_a_router_is_guarded_only_if_asked_for():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.gate.weight", *EXPERTS])
    model = get_peft_model(MODELS["mixtral"](), config)
    updates = WeightUpdates(model)
    assert len(updates.matrices) == 1 + 2 * 3
    assert any("gate.lora_A" in n and "router" in why for n, why in updates.skipped.items())
    with pytest.raises(ValueError, match="MixtralTopKRouter"):
        WeightUpdates(model, include_router=True)


def test_quantised_bases_need_no_weight_of_the_base():
    model = make("llama", dtype=torch.float32)
    for name, module in model.named_modules():
        if name.endswith("base_layer"):  # as bitsandbytes packs two 4-bit numbers into a byte
            packed = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
            module.weight = torch.nn.Parameter(packed, requires_grad=False)
    guard = Guard(model, ROWS[None], CONFIG)
    guard.use_fisher(random_fisher(guard, torch.float32))
    move(model)
    deltas = {name: matrix.read().to_dense() for name, matrix in guard.updates.matrices.items()}
    torch.testing.assert_close(guard.penalty(), dense_penalty(guard, deltas, CONFIG), rtol=1e-5, atol=0)


def test_the_table_names_every_matrix_and_what_is_left_out():
    model = make("classifier")
    guard = Guard(model, ROWS["classifier"], GuardConfig.curvature(exclude=("*.k_proj",)))
    lines = guard.coverage()
    table = coverage_table(lines)
    assert "model.layers.0.self_attn.q_proj" in table and "score" in table and "base_layer" not in table
    assert [line.name for line in lines if not line.guarded and line.how == "excluded"]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    named = len([x for x in lines if x.guarded]) * 2 - 1 + len([x for x in lines if not x.guarded])
    assert named == len(trained), "each LoRA matrix has two factors, the head one weight"


def test_the_table_says_that_kl_is_charged_through_what_is_excluded():
    model = make("llama", dtype=torch.float32)
    guard = Guard(model, ROWS[None], GuardConfig(kl_memory=0, exclude=("*.k_proj",)))
    table = coverage_table(guard.coverage())
    assert "BY KL ALONE: excluded" in table and "NOT GUARDED" not in table
    assert table.endswith("6 matrices guarded, 2 trained parameters by KL alone, 0 trained parameters not")
    move(model)
    guard.begin_step(1)
    guard.penalty().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "k_proj.lora_" in name)
    alone = Guard(model, ROWS[None], GuardConfig.curvature(exclude=("*.k_proj",)))
    assert "NOT GUARDED: excluded" in coverage_table(alone.coverage())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_glob_that_leaves_nothing_out_is_refused(method):
    model = make() if method == "lora" else llama()
    for pattern in ("*.k_porj", "model.layers.0.mlp"):
        with pytest.raises(
            ValueError, match=r"exclude: nothing that trains is named '.*model\.layers\.0\.mlp\.down_proj"
        ):
            WeightUpdates(model, method, exclude=["*.q_proj", pattern])
    assert len(WeightUpdates(model, method, exclude=["*.q_proj"]).matrices) == 6


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "Dora.*use_dora=False"),
        (LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="mica"), "mica|MiCA"),
        (LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]), "Embedding"),
        (AdaLoraConfig(target_modules=["q_proj"], total_step=10), "ADALORA"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_the_reason(config, words):
    with pytest.raises(ValueError, match=words):
        WeightUpdates(get_peft_model(llama(), config))


def test_tied_weights_are_refused_and_may_be_left_out():
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(llama(tie_word_embeddings=True), config)
    with pytest.raises(ValueError, match="tied"):
        WeightUpdates(model)
    assert len(WeightUpdates(model, exclude=["lm_head"]).matrices) == 1


def test_a_change_of_adapters_is_noticed():
    model = make("llama", "two")
    updates = WeightUpdates(model)
    model.set_adapter("default")
    with pytest.raises(RuntimeError, match="new guard"):
        updates.check_active()


def test_a_fisher_of_another_model_is_refused():
    guard = Guard(make("llama"), ROWS[None], CONFIG)
    fisher = random_fisher(guard, torch.float64)
    name = next(iter(fisher))
    with pytest.raises(ValueError, match="shape"):
        guard.use_fisher({**fisher, name: fg.DenseOperator(torch.eye(3, dtype=torch.float64))})
    del fisher[name]
    with pytest.raises(ValueError, match="holds no"):
        guard.use_fisher(fisher)
