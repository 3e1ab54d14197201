"""Methods × seeds of one recipe: each run in a process of its own, skipping what is done, then one table."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from .cpus import num_cpus
from .errors import InputError, nearest, reason
from .fingerprint import changed
from .methods import METHOD_SECTIONS, PAPER
from .metrics import format_metrics
from .progress import Display, Row, duration
from .recipe import Recipe
from .recipe_files import as_recipe
from .run.folder import is_finished, is_locked, is_renewed, own_checkpoint, read_metrics, read_result, run_lock
from .run.result import last_line
from .tasks import TASKS, check_read, task_class
from .teacher import BASELINE, teacher_place

if TYPE_CHECKING:
    from .reports.build import Comparison

NAME_WIDTH = max(map(len, METHOD_SECTIONS)) + len(" seed 0")
BUSY = 75  # exit code of a run that another process is at work on (sysexits.h: try again later)
# Each run is a process of its own, forked from one that has the slow imports done but has trained nothing.
FORKED = multiprocessing.get_context("forkserver")
GRACE = 60  # seconds that interrupted runs have to save before they are ended


@dataclass
class Job:
    """One run and the process that works on it."""

    recipe: Recipe
    process: multiprocessing.Process | None = None
    seat: int = 0  # which share of the machine it has
    awaited: bool = False  # whether another process was seen at work on it
    started: float = 0.0  # when its process was

    @property
    def teacher(self) -> Path | None:
        """The run that must be finished before this one, where it is one of the comparison's own."""
        is_own = self.recipe.method_section.trained_teacher == BASELINE
        return teacher_place(self.recipe) if is_own else None

    @property
    def log(self) -> Path:
        return self.recipe.run_dir / "run.log"

    @property
    def name(self) -> str:
        return f"{self.recipe.method} seed {self.recipe.seed}"

    def where(self) -> tuple[int, str]:
        """How many epochs the run has done, and what it logged last."""
        if self.recipe.resume == "never" and not is_renewed(self.recipe, self.started):
            return 0, ""  # what lies there is a former run's
        step, epoch = (last_line(self.recipe.run_dir / name) for name in ("steps.jsonl", "metrics.jsonl"))
        if epoch:
            return epoch["epoch"], format_metrics(epoch, task_class(self.recipe.task).metrics[:3], brief=True)
        return 0, f"loss {step['loss']:.3f}" if step else ""


def compare(
    recipe: Recipe | str | Path,
    methods: Iterable[str] = ("paper",),
    seeds: Iterable[int] = (0,),
    jobs: int | None = None,
    display: Display | None = None,
) -> "Comparison":
    """Run every method with every seed, `jobs` at a time, and write the comparison into the recipe's output root.

    `paper` among `methods` stands for those of PS-KD's paper, `all` for all, as far as the recipe's task has them. `jobs` is by
    default one for each GPU, and on a machine without as many as leave each run the recipe's `threads`.
    A failed run is a row that says so; the others go on. Finished runs are not repeated; one that another process is at
    work on, as a second comparison in the same folder may be, is waited for. With `tfkd.teacher: baseline` the baselines
    are trained before TF-KD, also where `methods` does not name them.

    Example:
        >>> compare("digits", methods=["baseline", "pskd"], seeds=[0, 1, 2], jobs=2).frame
    """
    recipe = as_recipe(recipe, methods=methods, seeds=seeds)
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    # A seed or method given twice is one run.
    methods, seeds = method_names(recipe, methods), list(dict.fromkeys(seeds))
    if not methods or not seeds or min(seeds) < 0:
        raise InputError(f"--methods and --seeds must name some, no seed below 0: got {methods}, {seeds}")
    if "WORLD_SIZE" in os.environ:
        raise InputError(
            "compare starts its runs itself: call `pskd-timm compare … --jobs N` without accelerate launch"
        )
    display = display or Display()
    if BASELINE not in methods and any(getattr(recipe, name).trained_teacher == BASELINE for name in methods):
        methods = [BASELINE, *methods]
    all_jobs = [Job(recipe.model_copy(update={"method": method, "seed": seed})) for method in methods for seed in seeds]
    root = recipe.output_root
    waiting = [job for job in all_jobs if not is_finished(job.recipe)]
    display.say(f"{root}: {len(all_jobs)} runs, {len(all_jobs) - len(waiting)} already finished")
    if waiting:
        check_read(recipe)
        for method in methods:
            recipe.check_method(method)
        _start_server(recipe.task)

        from .checks import check_recipe
        from .optim import given_in_vain

        for line in given_in_vain(recipe):
            display.say(line)
        fingerprint = check_recipe(recipe, tuple(dict.fromkeys(job.recipe.method for job in waiting)), display)
        _check_finished([job.recipe.run_dir for job in all_jobs if job not in waiting], fingerprint)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir: {root} cannot be written: {reason(error)}") from None
    try:
        _run_all(waiting, len(all_jobs), jobs or default_jobs(recipe), display)
    finally:
        display.close()
    from .reports.build import report

    try:
        with FileLock(root / ".report.lock"):  # another comparison may end at the same time
            return report([job.recipe.run_dir for job in all_jobs], root)
    except OSError as error:
        raise InputError(f"{root}: the report cannot be written: {reason(error)}") from None


