"""What a model says of plain text, no chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from alignguard.data import collate, pad_id
from alignguard.objective import IGNORED, evaluation_mode, response_loss


def text_loss(
    model: Any, tokenizer: Any, texts: Sequence[str], longest: int, batch_size: int, progress: bool = False
) -> float:
    """Cross entropy in nats a token, the mean over all tokens of all texts but each one's first.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        texts: at least one, of two tokens or more.
        longest: tokens of a text that count.
        batch_size: texts of a pass.
        progress: show a bar.
    """
    encoded = sorted((tokenizer(text)["input_ids"][:longest] for text in texts), key=len, reverse=True)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluation_mode(model):
        for start in tqdm(range(0, len(encoded), batch_size), desc="text", unit="batch", disable=not progress):
            rows = [{"input_ids": ids, "labels": ids} for ids in encoded[start : start + batch_size]]
            batch = {name: value.to(device) for name, value in collate(rows, pad_id(tokenizer)).items()}
            total += float(response_loss(model, batch).sum())
            count += int((batch["labels"][:, 1:] != IGNORED).sum())
    return total / count
