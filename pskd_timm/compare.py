"""Methods × seeds of one recipe: each run in a process of its own, skipping what is done, then one table."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .progress import Display
from .recipe import METHOD_SECTIONS, InputError, Recipe
from .report import Comparison, report
from .tracking import read_lines
from .train import Result, check_recipe, finished, train

GRACE = 60  # seconds that interrupted runs have to save before they are ended


@dataclass
class Job:
    """One run and the process that works on it."""

    recipe: Recipe
    process: multiprocessing.Process | None = None
    seat: int = 0  # which share of the machine it has

    @property
    def log(self) -> Path:
        return self.recipe.run_dir / "run.log"

    @property
    def epochs_done(self) -> int:
        return len(read_lines(self.recipe.run_dir / "metrics.jsonl"))


def compare(
    recipe: Recipe, methods=METHOD_SECTIONS, seeds=(0,), jobs: int = 1, display: Display | None = None
) -> Comparison:
    """Run every method with every seed, `jobs` at a time, and write the comparison into the recipe's output root.

    A failed run is a row that says so; the others go on. Finished runs are not repeated.
    """
    if unknown := [method for method in methods if method not in METHOD_SECTIONS]:
        raise InputError(f"--methods: unknown method {unknown[0]!r}: choose from {', '.join(METHOD_SECTIONS)}")
    if "WORLD_SIZE" in os.environ:
        raise InputError(
            "compare starts its runs itself: call `pskd-timm compare … --jobs N` without accelerate launch"
        )
    display = display or Display()
    all_jobs = [Job(recipe.model_copy(update={"method": method, "seed": seed})) for method in methods for seed in seeds]
    root = Path(recipe.output_dir or f"runs/{recipe.name}")
    waiting = [job for job in all_jobs if not finished(job.recipe)]
    if waiting:
        check_recipe(recipe, tuple(dict.fromkeys(job.recipe.method for job in waiting)), display)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir: {root} cannot be written: {error}") from None
    display.say(f"{root}: {len(all_jobs)} runs, {len(all_jobs) - len(waiting)} finished before")
    try:
        _work_off(waiting, len(all_jobs), jobs, display)
    finally:
        display.close()
    return report([job.recipe.run_dir for job in all_jobs], root)


def _work_off(waiting: list[Job], total: int, jobs: int, display: Display):
    """Run all jobs, `jobs` at a time; one that fails says why in the last line of its log."""
    # Each run is a process of its own, forked from one that has the slow imports done but has trained nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pskd_timm.train", "datasets", "sklearn.datasets", "sklearn.model_selection"])
    running: list[Job] = []
    left = list(waiting)
    # A scheduler's SIGTERM must not leave runs behind that nobody watches.
    previous = signal.signal(signal.SIGTERM, _end) if _in_main_thread() else None
    try:
        while left or running:
            while left and len(running) < jobs:
                job = left.pop(0)
                job.seat = min(set(range(jobs)) - {other.seat for other in running})
                job.process = context.Process(target=_run, args=(job.recipe, job.seat, jobs, str(job.log)))
                _start(job.process)
                running.append(job)
            time.sleep(0.2)
            for job in [job for job in running if not job.process.is_alive()]:
                running.remove(job)
                _tell(job, display)
            _show(running, total - len(left) - len(running), total, display)
    except (KeyboardInterrupt, SystemExit):
        display.say("stopping: each run saves where it stands; the same command goes on from there")
        _stop(running)
        raise
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _start(process: multiprocessing.Process):
    """Start a process that a Ctrl-C at the terminal does not reach: the parent passes it on, once, as SIGTERM."""
    ignoring = _in_main_thread() and signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        if ignoring:
            signal.signal(signal.SIGINT, ignoring)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end(number, frame):
    raise SystemExit(128 + number)


def _show(running: list[Job], done: int, total: int, display: Display):
    now = ", ".join(f"{j.recipe.method} seed {j.recipe.seed} epoch {j.epochs_done}/{j.recipe.epochs}" for j in running)
    display.advance("runs", done, total, now)


def _tell(job: Job, display: Display):
    run_dir = job.recipe.run_dir
    name = f"{job.recipe.method} seed {job.recipe.seed}"
    if job.process.exitcode == 0:
        last = Result.read(run_dir).last
        display.say(f"{name}: error {last['top1_error']:.2f} %  nll {last['nll']:.3f}  ece {last['ece']:.2f} %")
        return
    code = job.process.exitcode
    failure = f"failed: exit code {code}" if code > 0 else f"failed: ended by signal {-code}"
    with suppress(OSError):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        said = job.log.read_text().strip().splitlines() if job.log.is_file() else []
        if code == 1 and said:
            failure = f"failed: {said[-1]}"
        with job.log.open("a") as log:
            log.write(f"{failure}\n")  # for the report, which reads run folders only
    display.say(f"{name}: {failure} (all of it: {job.log})")


def _stop(running: list[Job]):
    if _in_main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the saving short
    for job in running:
        if job.process.is_alive():
            os.kill(job.process.pid, signal.SIGTERM)
    for job in running:
        job.process.join(GRACE)
        if job.process.is_alive():
            job.process.kill()


def _run(recipe: Recipe, seat: int, seats: int, log: str):
    """The process of one run: its share of the cores or its own GPU, its words into run.log."""
    import torch

    if torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(seat % torch.cuda.device_count())
    threads = recipe.threads or max(1, (os.cpu_count() or 1) // seats)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(threads)
        try:
            train(recipe)
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
            sys.exit(1)
