"""How a run, or what scores one, meets the machine: processes, devices, threads and number formats."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from timm.layers import convert_sync_batchnorm
from torch import nn

from ..errors import InputError
from ..recipe import Model, Recipe


@contextmanager
def forget_single_process():
    """After a run in a single process, reset Accelerate's shared state, so that a notebook can launch several ones later."""
    try:
        yield
    finally:
        if "WORLD_SIZE" not in os.environ:
            AcceleratorState._reset_state(reset_partial_state=True)


def connect(recipe: Recipe) -> Accelerator:
    """Accelerate's view of the processes, refusing launches that would silently train something else."""
    command = "train" if isinstance(recipe, Recipe) else "detect"
    right = (
        f"launch several processes with `accelerate launch --multi_gpu --num_processes N -m pskd_timm {command} …`, "
        "also without a GPU"
    )
    for backend in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{backend}", "").lower() == "true":
            raise InputError(f"this launch asks for {backend}, and training here is data-parallel (DDP) only: {right}")
    if "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise InputError(f"this launch asks for several processes but starts one: {right}")
    if recipe.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("mixed_precision fp16 needs a GPU; bf16 and no run everywhere")
    if recipe.model.sync_bn and not torch.cuda.is_available():
        raise InputError("model.sync_bn needs GPUs: torch has no batch norm over processes for the CPU")
    compiles = getattr(recipe.model, "compile", "off")  # detectors are not compiled
    if compiles == "graphs" and not torch.cuda.is_available():
        raise InputError("model.compile graphs needs a GPU: default and max-autotune run everywhere")
    if compiles == "graphs" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("model.compile graphs is for one process: use default or max-autotune with several")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if 0 < num_gpus <= local_rank:
        raise InputError(
            f"process {local_rank} of this machine sees {num_gpus} GPU{'s' if num_gpus > 1 else ''}: start at most as many "
            "processes as GPUs, and have each see them all (no CUDA_VISIBLE_DEVICES of its own, with Slurm no --gpus-per-task "
            "and no --gpu-bind)"
        )
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    set_backends(recipe.mixed_precision)
    # A second run in one process may ask for another precision, which Accelerate's shared state refuses.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision={"tf32": "no"}.get(recipe.mixed_precision, recipe.mixed_precision),
            step_scheduler_with_optimizer=False,
            log_with=None if recipe.tracking.wandb == "disabled" else "wandb",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=recipe.timeout_minutes))],
        )
    except ValueError as error:
        raise InputError(f"the processes cannot be connected: {str(error).splitlines()[0]}: {right}") from None
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise InputError(
            f"this launch starts {os.environ['WORLD_SIZE']} copies that know nothing of each other: {right}"
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise InputError(
            f"{accelerator.distributed_type.value} is not supported, CPUs and CUDA GPUs with DDP are: {right}"
        )
    return accelerator


def set_backends(mixed_precision: str):
    """Have GPUs round the factors of float32 products to TF32 or not, and look for the fastest convolutions."""
    # torch rounds those of convolutions unless this is off.
    torch.set_float32_matmul_precision("highest" if mixed_precision == "no" else "high")
    torch.backends.cudnn.allow_tf32 = mixed_precision != "no"
    torch.backends.cudnn.benchmark = True  # shapes stay the same but for the tail batch


def place_network(network: nn.Module, section: Model, device: torch.device) -> nn.Module:
    """`network` on `device`, with batch norm over processes, memory layout and torch.compile as the recipe's section says."""
    network = network.to(device)
    if section.sync_bn:
        network = convert_sync_batchnorm(network)
    if section.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if section.compile in ("default", "max-autotune"):
        network.compile(mode=section.compile, dynamic=False)  # the tail batch is compiled for itself
    return network


def prepare_scoring(recipe: Recipe) -> torch.device:
    """Set threads and number formats as the recipe's run had them, and return the device to score on."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    set_backends(recipe.mixed_precision)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """The forward pass's precision as a recipe names it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
