"""The guard in other people's trainers charges what it charges in ``fit``: each plugin by its tool's own protocol.

Where a tool is not installed a stand-in of the few names that the plugin meets takes its place, so that what the plugin does
is tested here, and what the tool does with it by the scripts in scripts/integrations/.
"""

import functools
import importlib
import json
import runpy
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from architectures import RECOMPUTED, move
from datasets import Dataset
from transformers import Trainer, TrainingArguments, set_seed

import alignguard
from alignguard import GuardConfig, GuardMixin, fit
from alignguard.data import collator, encode_source
from alignguard.integrations.options import Options
from alignguard.loading import adapt
from alignguard.training import DEFAULT_TRAINING

LORA = {"r": 4, "target_modules": "all-linear"}
BLOCK = {"preset": "combined", "config": {"refresh_every": 2, "refresh_examples": 2, "kl_examples": 2, "kl_every": 1}}
SETTINGS = {
    **DEFAULT_TRAINING, "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "warmup_steps": 0,
    "train_sampling_strategy": "sequential", "learning_rate": 0.02,
}  # fmt: skip
TERMS = ("alignguard/kl", "alignguard/alignment")
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs trl")  # before the fixtures train anything


@pytest.fixture
def case(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    """What every run has in common, and what ``fit`` logs of it."""
    path = tmp_path / "keep.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in alignment_rows))
    options = Options.read({**BLOCK, "alignment_data": str(path)})
    result = fit(
        tiny_llama(layers=1), task_rows, str(path), options.guard_config(), tmp_path / "fit", tokenizer=tokenizer,
        lora=LORA, training={k: v for k, v in SETTINGS.items() if k not in ("report_to", "disable_tqdm")}, max_length=64,
    )  # fmt: skip
    model = tiny_llama(layers=1)
    set_seed(0)
    return types.SimpleNamespace(
        model=adapt(model, LORA),
        rows=encode_source(task_rows, "task", tokenizer, "causal", 64),
        path=path,
        options=options,
        history=result.history,
        arguments=functools.partial(TrainingArguments, output_dir=str(tmp_path / "out"), use_cpu=True, **SETTINGS),
    )


def same(trainer, history):
    """Loss and every term, step by step."""
    found = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == len(history) == SETTINGS["max_steps"]
    assert history[-1]["alignguard/kl"] > 1e-4, "the guard must matter here, or the test shows nothing"
    for mine, theirs in zip(history, found, strict=True):
        for name in ("loss", *TERMS):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-7), name


def dataset(rows):
    """Rows as other people's trainers hold them."""
    return Dataset.from_list([{name: row[name] for name in ("input_ids", "labels")} for row in rows])


def go(trainer):
    set_seed(0)
    trainer.train()
    return trainer


def test_a_guard_made_in_the_trainer_is_fits(case, tokenizer):
    class Mine(GuardMixin, Trainer):
        pass

    make = functools.partial(alignguard.make_guard, alignment_data=str(case.path), config=case.options.guard_config())
    trainer = Mine(
        model=case.model, args=case.arguments(remove_unused_columns=False), train_dataset=case.rows,
        data_collator=collator(0, "causal"), processing_class=tokenizer, guard=make,
    )  # fmt: skip
    same(go(trainer), case.history)


@needs_trl
def test_trls_sft_trainer_is_fits_with_its_own_adapter_too(case, tokenizer, tiny_llama):
    import trl
    from peft import LoraConfig

    class Guarded(GuardMixin, trl.SFTTrainer):
        pass

    settings = {name: value for name, value in SETTINGS.items() if name != "train_sampling_strategy"}
    arguments = trl.SFTConfig(
        output_dir=str(case.path.parent / "trl"), use_cpu=True, bf16=False, **RECOMPUTED,
        train_sampling_strategy="sequential", max_length=None, **settings,
    )  # fmt: skip
    data = dataset(case.rows)
    make = functools.partial(alignguard.make_guard, alignment_data=str(case.path), config=case.options.guard_config())
    trainer = Guarded(
        model=tiny_llama(layers=1), args=arguments, train_dataset=data, processing_class=tokenizer, guard=make,
        peft_config=LoraConfig(lora_alpha=16, task_type="CAUSAL_LM", **LORA),
    )  # fmt: skip
    assert len(trainer.guard.updates.matrices) == 7
    trainer.model.load_state_dict(case.model.state_dict())  # TRL draws before it makes the adapter
    same(go(trainer), case.history)


def _letters(completions, **columns):
    return [float(len(completion)) for completion in completions]


