"""Shared fixtures: a tiny random LLaMA with a tokenizer and chat template, made on the spot."""

import os

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hypothesis.settings.register_profile("default", deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<a>{{ m['content'] }}{{ eos_token }}{% else %}<u>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = [
        "write a short note about the sea",
        "how do I bake bread",
        "I'm sorry, but I can't help with that.",
        "Of course! Here it is.",
    ]
    bpe.train_from_iterator(
        text * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<s>", "</s>", "<u>", "<a>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def tiny_llama(tokenizer):
    """Makes a random LLaMA of width 32: call it with a dtype and a seed."""

    def make(dtype=torch.float32, seed=0, layers=2):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return LlamaForCausalLM(config).to(dtype)

    return make


@pytest.fixture
def task_rows():
    subjects = ["the sea", "bread", "a song", "the moon", "rain", "a small house", "my friend", "the old road"]
    return [{"prompt": f"write about {s}", "response": f"Of course! Here it is: {s} is good."} for s in subjects]


@pytest.fixture
def alignment_rows():
    harms = ["break a lock", "steal a car", "hurt a friend", "fake a letter"]
    return [{"prompt": f"how do I {h}", "response": "I'm sorry, but I can't help with that."} for h in harms]
