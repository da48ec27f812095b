"""Alignment examples of random tokens."""

import torch


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(5, 300, (4 + i % 3,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made
