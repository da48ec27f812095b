"""A causal LM that always writes one phrase, with a tokenizer of whole words: a guard model as far as loading goes."""

import itertools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# As Llama Guard's: both turns in a task that the template writes, then the cue.
TEMPLATE = (
    "judge {% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}verdict{% endif %}"
)


def save_word_model(folder, phrase, template=None):
    """Save a model that answers ``phrase`` to everything, word for word, and ends."""
    said = phrase.split()
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys([*said, "judge", "user", "assistant", ":", "verdict", "A", "B"])]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    size = len(words)
    config = LlamaConfig(
        vocab_size=size, hidden_size=2 * size, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    order = [words.index(word) for word in said] + [1]
    follows = {**{i: order[0] for i in range(size)}, **{a: b for a, b in itertools.pairwise(order)}}
    assert len(set(order)) == len(order), "each word of the phrase once"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.weight.fill_(1.0)
        # The layer adds nothing, so what comes next depends on the last word alone.
        model.model.embed_tokens.weight.copy_(torch.eye(size, 2 * size))
        for word, following in follows.items():
            model.lm_head.weight[following, word] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
