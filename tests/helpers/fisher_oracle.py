"""A tiny model, its data, and every structure's oracle: a loop over single examples, written without the package's code."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj")


VOCABULARY = 40


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).double().eval()


def make_examples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(1, length - 1, (1,), generator=generator))] = -100
        examples.append((ids, labels))
    return examples


def collate(examples, side="right"):
    width = max(len(ids) for ids, _ in examples)
    batch = {
        "input_ids": torch.zeros(len(examples), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(examples), width, dtype=torch.long),
        "labels": torch.full((len(examples), width), -100),
    }
    for row, (ids, labels) in enumerate(examples):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        batch["input_ids"][row, place] = ids
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = labels
    return batch


def oracle_objective(logits, labels, kind):
    """Mean over supervised tokens of one example's cross-entropy or margin, token by token."""
    terms = []
    for position in range(len(labels) - 1):
        target = int(labels[position + 1])
        if target == -100:
            continue
        row = logits[position]
        others = torch.cat([row[:target], row[target + 1 :]])
        over = row if kind == "empirical" else others
        terms.append(torch.log(torch.exp(over).sum()) - row[target])
    return sum(terms) / len(terms), len(terms)


def oracle(model, examples, kind="empirical"):
    """Per layer: weight gradients (N, p, q), KFAC factors, one example at a time with W.grad and plain hooks."""
    gradients = {name: [] for name in NAMES}
    factors = {name: [0.0, 0.0, 0] for name in NAMES}
    taken = {}
    handles = []
    for name in NAMES:

        def hook(module, inputs, output, name=name):
            taken[name] = inputs[0].detach()[0]
            output.register_hook(lambda g: factors[name].__setitem__(0, factors[name][0] + g[0].T @ g[0]))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    for ids, labels in examples:
        model.zero_grad(set_to_none=True)
        value, _ = oracle_objective(model(input_ids=ids[None]).logits[0], labels, kind)
        value.backward()
        for name in NAMES:
            gradients[name].append(model.get_submodule(name).weight.grad.clone())
            factors[name][1] = factors[name][1] + taken[name].T @ taken[name]
            factors[name][2] += len(ids)
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    count = len(examples)
    kfac = {name: (s / count, a / tokens) for name, (s, a, tokens) in factors.items()}
    return {name: torch.stack(g) for name, g in gradients.items()}, kfac


def assert_close(actual, expected, tolerance=1e-10):
    assert (actual - expected).norm() <= tolerance * expected.norm()
