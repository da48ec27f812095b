"""Sharded weights: FSDP2 is read through, FSDP1 and ZeRO-3 are refused, and the shipped configurations are accelerate's."""

import copy
import os
import runpy
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from alignment_rows import rows
from architectures import from_zero, llama, make, move
from forked import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import TrainingArguments

from alignguard.configs import NAMES, config_path
from alignguard.data import collator
from alignguard.guard import Guard, GuardConfig
from alignguard.training import GuardTrainer
from alignguard.updates import check_plugins

CONFIG = GuardConfig.curvature(
    structure="gram", refresh_examples=4, batch_size=2, lambda_alignment=2.0, lambda_task=0.3, lambda_collision=0.2,
    whole_update=False,
)  # fmt: skip


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    return model


def _penalties():
    dist.init_process_group("gloo")
    for method in ("lora", "full"):
        for first in ("guard", "shards"):
            torch.manual_seed(0)
            plain = make(dtype=torch.float64) if method == "lora" else llama().double()
            if method == "lora":
                move(plain, 0.05)
            sharded = copy.deepcopy(plain)
            if first == "shards":
                shard(sharded)
            guards = [
                from_zero(m, lambda m=m, method=method: Guard(m, rows(6), CONFIG, method=method))
                for m in (plain, sharded)
            ]
            if first == "guard":
                shard(sharded)
            for model in (plain, sharded):
                with torch.no_grad():
                    for p in model.parameters():
                        if p.requires_grad:
                            p.mul_(1.1)
            curvature = guards[0].curvature.estimate(guards[0].rows, 0)  # of one process, for both
            for guard in guards:
                guard.use_fisher(curvature)
            values = [guard.penalty() for guard in guards]
            torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=0)
            assert values[0] > 0
            for value in values:
                value.backward()
            for (name, one), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
                assert (one.grad is None) == (other.grad is None), name
                if one.grad is not None:
                    whole = other.grad.full_tensor() if hasattr(other.grad, "full_tensor") else other.grad
                    torch.testing.assert_close(whole, one.grad, rtol=1e-9, atol=1e-12, msg=f"{method} {first} {name}")
    dist.destroy_process_group()


def test_the_penalty_and_its_gradient_on_sharded_weights_are_those_on_whole_ones():
    assert distributed(_penalties, 2, 29641) == [0, 0]


def _fsdp1():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = llama()
    model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0], device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"model\.layers\.0.*FSDP1.*flat.*FSDP2"):
        Guard(model, rows(2), CONFIG, method="full")
    dist.destroy_process_group()


def test_fsdp1_is_refused_with_the_reason():
    assert distributed(_fsdp1, 1, 29642) == [0]


def test_zero3_is_refused_with_the_reason():
    model = make()
    next(model.parameters()).ds_id = 0  # what DeepSpeed marks partitioned parameters by
    with pytest.raises(ValueError, match=r"ZeRO-3.*gradient.*ZeRO-2"):
        Guard(model, rows(2), CONFIG)


class State:
    def __init__(self, **plugins):
        self.__dict__.update(plugins)


def test_accelerate_plugins_that_shard_so_are_refused(tmp_path, monkeypatch):
    one, two = (FullyShardedDataParallelPlugin(fsdp_version=version) for version in (1, 2))
    with pytest.raises(ValueError, match=r"FSDP1.*fsdp_version: 2"):
        check_plugins(State(fsdp_plugin=one))
    check_plugins(State(fsdp_plugin=two))
    with pytest.raises(ValueError, match="ZeRO-3"):
        check_plugins(State(deepspeed_plugin=State(zero_stage=3)))
    check_plugins(State(deepspeed_plugin=State(zero_stage=2)))
    # the trainer asks before anything is wrapped
    model = make()
    guard = Guard(model, rows(2), CONFIG)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    refused = []
    monkeypatch.setattr("alignguard.training.trainer.check_plugins", refused.append)
    GuardTrainer(model=model, args=arguments, train_dataset=rows(2), data_collator=collator(0, "causal"), guard=guard)
    assert len(refused) == 1 and hasattr(refused[0], "distributed_type")


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_and_launches_a_shipped_configuration(name):
    config = load_config_from_file(str(config_path(name)))
    assert config.mixed_precision == "bf16" and config.num_processes == 8 * config.num_machines
    arguments = launch_command_parser().parse_args(["--config_file", str(config_path(name)), "-m", "alignguard", "fit"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    if name == "fsdp2":
        assert arguments.use_fsdp and environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    else:
        assert arguments.multi_gpu and "ACCELERATE_USE_FSDP" not in environment
    assert (
        arguments.num_machines == (2 if name == "machines" else 1) and arguments.num_processes == config.num_processes
    )
    if name == "machines":
        assert arguments.main_process_ip == "10.0.0.1" and arguments.main_process_port == 29500
    assert arguments.module and arguments.training_script == "alignguard"
    assert find_spec("alignguard.__main__") is not None  # what -m runs of a package


def test_a_configuration_is_found_by_its_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["configs", "ddp"])
    runpy.run_module("alignguard.configs", run_name="__main__", alter_sys=False)
    assert os.path.isfile(capsys.readouterr().out.strip())
    with pytest.raises(ValueError, match="fsdp1"):
        config_path("fsdp1")
