"""Checkpoints: written whole or not at all, loadable onto any number of ranks.

A checkpoint is a folder `checkpoints/<epoch>-<step>`: weights, optimizer, each rank's home rows of the prediction store and
state.json. Order, augmentation and learning rate are functions of (seed, epoch, step) and are not saved.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .models.build import contiguous_state
from .ranks import rank_and_world_size
from .recipe import InputError
from .store import PredictionStore, home_rows

VERSION = 1


@dataclass
class Progress:
    """Where a run stands: `step` steps of epoch `epoch` are done; sums over those steps; the best epoch so far."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    loss_sum: float = 0.0
    error_sum: float = 0.0
    num_seen: float = 0.0
    best: dict | None = None
    scaler: dict = field(default_factory=dict)

    def start_epoch(self, epoch: int):
        """Stand at the beginning of epoch `epoch` (from 0)."""
        self.epoch, self.step = epoch, 0
        self.loss_sum = self.error_sum = self.num_seen = self.epoch_seconds = 0.0


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if it has one."""
    whole = sorted(path for path in (run_dir / "checkpoints").glob("[0-9]*-[0-9]*") if (path / "state.json").is_file())
    return whole[-1] if whole else None


def save(
    run_dir: Path,
    progress: Progress,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer,
    store: PredictionStore | None,
    keep: int,
):
    """Write a checkpoint (all ranks call it together), then remove all but the `keep` newest."""
    rank, world_size = rank_and_world_size()
    folder = run_dir / "checkpoints"
    partial = folder / "partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    if store is not None:
        save_file({"rows": store.shard().contiguous()}, partial / f"store-{rank:05d}-of-{world_size:05d}.safetensors")
    if rank == 0:
        save_file(contiguous_state(model), partial / "model.safetensors")
        if ema is not None:
            save_file(contiguous_state(ema), partial / "ema.safetensors")
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        state = {"version": VERSION, "world_size": world_size, **asdict(progress)}
        (partial / "state.json").write_text(json.dumps(state, indent=1))
    _barrier()
    if rank == 0:
        publish(partial, folder / f"{progress.epoch:06d}-{progress.step:08d}")
        for old in sorted(path for path in folder.glob("[0-9]*-[0-9]*"))[:-keep]:
            shutil.rmtree(old)
    _barrier()


def load(path: Path, model: nn.Module, ema: nn.Module | None, optimizer, store: PredictionStore | None) -> Progress:
    """Put a checkpoint's contents into place on this rank and return where the run stood."""
    state = json.loads((path / "state.json").read_text())
    if state.pop("version") != VERSION:
        raise InputError(
            f"{path}: written by another version of pskd_timm, which this one cannot read; start anew with --resume never"
        )
    saved_on = state.pop("world_size")
    model.load_state_dict(load_file(path / "model.safetensors"))
    if ema is not None:
        ema.load_state_dict(load_file(path / "ema.safetensors"))
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
    if store is not None:
        _load_rows(path, store, saved_on)
    return Progress(**state)


def _load_rows(path: Path, store: PredictionStore, saved_on: int):
    """This rank's home rows, from whichever of the `saved_on` shards hold them."""
    for rank in range(saved_on):
        shard = home_rows(store.num_samples, rank, saved_on)
        start, stop = max(shard.start, store.own.start), min(shard.stop, store.own.stop)
        if start < stop:
            with safe_open(path / f"store-{rank:05d}-of-{saved_on:05d}.safetensors", "pt") as file:
                rows = file.get_slice("rows")[start - shard.start : stop - shard.start]
            store.home[start - store.own.start : stop - store.own.start] = rows.to(store.home)


def publish(partial: Path, final: Path):
    """Flush a folder's files to disk and give it its final name, in which it is seen whole or not at all."""
    for path in partial.rglob("*"):
        if path.is_file():
            _fsync(path)
    _fsync(partial)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _fsync(final.parent)


def _fsync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier():
    if rank_and_world_size()[1] > 1:
        dist.barrier()
