"""ΔW_A of a run, the part of its updates that touches alignment, and how alike it is from seed to seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import fishergeo as fg
from alignguard.data import encode_source, pad_id, pad_rows
from alignguard.objective import model_kind
from alignguard.updates import base_name, lora_updates


def part_file(folder: str | Path, job: Mapping[str, Any]) -> Path:
    """Where ΔW_A of a run stands."""
    name = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"{name}.safetensors"


def alignment_parts(model: Any, tokenizer: Any, alignment: Any, energy: float, examples: int = 128) -> dict[str, Any]:
    """ΔW_A = PΔW of every adapted matrix, P on the leading eigenvectors of the one-sided Fisher at θ0.

    P is taken at θ0 for every run, so that runs differ in their updates and not in what they are projected on.

    Returns:
        module name -> ``LowRank`` (p, q).
    """
    kind, pad, device = model_kind(model), pad_id(tokenizer), next(model.parameters()).device
    rows = encode_source(alignment, "alignment", tokenizer, kind, 256)[:examples]
    batches = [
        {k: v.to(device) for k, v in pad_rows(rows[i : i + 16], pad, kind).items()} for i in range(0, len(rows), 16)
    ]
    updates = {name: delta.detach() for name, delta in lora_updates(model).items()}
    layers = [base_name(name) for name in updates]
    with model.disable_adapter():
        fisher = fg.estimate_fisher(model, batches, structure="gram", layers=layers, reduction="sum")
    parts = {}
    for name, delta in updates.items():
        values, vectors = fisher[base_name(name)].eigh()
        values = values.clamp_min(0)
        m = max(fg.rank_for_energy(values, energy=energy), 1)
        parts[name] = fg.Projector(vectors[:, :m].to(delta.dtype)).split(delta)[0]
    return parts


def save_parts(parts: Mapping[str, Any], path: Path) -> None:
    """Write updates in factors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    tensors: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        tensors[f"{name}/left"], tensors[f"{name}/right"] = part.left.contiguous(), part.right.contiguous()
    save_file(tensors, draft)
    draft.replace(path)


def stability(rows: Sequence[Mapping[str, Any]], parts: str | Path) -> dict[str, dict[str, float]]:
    """Mean cosine of ΔW_A between seeds, for every guarded setting and layer.

    Args:
        rows: as a ledger holds them.
        parts: the folder that the runs wrote their ΔW_A to.

    Returns:
        setting -> layer -> mean over all pairs of seeds; settings of fewer than two seeds are left out.
    """
    updates: dict[str, list[dict[str, fg.LowRank]]] = {}
    for row in rows:
        path = part_file(parts, row["job"])
        if path.is_file():
            tensors = load_file(path)
            names = sorted({key.rsplit("/", 1)[0] for key in tensors})
            found = {name: fg.LowRank(tensors[f"{name}/left"], tensors[f"{name}/right"]) for name in names}
            updates.setdefault(row["job"]["name"], []).append(found)
    result = {}
    for name, runs in updates.items():
        if len(runs) > 1:
            cosines = fg.layer_cosines(runs)
            result[name] = {layer: float(_off_diagonal_mean(value)) for layer, value in cosines.items()}
    return result


def _off_diagonal_mean(cosines: Any) -> float:
    n = len(cosines)
    return float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
