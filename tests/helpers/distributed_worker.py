"""What each of two processes does in test_distributed; results go to files."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fisher_oracle import NAMES, collate, make_examples, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fishergeo as fg

LENGTHS = [5, 9, 7, 9, 4, 6, 8]
CUT = 5  # uneven: five examples on rank 0, two on rank 1


def batches_of(rank):
    examples = make_examples(LENGTHS)
    return [collate(examples[:2]), collate(examples[2:CUT])] if rank == 0 else [collate(examples[CUT:])]


def estimate(model, batches, structure, **options):
    return fg.estimate_fisher(model, batches, structure=structure, layers=list(NAMES), **options)


def attempt(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    model = tiny_llama()
    for structure, rank_of_sketch in (("gram", 4), ("diagonal", 4), ("kfac", 4), ("sketch", 20), ("kfac-sketch", 20)):
        mine = estimate(model, batches_of(rank), structure, rank=rank_of_sketch)
        fg.all_reduce(mine).save(folder / f"{structure}-{rank}")
        fg.all_reduce(mine if rank == 0 else None).save(folder / f"{structure}-alone-{rank}")
    fg.all_reduce(estimate(model, batches_of(rank), "sketch", rank=8, seed=rank)).save(folder / f"lean-{rank}")
    fg.all_reduce(estimate(model, batches_of(rank), "sketch", rank=3, probes=5)).save(folder / f"probed-{rank}")
    for kind in ("mc", "type2"):
        fg.all_reduce(estimate(model, batches_of(rank), "kfac", kind=kind, seed=rank)).save(folder / f"{kind}-{rank}")
    single = estimate(model.float(), batches_of(rank), "gram")
    fg.all_reduce(single).save(folder / f"float32-{rank}")
    layers = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    shared = fg.all_reduce(fg.estimate_fisher(model, batches_of(rank), structure="kfac", layers=layers))
    inputs = {id(a.sums["input"]) for a in shared.accumulators.values()}
    errors = [
        attempt(lambda: fg.all_reduce(None)),
        attempt(lambda: fg.all_reduce(estimate(model, batches_of(rank), "gram", kind=("empirical", "margin")[rank]))),
    ]
    # Sharded parameters: every process runs as many batches.
    sharded = tiny_llama()
    whole_mark = estimate(sharded, batches_of(1), "gram").header.fingerprint
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    examples = make_examples(LENGTHS)
    for structure in ("gram", "kfac"):
        half = estimate(sharded, [collate(examples[:CUT] if rank == 0 else examples[CUT:])], structure)
        fg.all_reduce(half).save(folder / f"fsdp-{structure}-{rank}")
    marks = half.header.fingerprint == whole_mark
    torch.save({"shared": len(inputs), "errors": errors, "marks": marks}, folder / f"facts-{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    # Not by way of the interpreter's end: gloo's threads may still want it then, and abort the process.
    os._exit(0)
