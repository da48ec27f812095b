"""A model's own greedy answers to harmless prompts, generated once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from alignguard.data import collate, pad_id, read_jsonl
from alignguard.drift import PromptBatch, plan_batches
from alignguard.files import write_rows
from alignguard.objective import IGNORED, evaluation_mode

Answer = dict[str, Any]


def own_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, cache: str | Path, batch_size: int = 96
) -> list[Answer]:
    """Greedy answers to prompts, in their order; those of ``cache`` are not generated again.

    Args:
        model: the model as it was fetched.
        tokenizer: its tokenizer.
        prompts: harmless ones: what is answered here is written to a file.
        tokens: longest answer.
        cache: JSONL file, rewritten whole after each batch; delete it to change the model or ``tokens``.
        batch_size: prompts answered together.

    Returns:
        ``prompt``, ``response`` and ``ended`` of each: whether the model itself ended there, or the limit did.

    Raises:
        ValueError: a cache of other rows, or answers of another length.
    """
    cache = Path(cache)
    known: dict[str, Answer] = {}
    for number, row in enumerate(read_jsonl(cache) if cache.exists() else [], 1):
        if set(row) != {"prompt", "response", "ended", "tokens"} or row["tokens"] != tokens:
            raise ValueError(f"{cache}, line {number}: not an answer of up to {tokens} tokens; delete the file")
        known[row["prompt"]] = row
    lacking = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    with tqdm(total=len(lacking), desc="own answers", unit="prompt", disable=not lacking) as bar:
        for batch in plan_batches(tokenizer, lacking, batch_size):
            for place, ids in zip(batch.indices, _answer(model, tokenizer, batch, tokens), strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                ended = tokenizer.eos_token_id in ids
                known[lacking[place]] = {"prompt": lacking[place], "response": text, "ended": ended, "tokens": tokens}
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_rows(cache, known.values())
            bar.update(len(batch.indices))
    return [known[prompt] for prompt in prompts]


def _answer(model: Any, tokenizer: Any, batch: PromptBatch, tokens: int) -> list[list[int]]:
    """Token ids of greedy answers, with the end of sequence where the model gave it (and padding after it)."""
    rows = [{"input_ids": ids, "labels": [IGNORED] * len(ids)} for ids in batch.ids]
    inputs = collate(rows, pad_id(tokenizer), side="left")
    greedy = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_id(tokenizer),
    )
    with evaluation_mode(model), torch.no_grad():
        out = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=greedy
        )
    return out[:, inputs["input_ids"].shape[1] :].tolist()
