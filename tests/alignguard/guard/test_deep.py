"""A deep narrow model, where tokens and layers move together: curvature layer by layer is blind there, and KL is not."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from alignguard.data import pad_rows
from alignguard.guard import Guard, GuardConfig

LAYERS, WIDTH, WORDS, ROWS, TOKENS = 24, 16, 32, 8, 6


def examples(seed):
    """The same prompts with other responses, by the seed."""
    prompts = torch.Generator().manual_seed(0)
    responses = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(ROWS):
        prompt = torch.randint(1, WORDS, (3,), generator=prompts).tolist()
        response = torch.randint(1, WORDS, (TOKENS,), generator=responses).tolist()
        made.append({"input_ids": prompt + response, "labels": [-100] * 3 + response})
    return made


@pytest.fixture(scope="module")
def aligned():
    """A model that is sure of the responses of seed 1."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    batch = pad_rows(examples(1), 0)
    for _ in range(100):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss < 0.2
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config


def gauged(aligned, config, steps=40, rate=5e-3):
    """Measured over predicted drift, step by step, of a run that teaches other responses, and the drift at its end."""
    state, sizes = aligned
    model = LlamaForCausalLM(sizes)
    model.load_state_dict(state)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    guard = Guard(model, examples(1), config)
    guard.begin_run(steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    batch = pad_rows(examples(2), 0)
    ratios = []
    for step in range(steps):
        guard.begin_step(step)
        loss = model(**batch).loss + guard.penalty()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if guard.gauge.ratio is not None and guard.gauge.measured > 0.01:
            ratios.append(guard.gauge.ratio)
    return ratios, guard.measured_drift()


def test_curvature_by_layers_is_blind_and_says_so(aligned):
    with pytest.warns(UserWarning, match="does not see where this model moves"):
        ratios, drift = gauged(aligned, GuardConfig.curvature(refresh_every=8, first_refresh=None))
    assert max(ratios) > 20 and min(ratios) > 2 and drift > 1


def test_kl_believes_what_is_there(aligned):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ratios, _ = gauged(aligned, GuardConfig())
    assert all(0.5 < ratio < 2 for ratio in ratios[-8:])
