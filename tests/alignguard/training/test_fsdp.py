"""Sharded models (FSDP2) are captured as whole ones are, and train afterwards as they would have."""

import copy
import os

import pytest
import torch
from torch import distributed, nn

import fishergeo as fg

NAMES = ["table", "blocks.0.norm", "blocks.0.up", "blocks.1.down", "blocks.1.down.bias", "head+bias"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).tanh())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(12, 6), nn.Linear(6, 4)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model, ids):
    return model(ids).sin().sum((1, 2))


def worker(rank, folder):
    check(rank, folder)
    # Not by way of the interpreter's end: gloo's threads may still want it then, and abort the process.
    os._exit(0)


def check(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole = Model().double()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ids = torch.randint(0, 12, (4, 5), generator=torch.Generator().manual_seed(1))
    mine = ids[2 * rank : 2 * rank + 2]
    for structure in ("gram", "kfac"):  # the second finds the model as a first pass leaves it
        actual = fg.estimate_fisher(sharded, [mine], structure=structure, layers=NAMES, loss=loss)
        expected = fg.estimate_fisher(whole, [mine], structure=structure, layers=NAMES, loss=loss)
        assert actual.header.shapes == expected.header.shapes
        for name in NAMES:
            for key, value in expected.accumulators[name].sums.items():
                torch.testing.assert_close(actual.accumulators[name].sums[key], value, rtol=1e-12, atol=1e-14)
    assert all(p.grad is None and p.requires_grad for p in sharded.parameters())
    loss(sharded, mine).mean().backward()
    loss(whole, ids).mean().backward()
    for one, other in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-10, atol=1e-12)
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_two_processes_with_a_sharded_model(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