def _check_finished(run_dirs: list[Path], fingerprint: dict[str, str]):
    """Raise InputError where a finished run was of other data than there are now: no figure of it could stand beside others."""
    for run_dir in run_dirs:
        try:
            before = read_result(run_dir).get("data_fingerprint", {})
        except InputError:
            continue  # damaged, which the report says
        if change := changed(before, fingerprint):
            raise InputError(
                f"{run_dir} is finished: {change}; put them back as they were, or train all on these with "
                "--resume never or another --output_dir"
            )


def method_names(recipe: Recipe, words: Iterable[str]) -> list[str]:
    """The methods that `words` name, each once: by name, or with `paper` and `all` those of them that the recipe's task has."""
    groups = {"all": METHOD_SECTIONS, "paper": PAPER}
    found = []
    for word in words:
        if word not in groups and word not in METHOD_SECTIONS:
            known = [*groups, *METHOD_SECTIONS]
            raise InputError(f"--methods: unknown method {word!r}{nearest(str(word), known)} (of {', '.join(known)})")
        found += [name for name in groups[word] if name in recipe.methods] if word in groups else [word]
    return list(dict.fromkeys(found))


def default_jobs(recipe: Recipe) -> int:
    """How many runs at once: one a GPU, else as many as the cores allow with the recipe's threads each (all cores: one)."""
    import torch

    cores = num_cpus()
    return torch.cuda.device_count() or max(1, cores // (recipe.threads or cores))


def _run_all(waiting: list[Job], total: int, jobs: int, display: Display):
    """Run all jobs, `jobs` at a time; one that fails says why in the last line of its log."""
    running: list[Job] = []
    failed: set[Path] = set()
    left, began = list(waiting), time.time()
    # A scheduler's SIGTERM must not leave runs behind that nobody watches.
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if _in_main_thread()}
    if previous:
        signal.signal(signal.SIGTERM, _end)
    try:
        while left or running:
            _show(waiting, running, left, total, display)
            busy = {job.recipe.run_dir for job in [*left, *running]}
            for job in [job for job in left if job.teacher not in busy]:
                if len(running) == jobs:
                    break
                if _held_elsewhere(job, display):
                    continue
                left.remove(job)
                if job.teacher in failed:
                    failed.add(job.recipe.run_dir)
                    _fail(job, f"failed: its teacher {job.teacher} failed", display)
                    continue
                job.seat = min(set(range(jobs)) - {other.seat for other in running})
                job.process = FORKED.Process(target=_run, args=(job.recipe, job.seat, jobs, str(job.log)))
                job.started = time.time()
                running.append(job)  # before it starts: a Ctrl-C that comes meanwhile must end it too
                with _apart():
                    job.process.start()
            if not left:
                # While the last runs are at work, some of them on fewer cores than there are.
                with suppress(ImportError):  # which is told when it is needed
                    import_module("pskd_timm.reports.build")
            time.sleep(0.2)
            for job in [job for job in running if not job.process.is_alive()]:
                running.remove(job)
                if job.process.exitcode == BUSY:
                    left.append(job)
                    continue
                if job.process.exitcode != 0:
                    failed.add(job.recipe.run_dir)
                _print_outcome(job, display)
    except (KeyboardInterrupt, SystemExit):
        if previous:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the saving short either
        display.say("stopping: each run that trains saves where it stands")
        _stop(running)
        display.say(_after_stop(waiting, total, began))
        raise
    finally:
        for number, handler in previous.items():  # a notebook goes on after a Ctrl-C
            signal.signal(number, handler)


