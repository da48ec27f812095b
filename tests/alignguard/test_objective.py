"""What is read at supervised tokens is what the whole forward pass says there, and the head sees no other position."""

import pytest
import torch
from architectures import llama, make
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MBartConfig, MBartForConditionalGeneration

import fishergeo as fg
from alignguard.objective import IGNORED, aligned_logits, divergence, response_loss, supervised


def batch_of(lengths, cuts, pad=0):
    """Right-padded rows of the given lengths whose first tokens are a prompt."""
    generator = torch.Generator().manual_seed(sum(lengths))
    width = max(lengths)
    ids = torch.full((len(lengths), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (length, cut) in enumerate(zip(lengths, cuts, strict=True)):
        ids[row, :length] = torch.randint(5, 300, (length,), generator=generator)
        mask[row, :length] = 1
        labels[row, cut:length] = ids[row, cut:length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "qwen"])
@settings(deadline=None, max_examples=10)
@given(rows=st.lists(st.tuples(st.integers(3, 9), st.integers(1, 2)), min_size=1, max_size=3))
def test_supervised_tokens_read_alone_are_those_of_the_whole_pass(name, rows):
    model = make(name, dtype=torch.float64).eval()
    batch = batch_of([length for length, _ in rows], [cut for _, cut in rows])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    chosen = targets != IGNORED
    found, labels, places = supervised(model, batch)
    torch.testing.assert_close(found, logits[chosen].log_softmax(-1), rtol=0, atol=1e-12)
    assert torch.equal(labels, targets[chosen]) and torch.equal(places, chosen.nonzero()[:, 0])
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    torch.testing.assert_close(response_loss(model, batch), expected.view(targets.shape).sum(1), rtol=0, atol=1e-12)


def test_the_output_embedding_sees_the_positions_of_responses_alone():
    model = make(dtype=torch.float64)
    seen = []
    handle = model.get_base_model().lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    logits, targets = aligned_logits(model, batch_of([9, 7], [6, 5]))
    handle.remove()
    assert seen == [4] and logits.shape[:2] == targets.shape == (2, 4)


def test_a_model_that_cannot_leave_positions_out_is_read_whole():
    inner = llama().double()
    batch = batch_of([8], [5])

    class Plain(torch.nn.Module):
        config = inner.config

        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    logits, targets = aligned_logits(Plain(), batch)
    assert logits.shape[:2] == targets.shape == (1, 7)
    torch.testing.assert_close(supervised(Plain(), batch)[0], supervised(inner, batch)[0], rtol=0, atol=1e-12)


def test_what_base_and_present_both_leave_out_adds_nothing():
    logits = torch.tensor([[1.0, 2.0, -torch.inf]], dtype=torch.float64)
    present = torch.tensor([[0.5, 2.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    found = divergence(logits.log_softmax(-1), present.log_softmax(-1))
    expected = divergence(logits[:, :2].log_softmax(-1), present[:, :2].log_softmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert bool(torch.isfinite(torch.autograd.grad(found.sum(), present)[0][:, :2]).all())
    kept = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64).log_softmax(-1)
    assert divergence(kept, present.detach().log_softmax(-1)).item() == torch.inf, (
        "what the base says and the present cannot"
    )


def mbart():
    sizes = {"vocab_size": 64, "d_model": 16, "max_position_embeddings": 32, "dropout": 0.0, "init_std": 0.5}
    parts = {
        f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))
    }
    config = MBartConfig(**sizes, **parts, encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_start_token_id=5)
    torch.manual_seed(0)
    return MBartForConditionalGeneration(config).double().eval()


@pytest.mark.parametrize("cut", [False, True])
def test_a_decoder_reads_its_start_and_then_the_labels_whatever_they_end_with(cut):
    """mBART's own shift puts the last label first: of a response cut short that is no language, but its last word."""
    model, asked = mbart(), torch.tensor([[10, 11, 2]])
    labels = torch.tensor([[40, 50, 60, 2, 5][: 3 if cut else 5]])
    batch = {"input_ids": asked, "attention_mask": torch.ones_like(asked), "labels": labels}
    read = torch.cat([torch.tensor([[5]]), labels[:, :-1]], 1)
    logs = model(input_ids=asked, decoder_input_ids=read).logits.log_softmax(-1)
    expected = -logs.gather(2, labels[..., None]).sum()
    torch.testing.assert_close(response_loss(model, batch)[0], expected, rtol=0, atol=1e-12)
    fisher = fg.estimate_fisher(model, [batch], "exact", reduction="sum", layers=["lm_head"])
    model.zero_grad()
    expected.backward()
    found = fisher["lm_head"].weight_gradients()[0]
    torch.testing.assert_close(found, model.lm_head.weight.grad, rtol=0, atol=1e-10)
