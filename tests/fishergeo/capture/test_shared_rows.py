"""Rows that are shared by all examples, or of which an example has several, against a loop over single examples."""

import pytest
import torch
import transformers as hf
from torch import nn

import fishergeo as fg

IDS = torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


class Nano(nn.Module):
    """Positions as nanoGPT has them, or with a leading one."""

    def __init__(self, leading):
        super().__init__()
        torch.manual_seed(0)
        self.leading = leading
        self.wte, self.wpe, self.head = nn.Embedding(20, 8), nn.Embedding(16, 8), nn.Linear(8, 20)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1])
        positions = self.wpe(positions[None] if self.leading else positions)
        return self.head(torch.tanh(self.wte(ids) + positions))


def next_token(model, ids):
    return nn.functional.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)


def moments(model, weight, losses, view=lambda g: g):
    """(Gram, squares) of every example's gradient."""
    gradients = [view(torch.autograd.grad(one, weight, retain_graph=True)[0]) for one in losses]
    return sum(g @ g.T for g in gradients) / len(gradients), sum(g.square() for g in gradients) / len(gradients)


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_position_embeddings_that_all_examples_share(leading, n):
    model = Nano(leading).double()
    found = fg.estimate_fisher(model, [IDS[:n], IDS[4 - n :, :4]], ["gram", "diagonal", "kfac"], layers=["wpe", "wte", "head"],
                               loss=next_token)  # fmt: skip
    losses = [next_token(model, ids[i : i + 1])[0] for ids in (IDS[:n], IDS[4 - n :, :4]) for i in range(n)]
    for name in ("wpe", "wte"):
        gram, squares = moments(model, getattr(model, name).weight, losses, lambda g: g.T)
        assert (found["gram"][name].to_dense() - gram).norm() <= 1e-10 * gram.norm()
        assert (found["diagonal"][name].diagonal() - squares.flatten()).norm() <= 1e-10 * squares.norm()
    share = (
        torch.diag(torch.tensor([2.0] * 4 + [1.0] + [0.0] * 11, dtype=torch.float64)) / 9
    )  # of each position, once seen
    assert torch.allclose(found["kfac"]["wpe"].input_factor, share)


def test_as_many_positions_as_examples_are_refused_or_right():
    model, ids = Nano(False).double(), IDS[:, :4]
    for batches in ([ids], [IDS[:1], ids]):
        with pytest.raises(ValueError, match=r"'wpe' reads the ids 0 to 3 .* either"):
            fg.estimate_fisher(model, batches, "gram", layers="wpe", loss=next_token)
    model.leading = True
    found = fg.estimate_fisher(model, [ids], "gram", layers="wpe", loss=next_token)["wpe"].to_dense()
    gram, _ = moments(model, model.wpe.weight, [next_token(model, ids[i : i + 1])[0] for i in range(4)], lambda g: g.T)
    assert (found - gram).norm() <= 1e-10 * gram.norm()


def test_positions_of_gpt2_and_bert():
    torch.manual_seed(0)
    gpt2 = (
        hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)).double().eval()
    )
    bert = hf.BertForTokenClassification(hf.BertConfig(**SMALL, num_labels=3)).double().eval()
    for model, name, labels in ((gpt2, "transformer.wpe", IDS), (bert, "bert.embeddings.position_embeddings", IDS % 3)):
        batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}
        found = fg.estimate_fisher(model, [batch], "gram", layers=name)[name].to_dense()
        losses = [model(**{k: v[i : i + 1] for k, v in batch.items()}).loss for i in range(4)]
        gram, _ = moments(model, model.get_submodule(name).weight, losses, lambda g: g.T)
        assert (found - gram).norm() <= 1e-5 * gram.norm()  # transformers' loss may be in float32


@pytest.mark.parametrize("choices", [2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_multiple_choice(choices, padded):
    torch.manual_seed(0)
    model = hf.BertForMultipleChoice(hf.BertConfig(**SMALL)).double().eval()
    ids = torch.randint(1, 50, (4, choices, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :, 4:] = mask[2, 1, 2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}
    names = ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.intermediate.dense", "classifier"]
    found = fg.estimate_fisher(model, [{k: v[:3] for k, v in batch.items()}, {k: v[3:] for k, v in batch.items()}],
                               ["gram", "kfac"], layers=names)  # fmt: skip
    taken = []
    model.get_submodule(names[1]).register_forward_hook(lambda m, a, out: taken.append(a[0].detach()))
    losses = [model(**{k: v[i : i + 1] for k, v in batch.items()}).loss for i in range(4)]
    for name in names:
        gram, _ = moments(model, model.get_submodule(name).weight, losses)
        assert (found["gram"][name].to_dense() - gram).norm() <= 1e-10 * gram.norm()
    rows = torch.cat(taken)[mask.flatten(0, 1).bool()]
    factor = rows.T @ rows / len(rows)
    assert (found["kfac"][names[1]].input_factor - factor).norm() <= 1e-10 * factor.norm()


class Album(nn.Module):
    """Several images an example, through one convolution, and averaged."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(3, 4, 2), nn.Linear(4, 2)

    def forward(self, images):
        n, k = images.shape[:2]
        each = torch.tanh(self.conv(images.flatten(0, 1))).mean((2, 3))
        return self.out(torch.tanh(each.view(n, k, -1))).mean(1)


@pytest.mark.parametrize("images", [1, 2, 4])
def test_several_images_an_example(images):
    model = Album().double()
    x = torch.randn(4, images, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    loss = lambda m, b: m(b).square().sum(1)
    found = fg.estimate_fisher(model, [x[:3], x[3:]], "gram", layers=["conv", "out"], loss=loss)
    for name in ("conv", "out"):
        weight = getattr(model, name).weight
        gram, _ = moments(model, weight, [loss(model, x[i : i + 1])[0] for i in range(4)], lambda g: g.flatten(1))
        assert (found[name].to_dense() - gram).norm() <= 1e-10 * gram.norm()


def test_an_id_of_each_example_is_not_taken_for_positions():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.kind, self.out = nn.Embedding(9, 3), nn.Linear(3, 2)

        def forward(self, batch):
            return self.out(torch.tanh(batch["x"] + self.kind(batch["kind"])[:, None]))

    model, loss = Labelled().double(), lambda m, b: m(b).square().sum((1, 2))
    batches = [{"x": torch.randn(n, 4, 3).double(), "kind": torch.arange(n).flip(0)} for n in (3, 4, 2)]
    found = fg.estimate_fisher(model, batches, "gram", layers="kind", loss=loss)["kind"].to_dense()
    losses = [loss(model, {k: v[i : i + 1] for k, v in b.items()})[0] for b in batches for i in range(len(b["kind"]))]
    gram, _ = moments(model, model.kind.weight, losses, lambda g: g.T)
    assert (found - gram).norm() <= 1e-10 * gram.norm()
