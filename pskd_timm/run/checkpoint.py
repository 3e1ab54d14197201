"""Checkpoints: written whole or not at all, checked before they are read, loadable onto any number of ranks.

A checkpoint is a folder `checkpoints/<epoch>-<step>`: weights, moving average, optimizer, the best epoch's weights, what
the method remembers (PS-KD's snapshot, OLS's soft labels, DLB's last batch), each rank's home rows of the prediction store,
and state.json, written last, with the checksum of every other file, taken while it is written. Order, augmentation and
learning rate are functions of (seed, epoch, step) and are not saved. Nothing in it is code.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .. import ranks
from ..errors import InputError
from ..files import checksum, flush_to_disk, rename_atomic, warn
from ..fingerprint import changed
from ..methods.base import Method
from ..models.build import contiguous_state
from ..store import PredictionStore, home_rows
from .folder import checkpoints

FORMAT, VERSION = "pskd_timm checkpoint", 3
BYTES_AT_ONCE = 64 * 2**20  # of a tensor on its way from the device into a file
# What a safetensors file calls the types of tensors.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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

    def start_epoch(self, epoch: int):
        """Stand at the beginning of epoch `epoch` (from 0)."""
        self.epoch, self.step = epoch, 0
        self.loss_sum = self.error_sum = self.num_seen = self.epoch_seconds = 0.0


@dataclass
class TrainState:
    """What a checkpoint holds beside Progress; `load` fills it in place."""

    network: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    store: PredictionStore | None
    sums: Tensor  # this rank's running sums that are not in Progress yet
    fingerprint: dict[str, str]  # of the data; a checkpoint of other data is refused
    best: dict[str, Tensor] = field(default_factory=dict)  # weights of the best epoch so far, on the main rank's CPU
    method: Method = field(default_factory=Method)  # its state_dict, where it has one

    @property
    def eval_network(self) -> nn.Module:
        """The weights that are evaluated and kept: the moving average where there is one."""
        return self.ema.module if self.ema else self.network

    def keep_best(self):
        """Keep the weights that were just evaluated, on the main rank alone."""
        if ranks.rank_and_world_size()[0] == 0:
            self.best.update(cpu_copy(self.eval_network))

    def put_back_best(self):
        """Give every rank the weights of the best epoch (all ranks call it together)."""
        if ranks.rank_and_world_size()[0] == 0:
            self.eval_network.load_state_dict(self.best)
        ranks.copy_from_main(self.eval_network.state_dict().values())


class CannotWrite(Exception):
    """A checkpoint could not be written on some rank."""


def save(
    run_dir: Path, progress: Progress, train_state: TrainState, keep: int, before_commit: Callable = lambda: None
) -> bool:
    """Write a checkpoint, then remove all but the `keep` newest (all ranks call it together).

    Where a rank cannot write, main says so in a line, False is returned on every rank and the earlier checkpoints stay.
    `before_commit` is called on the main rank; an OSError of it counts as one of the checkpoint's own.
    """
    rank, world_size = ranks.rank_and_world_size()
    folder = run_dir / "checkpoints"
    partial = folder / "partial"
    name = f"{progress.epoch:06d}-{progress.step:08d}"
    rows = train_state.store.shard() if train_state.store is not None else None
    remembered = train_state.method.state_dict()

    def begin():
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def finish():
        if rank == 0:
            before_commit()
            _write_state(partial, progress, train_state, checksums, sums)
            rename_atomic(partial, folder / name)

    try:
        _together(begin)
        written = _together(lambda: _write(partial, train_state, rows, remembered, rank, world_size))
        checksums = {name: value for files, _ in written for name, value in files.items()}
        sums = [rank_sums for _, rank_sums in written]
        _together(finish)
    except CannotWrite as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            earlier = checkpoints(run_dir)
            stays = f"; {earlier[-1].name} stays the newest" if earlier else ""
            warn(f"{folder / name}: the checkpoint cannot be written: {error}; the run goes on{stays}")
        return False
    if rank == 0:
        for old in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return True


def _together(work: Callable) -> list:
    """What `work` returns on each rank; CannotWrite on every rank where it fails on one (all ranks call it together)."""
    value = problem = None
    try:
        value = work()
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    found = ranks.all_gather_objects((value, problem))
    if problems := [problem for _, problem in found if problem]:
        raise CannotWrite(problems[0])
    return [value for value, _ in found]


def _write(
    partial: Path, train_state: TrainState, rows: Tensor | None, remembered: dict, rank: int, world_size: int
) -> tuple[dict, list[float]]:
    """Write this rank's files; returns their checksums by name, and the running sums."""
    tensors, checksums = {}, {}
    if rows is not None:
        tensors[_shard_name(rank, world_size)] = {"rows": rows}
    if rank == 0:
        tensors["model.safetensors"] = train_state.network.state_dict()
        if train_state.ema is not None:
            tensors["ema.safetensors"] = train_state.ema.state_dict()
        if train_state.best:
            tensors["best.safetensors"] = train_state.best
        if remembered:
            tensors["method.safetensors"] = remembered
        with HashedFile(partial / "optimizer.pt") as file:
            _save_optimizer(train_state.optimizer, file)
        checksums["optimizer.pt"] = file.checksum
    for name, state in tensors.items():
        with HashedFile(partial / name) as file:
            write_tensors(file, state)
        checksums[name] = file.checksum
    return checksums, train_state.sums.tolist()


