"""A layer of two experts that the sign of a position's first number chooses between, and two layers chosen by the batch."""

import torch
from torch import nn
from uses_cases import random

EXPERTS = ("experts.w.0", "experts.w.1")


class Experts(nn.Module):
    """Stacked weights (2, 3, 4); the rows of an expert come in the order of their second number, not of the positions."""

    def __init__(self):
        super().__init__()
        self.num_experts = 2
        self.w = nn.Parameter(random(2, 3, 4, seed=3))

    def forward(self, rows):
        out = rows.new_zeros(len(rows), 3)
        for e in range(2):
            places = torch.where((rows[:, 0] > 0).long() == e)[0]
            places = places[rows[places, 1].argsort(descending=True)]
            if len(places):
                out = out.index_add(0, places, nn.functional.linear(rows[places], self.w[e]))
        return out


class Routed(nn.Module):
    """(n, T, 4) -> (n, T, 3)."""

    def __init__(self):
        super().__init__()
        self.experts = Experts()
        self.head = nn.Linear(3, 3, bias=False).double()
        with torch.no_grad():
            self.head.weight.copy_(random(3, 3, seed=4))

    def forward(self, x):
        return self.head(torch.tanh(self.experts(x.reshape(-1, 4)).reshape(*x.shape[:-1], 3)))


class Switched(nn.Module):
    """Batches of one example go through ``a`` or ``b``, by the sign of their first number."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(4, 3, bias=False).double() for _ in "ab")

    def forward(self, x):
        return (self.a if float(x.flatten()[0]) > 0 else self.b)(x)


def routed_batch(examples=6, length=1, seed=0):
    """Batch whose first two examples choose expert 0 alone, and the next two expert 1 alone."""
    x = random(examples, length, 4, seed=seed)
    x[:2, :, 0] = -x[:2, :, 0].abs()
    x[2:4, :, 0] = x[2:4, :, 0].abs()
    return x


def summed(model, x):
    """(n,) objectives, in which every position and output has another part."""
    return torch.sin(model(x)).flatten(1).sum(1)


def expert_gradients(model, x, objective=summed):
    """Expert -> (N, 3, 4), example by example by autograd."""
    each = [torch.autograd.grad(objective(model, x[i : i + 1])[0], model.experts.w)[0] for i in range(len(x))]
    return {name: torch.stack(each)[:, e] for e, name in enumerate(EXPERTS)}
