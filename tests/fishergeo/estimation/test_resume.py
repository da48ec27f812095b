"""A pass that is cut off goes on where it was, to the last bit."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import LAYERS, SmallLM, make_examples, split

import fishergeo as fg
from fishergeo.capture import content_mark

STRUCTURES = {
    "gram": "gram",
    "sketch": fg.Structure("sketch", rank=3),
    "probed": fg.Structure("sketch", rank=3, probes=4),
    "diagonal": "diagonal",
    "kfac": "kfac",
    "reduce": fg.Structure("kfac", sharing="reduce"),
    "kfac-sketch": fg.Structure("kfac-sketch", rank=3),
    "ekfac": "ekfac",
    "one sweep": fg.Structure("ekfac", basis_examples=5),
    "exact": "exact",
}
EXAMPLES = make_examples([4, 6, 5, 3, 6, 4, 5, 6, 3, 4, 6, 5])


def batches():
    return split(EXAMPLES, {2, 3, 6, 7, 9, 11})


def estimate(data, path=None, **options):
    return fg.estimate_fisher(
        SmallLM(),
        data,
        STRUCTURES,
        kind="mc",
        seed=4,
        layers=list(LAYERS),
        checkpoint=path,
        checkpoint_every=2,
        **options,
    )


def assert_equal_bits(one, other):
    for key in STRUCTURES:
        assert one[key].header == other[key].header
        for name in LAYERS:
            mine, theirs = one[key].accumulators[name].sums, other[key].accumulators[name].sums
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[part], theirs[part]) for part in mine)
    shared = other["kfac"].accumulators
    assert shared["first"].sums["input"] is shared["twin"].sums["input"]


class Interrupted(list):
    """Batches that stop after so many have been read in all."""

    def __init__(self, data, stop):
        super().__init__(data)
        self.left = stop

    def __iter__(self):
        for batch in super().__iter__():
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("stop", [1, 4, 5, 9, 12])
def test_an_interrupted_estimate_goes_on_bit_for_bit(tmp_path, stop, decay):
    path = tmp_path / "unfinished.safetensors"
    with pytest.raises(KeyboardInterrupt):
        estimate(Interrupted(batches(), stop), path, decay=decay)
    assert path.exists() == (stop > 1)
    resumed = estimate(batches(), path, decay=decay)
    assert not path.exists()
    assert_equal_bits(estimate(batches(), decay=decay), resumed)


SCRIPT = """
import sys, time
from test_resume import batches, estimate

class Slow(list):
    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == 5:
                print("waiting", flush=True)
                time.sleep(600)
            yield batch

estimate(Slow(batches()), sys.argv[1])
"""


def test_a_killed_process_is_resumed_bit_for_bit(tmp_path):
    path = tmp_path / "unfinished.safetensors"
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1] / "helpers"), str(here.parents[2])]),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline().strip() == "waiting"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.exists()
    resumed = estimate(batches(), path)
    assert_equal_bits(estimate(batches()), resumed)


def test_the_checkpoint_of_another_estimate_is_refused(tmp_path):
    path = tmp_path / "unfinished.safetensors"
    with pytest.raises(KeyboardInterrupt):
        estimate(Interrupted(batches(), 4), path)
    with pytest.raises(ValueError, match=r"unfinished\.safetensors.*another estimate: data"):
        fg.estimate_fisher(SmallLM(), batches(), STRUCTURES, layers=list(LAYERS), checkpoint=path)
    with pytest.raises(ValueError, match="another estimate: model"):
        fg.estimate_fisher(
            SmallLM(seed=1), batches(), STRUCTURES, kind="mc", seed=4, layers=list(LAYERS), checkpoint=path
        )
    fg.estimate_fisher(SmallLM(), batches(), "gram", layers=list(LAYERS)).save(path)
    with pytest.raises(ValueError, match="not the checkpoint of an estimate"):
        estimate(batches(), path)


def plain(model, batch, factor=1.0):
    return factor * model(batch["x"])[:, 0]


def of_column(column):
    return lambda batch: batch["w"][:, column]


class Scaled:
    """A loss whose one number is an attribute."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, model, batch):
        return plain(model, batch, self.factor)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({}, {"example_weights": "w1"}),
        ({"loss": lambda m, b: m(b["x"])[:, 0]}, {"loss": lambda m, b: 5 * m(b["x"])[:, 0]}),
        ({"loss": lambda m, b: m(b["x"])[:, 0].sin()}, {"loss": lambda m, b: m(b["x"])[:, 0].cos()}),
        ({"loss": functools.partial(plain, factor=2.0)}, {"loss": functools.partial(plain, factor=3.0)}),
        ({"loss": Scaled(2.0)}, {"loss": Scaled(3.0)}),
        ({"example_weights": of_column(0)}, {"example_weights": of_column(1)}),
        ({"structure": "ekfac", "basis": 1}, {"structure": "ekfac", "basis": 2}),
    ],
)
def test_a_checkpoint_of_another_loss_of_other_weights_or_of_another_basis_is_refused(tmp_path, mine, theirs):
    model, path = torch.nn.Linear(2, 1, bias=False), tmp_path / "unfinished.safetensors"
    data = [{"x": torch.eye(2) * (i + 1), "w": torch.tensor([[1.0, 100.0]] * 2), "w1": torch.ones(2)} for i in range(4)]

    def run(batches, basis=None, structure="diagonal", **options):
        if basis is not None:
            options["basis"] = fg.estimate_fisher(
                model, [torch.eye(2)[:basis] * basis], "kfac", loss=lambda m, x: m(x)[:, 0]
            )
        options = {"loss": plain, **options}
        return fg.estimate_fisher(model, batches, structure, checkpoint=path, checkpoint_every=1, **options)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(data, 2), **mine)
    with pytest.raises(ValueError, match=r"another estimate: (data|basis)"):
        run(data, **theirs)
    resumed = run(data, **mine)
    assert torch.equal(resumed[""].to_dense(), run(data, **mine)[""].to_dense()) and not path.exists()


def test_a_mark_does_not_hang_on_what_a_function_does_not_read():
    first, second = Scaled(2.0), Scaled(2.0)
    second.other = torch.ones(2)
    assert content_mark(first) == content_mark(second) != content_mark(Scaled(3.0))
    tensor = torch.arange(4.0)
    make = lambda held: lambda x: (x * held).sum()
    assert content_mark(make(tensor)) == content_mark(make(tensor.clone())) != content_mark(make(tensor + 1))
    assert content_mark([tensor, tensor]) == content_mark([tensor, tensor.clone()])
    assert content_mark(torch.nn.functional.cross_entropy) == content_mark(torch.nn.functional.cross_entropy)