class HashedFile:
    """A file to be written, which knows the SHA-256 of what was written; at the end the disk holds it."""

    def __init__(self, path: Path):
        self.file, self.digest = path.open("wb"), hashlib.sha256()

    def write(self, content) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self):
        self.file.flush()

    @property
    def checksum(self) -> str:
        return self.digest.hexdigest()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())


def write_tensors(file: HashedFile, tensors: dict[str, Tensor]):
    """Write a safetensors file piece by piece; the library's own writer cannot tell the checksum."""
    # Wide types first, so that each tensor lies where its type may.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, start = {}, 0
    for name in names:
        tensor, end = tensors[name], start + tensors[name].nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tensors[name].detach().reshape(-1)
        for piece in flat.split(BYTES_AT_ONCE // flat.itemsize):
            file.write(piece.cpu().view(torch.uint8).numpy().data)


def _save_optimizer(optimizer: torch.optim.Optimizer, file: HashedFile):
    try:
        torch.save(optimizer.state_dict(), file)
    except RuntimeError as error:
        # Of a write that failed torch says only that the file is not as long as it should be.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _write_state(partial: Path, progress: Progress, train_state: TrainState, checksums: dict, sums: list):
    state = {
        "format": FORMAT,
        "version": VERSION,
        "world_size": len(sums),
        "progress": asdict(progress),
        "sums": sums,
        "scaler": train_state.scaler.state_dict() if train_state.scaler else {},
        "fingerprint": train_state.fingerprint,
        "checksums": checksums,
    }
    path = partial / "state.json"
    path.write_text(json.dumps(state | {"checksum": _state_checksum(state)}, indent=1))
    flush_to_disk(path)


def _state_checksum(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _shard_name(rank: int, world_size: int) -> str:
    return f"store-{rank:05d}-of-{world_size:05d}.safetensors"


def newest_whole(run_dir: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, the same on every rank, if the run has any (all ranks call it together).

    Damaged ones that are newer are named in a line each and set aside. Raises InputError where all are damaged.
    """
    damaged = {}
    for path in reversed(ranks.on_main(lambda: checkpoints(run_dir))):
        found = ranks.all_gather_objects(damage(path, *ranks.rank_and_world_size()))
        if problems := list(filter(None, found)):
            damaged[path] = problems[0]
            continue
        ranks.on_main(lambda whole=path: _set_aside(damaged, whole))
        return path
    return ranks.on_main(lambda: _refuse(damaged))


def _set_aside(damaged: dict[Path, str], whole: Path):
    for bad, problem in damaged.items():
        aside = bad.with_name(f"damaged-{bad.name}")
        shutil.rmtree(aside, ignore_errors=True)
        bad.rename(aside)
        warn(f"{bad}: {problem}; resuming from {whole.name} instead; {aside.name} can be deleted")


def _refuse(damaged: dict[Path, str]):
    if damaged:
        path, problem = next(iter(damaged.items()))
        raise InputError(
            f"{path}: {problem}; no other checkpoint is whole; --resume never deletes the run and starts from scratch"
        )


def damage(path: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where every file is as it was written.

    Of several ranks each looks at its shard (of fewer or more, at its share of them), the main rank at the other files too.
    """
    try:
        state = json.loads((path / "state.json").read_bytes())
    except FileNotFoundError:
        return "state.json is missing"
    except (OSError, ValueError) as error:
        return f"state.json cannot be read ({str(error).splitlines()[0]})"
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        return "state.json is not that of a checkpoint which this pskd_timm can read"
    if state.get("version") != VERSION:
        return f"written in version {state.get('version')} of the format, this pskd_timm reads version {VERSION}"
    if state.pop("checksum", None) != _state_checksum(state):
        return "state.json is not as it was written (wrong checksum)"
    shards = {_shard_name(shard, state["world_size"]): shard for shard in range(state["world_size"])}
    for name, written in state["checksums"].items():
        if shards.get(name, 0) % world_size != rank:
            continue
        if not (path / name).is_file():
            return f"{name} is missing"
        try:
            if checksum(path / name) != written:
                return f"{name} is not as it was written (wrong checksum)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def load(path: Path, train_state: TrainState) -> Progress:
    """Put a checkpoint's contents into place on this rank and return where the run stood.

    Raises InputError where it is of another network, optimizer or store, or of data that have changed since.
    """
    rank, world_size = ranks.rank_and_world_size()
    state = json.loads((path / "state.json").read_bytes())
    # What the test images show has not touched the run yet: a damaged one may have been mended.
    before = {kind: digest for kind, digest in state.get("fingerprint", {}).items() if kind != "test_contents"}
    if change := changed(before, train_state.fingerprint):
        raise InputError(
            f"{path}: {change}; put them back as they were, or train on these with --resume never or another --output_dir"
        )
    try:
        train_state.network.load_state_dict(load_file(path / "model.safetensors"))
        if train_state.ema is not None:
            train_state.ema.load_state_dict(load_file(path / "ema.safetensors"))
        _load_optimizer(train_state.optimizer, path, train_state.sums.device)
        if "method.safetensors" in state["checksums"]:
            train_state.method.load_state_dict(load_file(path / "method.safetensors"))
    except (RuntimeError, ValueError, KeyError, FileNotFoundError, UnpicklingError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{path}: does not fit this recipe's network and optimizer: {why}") from None
    if rank == 0 and "best.safetensors" in state["checksums"]:
        train_state.best.update(load_file(path / "best.safetensors"))
    if train_state.scaler and state["scaler"]:
        train_state.scaler.load_state_dict(state["scaler"])
    if train_state.store is not None:
        _load_rows(path, train_state.store, state["world_size"])
    train_state.sums.copy_(torch.tensor(_my_sums(state["sums"], rank, world_size)))
    known = {one.name for one in fields(Progress)}
    return Progress(**{key: value for key, value in state["progress"].items() if key in known})


def _load_optimizer(optimizer: torch.optim.Optimizer, path: Path, device: torch.device):
    kernels = [
        {name: group[name] for name in ("fused", "foreach") if name in group} for group in optimizer.param_groups
    ]
    # What goes to a GPU is read from the file on its way there; on the CPU the optimizer takes the loaded tensors over.
    optimizer.load_state_dict(
        torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu", mmap=device.type == "cuda")
    )
    for group, own in zip(optimizer.param_groups, kernels, strict=True):
        group.update(own)  # the device's: the checkpoint may come from another one


def _my_sums(saved: list[list[float]], rank: int, world_size: int) -> list[float]:
    """This rank's running sums: its own where the number of ranks is the same, else the first rank takes all."""
    if len(saved) == world_size:
        return saved[rank]
    return [sum(column) if rank == 0 else 0.0 for column in zip(*saved, strict=True)]


def _load_rows(path: Path, store: PredictionStore, saved_on: int):
    """This rank's home rows, from whichever of the `saved_on` shards hold them."""
    for rank in range(saved_on):
        shard = home_rows(store.num_samples, rank, saved_on)
        start, stop = max(shard.start, store.own.start), min(shard.stop, store.own.stop)
        if start >= stop:
            continue
        with safe_open(path / _shard_name(rank, saved_on), "pt") as file:
            rows = file.get_slice("rows")[start - shard.start : stop - shard.start]
        if rows.dtype != store.home.dtype or rows.shape != (stop - start, store.home.shape[1]):
            raise InputError(f"{path}: its prediction store has other rows than this recipe's")
        store.home[start - store.own.start : stop - store.own.start] = rows.to(store.device)


def cpu_copy(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's state dict in the CPU's memory."""
    return {name: tensor.detach().cpu().clone() for name, tensor in contiguous_state(network).items()}