@needs_trl
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "GRPO", "ORPO"])
def test_every_trainer_of_trls_begins_with_fits_terms(
    kind, accumulate, case, tokenizer, tiny_llama, task_rows, tmp_path, monkeypatch
):
    """Whatever its loss, from the same moved adapter; what the penalty adds to its step, test_trainers.py tests."""
    import trl

    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def moved():
        model = adapt(tiny_llama(layers=1), LORA)
        move(model, 0.05)
        return model

    config = case.options.guard_config()
    settings = {**SETTINGS, "max_steps": 1, "gradient_accumulation_steps": accumulate}
    settings["per_device_train_batch_size"] = 4 // accumulate
    theirs = fit(
        moved(), task_rows, str(case.path), config, tmp_path / "moved", tokenizer=tokenizer, max_length=64,
        training={k: v for k, v in settings.items() if k not in ("report_to", "disable_tqdm")},
    ).history[0]  # fmt: skip
    home = importlib.import_module("trl.experimental.orpo") if kind == "ORPO" else trl
    data = [{"prompt": row["prompt"], "completion": row["response"]} for row in task_rows]
    more, extra = {"max_length": 64 if kind == "ORPO" else None}, {}
    if kind in ("DPO", "ORPO"):
        data = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in data]
    elif kind == "KTO":
        data = [{**row, "label": place % 2 == 0} for place, row in enumerate(data)]
    elif kind == "GRPO":
        data, more = [{"prompt": row["prompt"]} for row in data], {"num_generations": 2, "max_completion_length": 4}
        extra = {"reward_funcs": _letters}
    arguments = getattr(home, f"{kind}Config")(
        output_dir=str(tmp_path / kind), use_cpu=True, bf16=False, **RECOMPUTED, **more, **settings
    )
    trainer = type(f"Guarded{kind}", (GuardMixin, getattr(home, f"{kind}Trainer")), {})(
        model=moved(), args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
        guard=functools.partial(alignguard.make_guard, alignment_data=str(case.path), config=config), **extra,
    )  # fmt: skip
    found = next(entry for entry in go(trainer).state.log_history if "loss" in entry)
    for name in TERMS:
        assert theirs[name] > 1e-4 and found[name] == pytest.approx(theirs[name], rel=1e-5), name


# axolotl


