"""Runs in forked children: cheap, since everything is imported already, and killable."""

import multiprocessing
import os
import signal
import sys
import traceback

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


def _child(work, arguments, environment):
    os.environ.update(environment)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def start(work, *arguments, **environment):
    process = multiprocessing.get_context("fork").Process(target=_child, args=(work, arguments, environment))
    process.start()
    return process


def run(work, *arguments, timeout=240, **environment):
    """Exit code of ``work(*arguments)`` in a child: negative for a signal."""
    process = start(work, *arguments, **environment)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(repr(work))
    return process.exitcode


def distributed(work, world, port, *arguments, timeout=240):
    """``work`` in ``world`` gloo processes, as torchrun would start them."""
    ranks = [
        start(work, *arguments, RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for i in range(world)
    ]  # fmt: skip
    for process in ranks:
        process.join(timeout)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        if process.is_alive():
            process.kill()
    return codes


def kill_at(event, folder):
    """Die by SIGKILL at the n-th time that this process touches a file of ``folder``; counts only, for ``event`` 0."""
    seen = {"count": 0}
    names = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir", "os.scandir"}

    def hook(name, arguments):
        if name in names and str(folder) in str(arguments[0] if arguments else ""):
            seen["count"] += 1
            if seen["count"] == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen
