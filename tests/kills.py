"""Runs in processes of their own that are killed at seeded moments, and what must be equal afterwards."""

import json
import os
import random
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from commands import LIMIT, forkserver, free_port, told_by_launcher
from pskd_timm.cli import main
from pskd_timm.run.checkpoint import damage
from pskd_timm.run.result import read_lines
from runs import newest

# ShakeDrop, a moving average, accumulation, crops, and so many saves that many kills fall into one.
SETTINGS = {
    "epochs": 3,
    "batch_size": 48,
    "threads": 1,
    "grad_accum_steps": 2,
    "ema_decay": 0.9,
    "timeout_minutes": 0.5,
    "data.limit_train": 320,
    "data.limit_test": 60,
    "data.holdout_fraction": 0.1,
    "data.gaussian_noise": 0.3,
    "augment.crop_padding": 1,
    "model.name": "cifar_pyramidnet_tiny_shakedrop",
    "model.kwargs": {},
    "optim.lr": 0.05,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 2,
    "tracking.log_every": 4,
}
TIMES = ("seconds", "epoch_seconds", "images_per_second")


def start(settings: dict, world_size: int, target=None) -> list:
    """A run's processes, forked from one that has the slow imports done."""
    target, port = target or run, free_port()
    places = range(world_size)
    processes = [forkserver().Process(target=target, args=(settings, rank, world_size, port)) for rank in places]
    for process in processes:
        process.start()
    return processes


def run(settings: dict, rank: int, world_size: int, port: int):
    """One process of a run; its words go to OUTPUT_DIR/rank<n>.log."""
    _speak_and_join(settings, rank, world_size, port)
    words = [word for key, value in settings.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    raise SystemExit(main(["train", "digits", *words]))


def detect(settings: dict, rank: int, world_size: int, port: int):
    """As `run`, of a detector; `method` is what its backbone is called."""
    _speak_and_join(settings, rank, world_size, port)
    chosen = {key: value for key, value in settings.items() if key not in ("method", "model.backbone")}
    words = [word for key, value in chosen.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    raise SystemExit(main(["detect", settings["model.backbone"], "--recipe", "detection/voc_small", *words]))


def _speak_and_join(settings: dict, rank: int, world_size: int, port: int):
    log = Path(settings["output_dir"]) / f"rank{rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(told_by_launcher(rank, world_size, port))


def score(settings: dict, rank: int, world_size: int, port: int):
    """The per-sample outcomes of a finished run's weights into OUTPUT_DIR/on<world_size>.safetensors."""
    from pskd_timm.data import load_data
    from pskd_timm.models.build import load_model, normalisation
    from pskd_timm.outcomes import ProbabilityRows
    from pskd_timm.run.folder import read_recipe
    from pskd_timm.tasks.images import predict

    torch.set_num_threads(1)
    os.environ.update(told_by_launcher(rank, world_size, port))
    if world_size > 1:
        dist.init_process_group("gloo")
    recipe, model = read_recipe(Path(settings["run_dir"])), load_model(settings["run_dir"])
    rows = ProbabilityRows(Path(settings["output_dir"]) / f"on{world_size}.rows", model.num_classes, "float32")
    settings_of_run = 8, *normalisation(model, recipe)
    found = predict(model, load_data(recipe.data, recipe.augment).test, *settings_of_run, rows=rows)
    if rank == 0:
        tensors = found.outcomes._asdict() | {"probabilities": np.concatenate(list(rows.blocks()))}
        tensors = {name: torch.as_tensor(values).contiguous() for name, values in tensors.items()}
        save_file(tensors, Path(settings["output_dir"]) / f"on{world_size}.safetensors")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def one_rank_without_disk(settings: dict, rank: int, world_size: int, port: int):
    """`run`, but the last rank's disk takes no more than a kilobyte a file at the first checkpoint."""
    if rank == world_size - 1:
        limit_files_once(1000)
    run(settings, rank, world_size, port)


def limit_files_once(num_bytes: int, at: int = 1):
    """Have the operating system refuse longer files while this process writes its `at`-th checkpoint."""
    from pskd_timm.run import checkpoint

    write, calls = checkpoint._write, []

    def limited(*arguments):
        calls.append(1)
        if len(calls) != at:
            return write(*arguments)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            return write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    checkpoint._write = limited
    return lambda: setattr(checkpoint, "_write", write)


def to_end(settings: dict, world_size: int, target=run) -> Path:
    """The finished run's folder."""
    processes = start(settings, world_size, target)
    for process in processes:
        process.join(LIMIT)
    log = (Path(settings["output_dir"]) / "rank0.log").read_text()
    assert [process.exitcode for process in processes] == [0] * world_size, log[-3000:]
    return Path(settings["output_dir"]) / settings["method"] / "seed0"


def kill_once(settings: dict, world_size: int, draw: random.Random, seconds: float, target=run) -> dict | None:
    """Start or continue a run and SIGKILL it at a moment that `draw` decides; None where it ended before.

    The moment lies up to 20 ms after the beginning of a save, or within the first `seconds` of work.
    """
    run_dir = Path(settings["output_dir"]) / settings["method"] / "seed0"
    partial = run_dir / "checkpoints" / "partial"
    in_save, saves = draw.random() < 0.5, draw.randint(1, 4)
    delay = draw.uniform(0, 0.02) if in_save else draw.uniform(0, seconds)
    victims = range(world_size) if draw.random() < 0.5 else [draw.randrange(world_size)]
    started = time.time()
    processes = start(settings, world_size, target)
    began = newest(run_dir)

    def is_new(path):
        with suppress(FileNotFoundError):
            return path.stat().st_ctime > started
        return False

    if in_save:
        _wait(lambda: is_new(partial) or not processes[0].is_alive())
        for _ in range(saves - 1):
            _wait(lambda: not is_new(partial) or not processes[0].is_alive())
            _wait(lambda: is_new(partial) or not processes[0].is_alive())
    else:
        # From the moment the run is at work: its recipe is written after everything is built.
        _wait(lambda: is_new(run_dir / "recipe.yaml") or not processes[0].is_alive())
    time.sleep(delay)
    alive = all(processes[victim].is_alive() for victim in victims)
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(processes[victim].pid, signal.SIGKILL)
    half_written = sorted(path.name for path in partial.glob("*")) if is_new(partial) else None
    for process in processes:
        process.join(LIMIT)
    assert not any(process.is_alive() for process in processes), "a rank did not end"
    if not alive:
        return None
    step = max([line["step"] for line in read_lines(run_dir / "steps.jsonl")], default=0)
    ends = newest(run_dir)
    return {
        "ranks": world_size,
        "killed": "all" if len(victims) == world_size else f"rank {victims[0]}",
        "moment": "in a save" if half_written is not None else "random",
        "partial": half_written,
        "logged_step": step,
        "went_on_from": began.name if began else "the start",
        "newest": ends.name if ends else "none",
        "newest_is_whole": ends is None or damage(ends) is None,
    }


def _wait(for_what):
    deadline = time.monotonic() + LIMIT
    while not for_what():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


OUTCOMES = ("predictions.parquet", "best/predictions.parquet")


def differences(one: Path, other: Path, outcomes=OUTCOMES) -> list[str]:
    """Names of what differs between two finished runs; times and versions aside, everything is compared bit for bit."""
    found = [
        name
        for name in ("model.safetensors", "best/model.safetensors", *outcomes)
        if (one / name).read_bytes() != (other / name).read_bytes()
    ]
    for name in ("metrics.jsonl", "steps.jsonl"):
        if _without_times(read_lines(one / name)) != _without_times(read_lines(other / name)):
            found.append(name)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    if _without_times(results[0]) != _without_times(results[1]):
        found.append("result.json")
    ends = [newest(folder) for folder in (one, other)]
    names = [sorted(path.name for path in end.iterdir()) for end in ends]
    if names[0] != names[1]:
        return [*found, f"files {names}"]
    for path in ends[0].glob("*.safetensors"):
        tensors, others = load_file(path), load_file(ends[1] / path.name)
        if tensors.keys() != others.keys() or any(not torch.equal(tensors[key], others[key]) for key in tensors):
            found.append(path.name)
    states = [torch.load(end / "optimizer.pt", weights_only=True) for end in ends]
    if not _equal(*states):
        found.append("optimizer.pt")
    states = [json.loads((end / "state.json").read_text()) for end in ends]
    if _without_times(states[0]["progress"]) != _without_times(states[1]["progress"]):
        found.append("state.json")
    return found


def _without_times(tree):
    if isinstance(tree, dict):
        return {key: _without_times(value) for key, value in tree.items() if key not in TIMES}
    return [_without_times(value) for value in tree] if isinstance(tree, list) else tree


def _equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other
