"""How time and memory of an estimate grow with width, depth and the number of examples, beside what a plan foretells.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

A random LLaMA (ff 2.69 times the hidden size, vocabulary 256, sequences of 32 tokens, 8 a batch), one thread. From a
common middle each of hidden size, depth and N is varied alone. Time is the ratio of CPU seconds to one plain forward
and backward with the layers' weight gradients over the same batches, interleaved, medians. Memory is the most that
torch's allocator had handed out at once, and the sums that are kept. Then the plan of a whole LLaMA-3-8B, whose weights
exist nowhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fishergeo as fg
from alignguard.files import write_text
from alignguard.training import versions

STRUCTURES = ("sketch", "kfac", "gram")
MIDDLE = {"hidden": 64, "depth": 2, "examples": 32}
VARIED = {"hidden": (32, 64, 128, 256), "depth": (1, 2, 4, 8), "examples": (16, 32, 64, 128)}
RANK = 16


def llama(hidden: int, depth: int, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"intermediate_size": round(2.69 * hidden), "vocab_size": 256, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "max_position_embeddings": 128} | options
    return LlamaForCausalLM(LlamaConfig(hidden_size=hidden, num_hidden_layers=depth, **sizes)).eval()


def ratio(base: Callable[[], Any], work: Callable[[], Any], repeats: int) -> tuple[float, list[float]]:
    """Median of interleaved CPU-time ratios, and all of them."""
    base(), work()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        base()
        middle = time.process_time()
        work()
        found.append((time.process_time() - middle) / (middle - start))
    return statistics.median(found), found


def allocator_peak(work: Callable[[], Any]) -> int:
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure(hidden: int, depth: int, examples: int, structure: str, repeats: int) -> dict[str, Any]:
    model = llama(hidden, depth)
    ids = torch.randint(0, 256, (examples, 32))
    batches = [{"input_ids": part, "labels": part} for part in ids.split(8)]
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    weights = [model.get_submodule(name).weight for name in names]

    def plain() -> None:
        for batch in batches:
            torch.autograd.grad(model(**batch).loss, weights)

    def estimate() -> fg.Fisher:
        return fg.estimate_fisher(model, batches, structure=structure, rank=RANK, layers=names)

    plan = fg.plan(model, structure, batches=batches, rank=RANK, layers=names)
    middle, found = ratio(plain, estimate, repeats)
    sums = {id(t): t for a in estimate().accumulators.values() for t in a.sums.values()}
    return {
        "hidden": hidden,
        "depth": depth,
        "examples": examples,
        "structure": structure,
        "time_ratio": middle,
        "time_ratios": found,
        "planned_flop_ratio": plan.flops / plan.plain_flops,
        "peak_bytes": allocator_peak(estimate),
        "planned_peak_bytes": plan.peak_bytes,
        "state_bytes": sum(t.numel() * t.element_size() for t in sums.values()),
        "planned_state_bytes": plan.state_bytes,
    }


def llama_3_8b() -> list[dict[str, Any]]:
    with torch.device("meta"):
        model = llama(
            4096, 32, intermediate_size=14336, vocab_size=128256, num_attention_heads=32, num_key_value_heads=8
        ).to(torch.bfloat16)
    rows = []
    for rank in (64, 21, 18):
        plan = fg.plan(model, "sketch", rank=rank, batch_size=1, sequence_length=1024, examples=512)
        totals = ("state_bytes", "pass_bytes", "peak_bytes", "ratio")
        rows.append({"rank": rank, **{name: getattr(plan, name) for name in totals}})
    return rows


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--repeats", type=int, default=5)
    args = cli.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, values in VARIED.items():
        for value in values:
            for structure in STRUCTURES:
                row = {"varied": name, **measure(**{**MIDDLE, name: value}, structure=structure, repeats=args.repeats)}
                rows.append(row)
                print(
                    f"{name} {value:>4} {structure:<7} time {row['time_ratio']:.2f} "
                    f"peak {row['peak_bytes'] / 1e6:.2f} MB, planned {row['planned_peak_bytes'] / 1e6:.2f} MB",
                    flush=True,
                )
    result = {
        "command": f"python benchmarks/scaling.py --repeats {args.repeats}",
        "versions": versions(),
        "threads": 1,
        "rank": RANK,
        "rows": rows,
        "llama_3_8b": llama_3_8b(),
    }
    write_text(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