@pytest.fixture
def axolotl(monkeypatch):
    """axolotl's names that the plugin meets; its own where it is installed."""
    try:
        import axolotl.core.trainers
        import axolotl.core.training_args
        import axolotl.integrations.base  # noqa: F401
    except ImportError:
        base = types.ModuleType("axolotl.integrations.base")
        base.BasePlugin = type("BasePlugin", (), {"__init__": lambda self: None})
        trainers = types.ModuleType("axolotl.core.trainers")
        trainers.AxolotlTrainer = type("AxolotlTrainer", (Trainer,), {})
        arguments = types.ModuleType("axolotl.core.training_args")
        arguments.AxolotlTrainingArguments = TrainingArguments
        for name in ("axolotl", "axolotl.integrations", "axolotl.core"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for made in (base, trainers, arguments):
            monkeypatch.setitem(sys.modules, made.__name__, made)
        monkeypatch.delitem(sys.modules, "alignguard.integrations.axolotl", raising=False)
    import alignguard.integrations.axolotl as plugin

    return plugin


def test_the_axolotl_plugin_trains_as_fit_does_and_reports_afterwards(axolotl, case, tokenizer, tmp_path):
    from axolotl.core.training_args import AxolotlTrainingArguments

    plugin = axolotl.AlignGuardPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(sys.modules[module], name)
    block = {**BLOCK, "alignment_data": str(case.path), "drift_every": 2, "limit": 1}
    cfg = {"alignguard": arguments(alignguard=block).alignguard, "output_dir": str(tmp_path / "out")}
    kind = plugin.get_trainer_cls(cfg)
    settings = {**case.arguments.keywords, "remove_unused_columns": False}
    trainer = kind(
        model=case.model, args=AxolotlTrainingArguments(**settings), train_dataset=dataset(case.rows),
        data_collator=collator(0, "causal"), processing_class=tokenizer,
    )  # fmt: skip
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    same(go(trainer), case.history)
    assert [entry["step"] for entry in trainer.state.log_history if "driftcheck/drift" in entry] == [0, 2, 3]
    (tmp_path / "out").mkdir(exist_ok=True)
    plugin.post_train(cfg, trainer.model)
    path = tmp_path / "out" / "driftcheck.json"
    assert {row.category for row in alignguard.DriftReport.load(path).rows} == {
        "unsafe", "borderline", "ordinary", "capability"
    }  # fmt: skip
    path.unlink()
    plugin.post_train(cfg, trainer.model)
    assert not path.exists(), "axolotl calls once after training and once more at its end"


def test_the_axolotl_plugin_names_what_it_cannot_guard(axolotl):
    plugin = axolotl.AlignGuardPlugin()
    curvature = {"alignguard": {"preset": "curvature"}}
    with pytest.raises(ValueError, match="lora_mlp_kernel to false"):
        plugin.get_trainer_cls({**curvature, "lora_mlp_kernel": True})
    assert plugin.get_trainer_cls({"lora_mlp_kernel": True})  # KL alone reads no layer
    with pytest.raises(ValueError, match="dpo trainer"):
        plugin.get_trainer_cls({"rl": "dpo"})
    with pytest.raises(ValueError, match="unknown options"):
        axolotl.AlignGuardArgs(alignguard={"lambda": 3})


# ms-swift


def test_the_swift_plugin_puts_the_guard_into_its_factory(case, tokenizer, monkeypatch, tmp_path):
    module = types.ModuleType("swift.trainers.trainer_factory")

    class SwiftTrainer(Trainer):
        """Takes its tokenizer from a template, as ms-swift's trainers do."""

        def __init__(self, *args, template, **kwargs):
            super().__init__(*args, processing_class=template.tokenizer, **kwargs)

    class TrainerFactory:
        @classmethod
        def get_trainer_cls(cls, args):
            return SwiftTrainer

    module.TrainerFactory = TrainerFactory
    for name in ("swift", "swift.trainers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    options = tmp_path / "guard.yaml"
    options.write_text(yaml.safe_dump({**BLOCK, "alignment_data": str(case.path)}))
    monkeypatch.setenv("ALIGNGUARD", str(options))
    from alignguard.integrations.ms_swift import register

    register()
    kind = TrainerFactory.get_trainer_cls(None)
    assert kind.__name__ == "SwiftTrainer"
    trainer = kind(
        model=case.model, args=case.arguments(remove_unused_columns=False), train_dataset=case.rows,
        data_collator=collator(0, "causal"), template=types.SimpleNamespace(tokenizer=tokenizer),
    )  # fmt: skip
    same(go(trainer), case.history)


def test_a_command_prints_the_swift_plugins_file(capsys):
    runpy.run_module("alignguard.integrations.ms_swift", run_name="__main__", alter_sys=False)
    path = Path(capsys.readouterr().out.strip())
    assert path.is_file() and [entry.name for entry in path.parent.glob("*.py")] == [path.name]


# options


def test_options_are_checked_by_name(tmp_path):
    assert Options.read(None) == Options() and Options().guard_config() == GuardConfig()
    assert Options.read({"preset": "curvature"}).guard_config().reads_fisher
    for given, words in (
        ({"presett": "x"}, "unknown options"),
        ({"preset": "x"}, "preset must be one of"),
        ({"config": {"lambda_kl": -1}}, "lambda_kl"),
        ({"config": {"structure": "gram"}}, "structure: set, and nothing here reads that"),
        ({"config": [1]}, "config must map"),
        ({"max_drift": 0.5}, "max_drift stops the run at a reading.*drift_every"),
        ({"max_drift": 0, "drift_every": 5}, "max_drift must be"),
        ({"drift_every": 0}, "drift_every must be"),
        ({"drift_every": "often"}, "drift_every must be"),
        ({"driftcheck": "no"}, "driftcheck must be true or false"),
        ({"driftcheck": None}, "driftcheck must be true or false, not None"),
        ({"preset": None}, "preset must be one of"),
        ({"preset": ["paper"]}, "preset must be one of"),
        ({"limit": 0}, "limit must be"),
        ({"limit": 5, "driftcheck": False}, "limit is of DriftCheck"),
        ({3: 1, "x": 2}, "unknown options"),
    ):
        with pytest.raises(ValueError, match=words):
            Options.read(given)
    with pytest.raises(TypeError, match="options and values"):
        Options.read([1])
    torn = tmp_path / "torn.yaml"
    torn.write_text("preset: [")
    with pytest.raises(ValueError, match=r"torn\.yaml cannot be read"):
        Options.read(torn)


def test_null_is_none_where_an_option_may_be_none():
    assert Options.read({"limit": None}).limit is None and Options().limit == 32
    everything = {"alignment_data": None, "config": None, "drift_every": None, "max_drift": None}
    assert Options.read(everything) == Options()
    assert Options.read({"config": {"kl_tokens": None}}).guard_config().kl_tokens is None
    assert Options.read({"drift_every": 5, "max_drift": 0.5}).callback(None, None).max_drift == 0.5