def _after_stop(waiting: list[Job], total: int, began: float) -> str:
    """How far the `total` runs are, of which those of `waiting` were to be trained, and what the same command will do.

    With `resume: never` it would delete what has been trained since the comparison `began`. Without that it would take the
    former runs, of those that had not begun, for its own.
    """
    never = any(job.recipe.resume == "never" for job in waiting)
    renewed = [job for job in waiting if is_renewed(job.recipe, began)]
    finished = [job for job in renewed if (job.recipe.run_dir / "result.json").is_file()]
    saved = [job for job in waiting if job not in finished and own_checkpoint(job.recipe, began)]
    former = [job for job in waiting if never and job not in renewed and (job.recipe.run_dir / "recipe.yaml").is_file()]
    done = total - len(waiting) + len(finished)
    does = [f"resumes {_names(saved)}"] if saved else []
    if done:
        does = ["keeps them", *does]
    if done + len(saved) + len(former) < total:
        does.append("starts the others" if does else "starts them")
    if former and (finished or saved):
        does.append(f"takes the former runs of {_names(former)} as they are")
    command = "the same command" + (" without --resume never" if never and (finished or saved) else "")
    return f"{done} of {total} runs are finished; {command} {', '.join(does) or 'starts them'}"


def _names(jobs: list[Job]) -> str:
    return ", ".join(job.name for job in jobs)


def _start_server(task: str):
    """Start what the runs of `task` are forked from; it does its slow imports while this process does."""
    FORKED.set_forkserver_preload(["pskd_timm.training", TASKS[task].partition(":")[0], "datasets"])
    with _apart():
        forkserver.ensure_running()


@contextmanager
def _apart():
    """What starts in here a Ctrl-C at the terminal does not reach: the parent passes it on, once, as SIGTERM.

    Nor does it run the parent's script again, which need not say `if __name__ == "__main__"`. A Ctrl-C or SIGTERM that comes
    meanwhile is obeyed at the end: half a start would leave the server without what it was promised.
    """
    came = []
    resource_tracker.ensure_running()  # which otherwise unblocks the signal when it is first needed
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # what starts inherits that
    # Another thread may get it nevertheless.
    numbers = (signal.SIGINT, signal.SIGTERM) if _in_main_thread() else ()
    previous = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number in came[:1]:
        signal.raise_signal(number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end(number, frame):
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice; the second must not cut the saving short
    raise SystemExit(128 + number)


def _show(jobs: list[Job], running: list[Job], left: list[Job], total: int, display: Display):
    """A bar for all epochs of `jobs` and one for each run that is `running`; what is `left`; `total` runs in all."""
    where = {job.name: (*job.where(), job.recipe.epochs) for job in running}
    epochs = sum(job.recipe.epochs for job in jobs)
    done = epochs - sum(job.recipe.epochs for job in left) - sum(of - epoch for epoch, _, of in where.values())
    count = f"{total - len(left) - len(running)} of {total} runs"
    if done < epochs:  # else the last runs are scored, which may take long
        count = f"{count} {display.left('all', done, epochs)}".rstrip()
    rows = [Row("all", done, epochs, count)]
    rows += [Row(name, epoch, of, f"{_epoch(epoch, of)}  {facts}") for name, (epoch, facts, of) in where.items()]
    waiting = _waiting(left)
    now = ", ".join(f"{name} {_epoch(epoch, of)}" for name, (epoch, _, of) in where.items())
    display.show(rows, f"{count}: {'; '.join(filter(None, (now, waiting)))}", waiting)


def _epoch(epoch: int, of: int) -> str:
    """Where a run that goes on is; after its last epoch its weights are scored once more, translations searched for."""
    return f"epoch {epoch}/{of}" if epoch < of else "trained, being scored"


def _waiting(left: list[Job]) -> str:
    """`waiting: cskd 1 2, pskd 0 1 2`: methods and their seeds; empty where nothing is left."""
    by_method = {}
    for job in left:
        by_method.setdefault(job.recipe.method, []).append(str(job.recipe.seed))
    words = ", ".join(f"{method} {' '.join(seeds)}" for method, seeds in by_method.items())
    return f"waiting: {words}" if words else ""


def _print_outcome(job: Job, display: Display):
    code = job.process.exitcode
    if code == 0:
        result = read_result(job.recipe.run_dir)
        figures = format_metrics(result["last"], read_metrics(result), brief=True)
        display.say(f"{job.name:<{NAME_WIDTH}} {figures}  {duration(result['seconds'])}")
        return
    why = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
    if code == 1:  # it has said why
        with suppress(OSError, IndexError):
            why = job.log.read_text(errors="replace").strip().splitlines()[-1]
    _fail(job, f"failed: {why}", display)


def _held_elsewhere(job: Job, display: Display) -> bool:
    """Whether another process is at work on a job that waits; says so once."""
    held = is_locked(job.recipe.run_dir)
    if held and not job.awaited:
        display.say(f"{job.name}: another process is at work on this run; waiting for it")
        job.awaited = True
    return held


def _fail(job: Job, why: str, display: Display):
    """Say why a run failed, also in the last line of its log: the report reads run folders only."""
    display.say(f"{job.name}: {why} (all of it: {job.log})")
    with suppress(OSError):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a") as log:
            log.write(f"{why}\n")


def _stop(running: list[Job]):
    running = [job for job in running if job.process.is_alive()]
    for job in running:
        os.kill(job.process.pid, signal.SIGTERM)
    for job in running:
        job.process.join(GRACE)
        if job.process.is_alive():
            job.process.kill()


def gpu_of(seat: int, count: int, visible: str | None) -> str:
    """The GPU of a seat, in turn among `count`: by number, or by the names that CUDA_VISIBLE_DEVICES has for those given us."""
    return visible.split(",")[seat % count] if visible else str(seat % count)


def _run(recipe: Recipe, seat: int, seats: int, log: str):
    """The process of one run: its share of the cores or its own GPU, its words into run.log."""
    import torch

    from .training import train

    if (count := torch.cuda.device_count()) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of(seat, count, os.environ.get("CUDA_VISIBLE_DEVICES"))
    threads = recipe.threads or max(1, min(torch.get_num_threads(), num_cpus() // seats))
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        held = run_lock(recipe.run_dir).acquire(timeout=1)  # from now on: train takes it only when all is built
    except Timeout:
        sys.exit(BUSY)  # the log is that process's
    # The log of a run that another comparison has finished meanwhile is kept.
    with held, open(log, "a" if (recipe.run_dir / "result.json").is_file() else "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(threads)
        try:
            train(recipe)
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
            sys.exit(1)
