"""One run, from top to bottom: build, resume, epochs of batches, evaluate, log, save."""

import copy
import html
import json
import math
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from filelock import FileLock, Timeout
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn

from . import ranks, rng
from .batch import Batch
from .data import Data, Loader, load_data, pictures
from .errors import Diverged, InputError
from .evaluation import Predictions, normalisation, predict, run_recipe, run_result
from .files import without_nan, write_atomic
from .methods import METHODS, Method
from .metrics import METRICS
from .models.build import check_name, contiguous_state, create_model, save_model
from .optim import lr_at, make_optimizer
from .order import num_batches
from .progress import Display
from .recipe import Recipe
from .recipe_files import check_call
from .run import checkpoint
from .run.checkpoint import Progress, SaveSchedule, TrainState
from .run.graph import StepGraph
from .run.profile import profiled
from .run.released import start_from
from .run.tracking import Tracker, read_lines
from .teacher import method_section, teacher_figures

GO_ON = "the same command goes on from there"
LOCK = ".lock"  # file in a run folder that is locked while a process is at work there
MODEL, STEP = 10, 11  # streams of random numbers: initial weights, and what a step draws (dropout)


@dataclass
class Result:
    """A finished run: its folder and what result.json holds of it."""

    run_dir: Path
    values: dict

    @classmethod
    def read(cls, run_dir: Path) -> "Result":
        return cls(run_dir, run_result(run_dir))

    @property
    def last(self) -> dict:
        """Number and test figures of the last epoch."""
        return self.values["last"]

    @property
    def best(self) -> dict:
        """Number and test figures of the best epoch, and which part it was chosen on."""
        return self.values["best"]

    @property
    def history(self) -> list[dict]:
        """The lines of metrics.jsonl, one an epoch."""
        return read_lines(self.run_dir / "metrics.jsonl")

    @property
    def frame(self) -> pd.DataFrame:
        """The test figures of the last and of the best epoch, a row each."""
        return pd.DataFrame({"last": self.last, "best": self.best}).T[["epoch", *METRICS]].infer_objects()

    @property
    def history_frame(self) -> pd.DataFrame:
        """The lines of metrics.jsonl, a row an epoch."""
        return pd.DataFrame(self.history)

    def _repr_html_(self) -> str:
        where = html.escape(f"{self.values['method']}, seed {self.values['seed']}: {self.run_dir}")
        table = self.frame.to_html(formatters={"epoch": "{:.0f}".format}, float_format="{:.2f}".format, border=0)
        return f"<p>{where}</p>{table}"


@contextmanager
def connected_no_longer():
    """Makes Accelerate forget a process that was alone: it starts no several ones where it remembers one."""
    try:
        yield
    finally:
        if "WORLD_SIZE" not in os.environ:
            AcceleratorState._reset_state(reset_partial_state=True)


@connected_no_longer()
def train(recipe: Recipe, display: Display | None = None, callbacks: Sequence[Callable[[dict], None]] = ()) -> Result:
    """Train as `recipe` says, or go on with the run in its folder, and return the result.

    Each of `callbacks` is called, on every rank, with an epoch's line of metrics.jsonl once that epoch is logged and saved
    as the recipe says; what it raises ends the run, which can be continued.

    Raises InputError for bad input, Diverged where the loss ends up not finite, and after a checkpoint KeyboardInterrupt
    where SIGINT, SystemExit(128 + number) where SIGTERM or SIGUSR1 asks the run to stop.
    """
    check_call(recipe, callbacks=callbacks)
    if not all(map(callable, callbacks)):
        raise InputError("callbacks should be functions, each of one argument: an epoch's line of metrics.jsonl")
    recipe.check_method(recipe.method)
    check_name(recipe.model.name)
    accelerator = connect(recipe)
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    is_main = accelerator.is_main_process
    display = (display or Display()) if is_main else Display(quiet=True)
    run_dir = recipe.run_dir
    if finished(recipe):
        display.say(f"{run_dir}: finished before; --resume never starts anew")
        return Result.read(run_dir)

    # Build. Nothing is written before all of it stands.
    data = load_data(recipe.data, recipe.augment, display.advance)
    model = make_network(recipe, data)
    check_batches(recipe, len(data.train), world_size, model, data.image_size)
    model = model.to(device)
    if recipe.model.sync_bn:
        model = convert_sync_batchnorm(model)
    if recipe.model.channels_last:
        model = model.to(memory_format=torch.channels_last)
    mean, std = normalisation(model, recipe)
    if recipe.model.compile in ("default", "max-autotune"):
        model.compile(mode=recipe.model.compile, dynamic=False)  # the tail batch is compiled for itself
    network = model  # without the wrappers of several processes
    ema = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema_decay else None
    evaluated = ema.module if ema else network
    train_split = data.train.to(device)
    splits = {"test": data.test, "holdout": data.holdout}
    splits = {name: split.to(device) for name, split in splits.items() if split}
    chosen_on, choosing_split = list(splits.items())[-1]
    scored_on, scored_split = list(splits.items())[0]
    method = METHODS[recipe.method].from_section(method_section(recipe))
    method.setup(
        num_samples=len(data.train),
        num_classes=data.num_classes,
        num_epochs=recipe.epochs,
        device=device,
        labels=train_split.labels,
        model=network,
    )
    loader = Loader(
        train_split,
        data.num_classes,
        recipe.epochs,
        recipe.batch_size,
        recipe.augment,
        mean,
        std,
        seed=recipe.seed,
        rank=rank,
        world_size=world_size,
        partners=method.needs_partners,
    )
    optimizer = make_optimizer(model, recipe.optim)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Running statistics matter in evaluation only, and are brought together there (ranks.py): no step waits for them.
    model.broadcast_buffers = False
    running = RunningSums(accelerator, method.part_names)
    progress = Progress()
    parts = TrainState(network, ema, optimizer, accelerator.scaler, method.store, running.sums, method=method)

    def forward_backward(batch: Batch, weight: float):
        with accelerator.autocast():
            loss, logits = method.loss(model, batch)
        accelerator.backward(loss * weight)
        running.add(loss, logits, batch.labels, method.parts)

    recorded = recipe.model.compile == "graphs"
    if recorded:
        check_recording(method)
        forward_backward = StepGraph(forward_backward, lambda: method.variant)

    def score_split(model, split, keep_probabilities=False):
        settings = (recipe.batch_size, mean, std, recipe.mixed_precision, keep_probabilities)
        return predict(model, split, *settings, progress=display.advance)

    def save():
        clock.update(progress)
        running.total(f"epoch {progress.epoch + 1}, step {progress.step}")
        checkpoint.save(run_dir, progress, parts, recipe.checkpoint.keep, before_commit=tracker.sync)
        schedule.saved_at = time.monotonic()

    lock = run_lock(run_dir)
    ranks.on_main(lambda: prepare_folder(recipe, lock))
    try:
        tracker = Tracker(accelerator, recipe, run_dir, loader.steps, display.quiet)
    except InputError:
        lock.release()  # a notebook keeps what an error has seen, the lock among it
        raise
    schedule = SaveSchedule(recipe.checkpoint, recipe.tracking.log_every)
    clock = Clock()
    try:
        # Resume.
        if whole := checkpoint.newest_whole(run_dir):
            progress = checkpoint.load(whole, parts)
            display.say(f"{run_dir}: going on after epoch {progress.epoch}, step {progress.step} of {loader.steps}")
        elif recipe.init_from:
            progress = start_from(recipe.init_from, network, optimizer, method.store, recipe.epochs)
            if ema:
                ema.set(network)
            display.say(f"{run_dir}: starting from {recipe.init_from} after epoch {progress.epoch}")
        tracker.forget_after(progress.epoch, progress.step)
        first_epoch = progress.epoch
        done = progress.epoch * loader.steps + progress.step
        display.begin(f"{recipe.method} seed {recipe.seed}", recipe.epochs, loader.steps, done)
        if description := method.describe():
            display.say(description)

        profile_steps = recipe.tracking.profile_steps if is_main else 0
        with StopSignals() as stop, profiled(run_dir, profile_steps, display.say) as profile:
            for epoch in range(progress.epoch, recipe.epochs):
                batches = loader.rank_batches(epoch)[progress.step :]
                # After a change of the number of processes an epoch may have nothing left for them but to be evaluated.
                method.begin_epoch(epoch, torch.cat(batches) if batches else torch.empty(0, dtype=torch.int64))
                model.train()
                for micro_batches in loader.batches(batches, epoch, recipe.grad_accum_steps):
                    step = epoch * loader.steps + progress.step
                    global_size = loader.global_size(progress.step)
                    # Dropout and the like draw from torch's generator: seeded here, a resumed run draws the same.
                    torch.manual_seed(rng.derive_key(recipe.seed, STEP, step, rank))
                    lr = lr_at(step, loader.steps, recipe.epochs, recipe.optim)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    for batch in micro_batches:
                        # DDP averages over ranks; the weight makes of uneven shares the mean over the global batch.
                        weight = len(batch.labels) * world_size / global_size
                        with nullcontext() if batch is micro_batches[-1] else accelerator.no_sync(model):
                            forward_backward(batch, weight)
                    to_log = (step + 1) % recipe.tracking.log_every == 0
                    if recipe.optim.clip_grad_norm or to_log:
                        longest = recipe.optim.clip_grad_norm or math.inf
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), longest)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=not recorded)  # a recording adds to the tensors it has seen
                    if ema:
                        ema.update(network)
                    progress.step += 1
                    if profile:
                        profile.step()
                    if to_log:
                        means = running.read(progress, f"epoch {epoch + 1}, step {progress.step}")
                        line = {"epoch": epoch + 1, **means, "lr": lr, "grad_norm": grad_norm.item(), **method.values()}
                        tracker.log_step(step + 1, line)
                        display.step(epoch + 1, progress.step, progress.num_seen, line)
                    if progress.step < loader.steps:
                        due = schedule.after(step + 1, stop.received)
                        if due.save or due.signal:
                            save()
                        if due.signal:
                            display.say(f"{run_dir}: stopped in epoch {epoch + 1} after step {progress.step}; {GO_ON}")
                            stop.obey(due.signal)
                running.read(progress, f"epoch {epoch + 1}")
                line = {
                    "epoch": epoch + 1,
                    "lr": lr_at((epoch + 1) * loader.steps - 1, loader.steps, recipe.epochs, recipe.optim),
                    "train_loss": progress.loss_sum / progress.num_seen,
                    "train_error": 100.0 * progress.error_sum / progress.num_seen,
                    **method.values(),
                    **({"rows_renewed": loader.num_unmixed(epoch)} if method.store else {}),
                    "store_bytes": method.store.nbytes if method.store else 0,
                }
                method.end_epoch()
                if epoch == first_epoch and (news := method.describe()) != description:
                    display.say(news)
                clock.update(progress)
                images_per_second = progress.num_seen / progress.epoch_seconds

                # Evaluate.
                try:
                    figures = score_split(evaluated, choosing_split).score()
                except InputError:  # a damaged image: the epoch's training is not lost
                    if world_size == 1:
                        save()
                    raise
                clock.update(progress)
                if progress.best is None or figures["top1_error"] < progress.best["top1_error"]:
                    progress.best = {"epoch": epoch + 1, **figures}
                    parts.best.update(cpu_copy(evaluated))

                # Log and save.
                line |= {"evaluated_on": chosen_on, **figures}
                line |= {"images_per_second": images_per_second, "seconds": progress.seconds}
                tracker.log_epoch((epoch + 1) * loader.steps, line)
                display.epoch(line)
                progress.start_epoch(epoch + 1)
                last_epoch = progress.epoch == recipe.epochs
                due = schedule.after((epoch + 1) * loader.steps, stop.received, epoch_end=True)
                if last_epoch or due.save or due.signal or progress.epoch % recipe.checkpoint.every_epochs == 0:
                    save()
                for callback in callbacks:
                    callback(line)
                if due.signal and not last_epoch:
                    display.say(f"{run_dir}: stopped after epoch {progress.epoch}; {GO_ON}")
                    stop.obey(due.signal)

        # The result: the last and the best epoch's weights over the test split, or where that stays unread the held-out part.
        of_last = score_split(evaluated, scored_split, keep_probabilities=True)
        of_holdout = score_split(evaluated, choosing_split, keep_probabilities=True) if data.holdout else None
        if is_main:
            save_model(evaluated, run_dir, mean, std, data.image_size, data.class_names)
        evaluated.load_state_dict(parts.best)
        of_best = score_split(evaluated, scored_split, keep_probabilities=True)
        best_of_holdout = score_split(evaluated, choosing_split, keep_probabilities=True) if data.holdout else None
        clock.update(progress)
        if is_main:
            values = {
                "name": recipe.name,
                "method": recipe.method,
                "seed": recipe.seed,
                "evaluated_on": scored_on,
                "last": {"epoch": recipe.epochs, **of_last.score()},
                "best": {"epoch": progress.best["epoch"], **of_best.score(), "chosen_on": chosen_on},
                "seconds": progress.seconds,
                "num_train": len(data.train),
                "num_test": len(data.test) if data.test else 0,
                "num_holdout": len(data.holdout) if data.holdout else 0,
                "num_classes": data.num_classes,
                "class_names": data.class_names,
                "num_parameters": sum(p.numel() for p in network.parameters()),
                "num_processes": world_size,
                **environment(device),
            }
            if of_teacher := teacher_figures(recipe):
                values["teacher"] = of_teacher
            if of_holdout:
                of_holdout.write(run_dir / "holdout.parquet")
                values["holdout"] = {"last": {"epoch": recipe.epochs, **of_holdout.score()}, "best": progress.best}
            save_model(evaluated, run_dir / "best", mean, std, data.image_size, data.class_names)
            if best_of_holdout:
                best_of_holdout.write(run_dir / "best" / "holdout.parquet")
            prediction = of_last.probabilities.argmax(dim=1)
            shown = partial(pictures, scored_split)
            tracker.log_result(values, of_last.outcomes, prediction, of_last.labels, data.class_names, shown)
            write_result(run_dir, of_last, of_best, values)
        accelerator.wait_for_everyone()
    finally:
        tracker.finish()
        display.close()
        lock.release()
    return Result.read(run_dir)


def connect(recipe: Recipe) -> Accelerator:
    """Accelerate's view of the processes, refusing launches that would silently train something else."""
    right = (
        "launch several processes with `accelerate launch --multi_gpu --num_processes N -m pskd_timm train …`, "
        "also without a GPU"
    )
    if "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise InputError(f"this launch asks for several processes but starts one: {right}")
    if recipe.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("mixed_precision fp16 needs a GPU; bf16 and no run everywhere")
    if recipe.model.sync_bn and not torch.cuda.is_available():
        raise InputError("model.sync_bn needs GPUs: torch has no batch norm over processes for the CPU")
    if recipe.model.compile == "graphs" and not torch.cuda.is_available():
        raise InputError("model.compile graphs needs a GPU: default and max-autotune run everywhere")
    if recipe.model.compile == "graphs" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("model.compile graphs is for one process: use default or max-autotune with several")
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
    return accelerator


def set_backends(mixed_precision: str):
    """Have GPUs round the factors of float32 products to TF32 or not, and look for the fastest convolutions."""
    # torch rounds those of convolutions unless it is told not to.
    torch.set_float32_matmul_precision("highest" if mixed_precision == "no" else "high")
    torch.backends.cudnn.allow_tf32 = mixed_precision != "no"
    torch.backends.cudnn.benchmark = True  # shapes stay the same but for the tail batch


def check_recipe(recipe: Recipe, methods: tuple[str, ...], display: Display):
    """What `train` would refuse, for each of `methods`, before any run is started; decodes the images on the way."""
    for method in methods:
        recipe.check_method(method)
    check_name(recipe.model.name)
    data = load_data(recipe.data, recipe.augment, display.advance)
    model = make_network(recipe, data)
    check_batches(recipe, len(data.train), 1, model, data.image_size)
    make_optimizer(model, recipe.optim)
    for method in methods:
        if method == "tfkd" and recipe.tfkd.teacher == "baseline":
            continue  # the teacher is trained first, from this very recipe
        taught = recipe.model_copy(update={"method": method})
        METHODS[method].from_section(method_section(taught)).check(model, data.num_classes)


def check_recording(method: Method):
    """Raise InputError where a CUDA graph cannot hold a step of `method`: it cannot wait for copies from and to the CPU."""
    if method.store and method.store.device.type == "cpu":
        raise InputError(
            "model.compile graphs needs the prediction store on the GPU (pskd.store_device auto): "
            "where it does not fit, pskd.store_format topk or pskd.teacher snapshot do, or model.compile default"
        )


def check_batches(recipe: Recipe, num_samples: int, world_size: int, model: nn.Module, image_size: tuple[int, int]):
    """Raise InputError where the global batch cannot be shared out, or leaves one sample to a model that needs two."""
    if recipe.batch_size < world_size:
        raise InputError(f"batch_size {recipe.batch_size} is global and must not be below the {world_size} processes")
    if num_batches(num_samples, recipe.batch_size, world_size) == 0:
        raise InputError(f"data: {num_samples} training samples are fewer than the {world_size} processes")
    tail = num_samples % recipe.batch_size
    smallest = tail if tail >= world_size else min(recipe.batch_size, num_samples)
    share = smallest // world_size
    if share < 2 * recipe.grad_accum_steps and not takes_one_sample(model, image_size):
        raise InputError(
            f"model {recipe.model.name} cannot train on a single sample: {num_samples} samples with batch_size "
            f"{recipe.batch_size}, {world_size} processes and grad_accum_steps {recipe.grad_accum_steps} leave one; "
            "choose another batch_size"
        )


def takes_one_sample(model: nn.Module, image_size: tuple[int, int]) -> bool:
    """Whether a training step works on one image; batch norm on a map of one pixel raises there."""
    tried = copy.deepcopy(model).train()  # the model's own running statistics stay as they are
    try:
        with torch.no_grad():
            tried(torch.zeros(1, 3, *image_size))
    except ValueError:
        return False
    return True


def make_network(recipe: Recipe, data: Data) -> nn.Module:
    """The recipe's model with initial weights that depend on the seed alone."""
    torch.manual_seed(rng.derive_key(recipe.seed, MODEL))
    return create_model(recipe.model, data.num_classes, data.image_size)


def finished(recipe: Recipe) -> bool:
    """Whether the run folder holds this recipe's result; InputError where it holds another recipe's run."""
    run_dir = recipe.run_dir
    if recipe.resume == "never" or not (run_dir / "recipe.yaml").is_file():
        return False
    there, here = run_recipe(run_dir).identity(), recipe.identity()
    different = [key for key in here if there.get(key) != here[key]]
    if different and (checkpoint.newest(run_dir) or (run_dir / "result.json").is_file()):
        key = different[0]
        other = f"{run_dir} holds a run with {key} {there.get(key)!r}, not {here[key]!r}"
        weights = run_dir / "model.safetensors"
        if different == ["epochs"] and weights.is_file():
            raise InputError(
                f"{other}, and a run keeps its length, which learning rate and α follow: choose another --output_dir (with "
                f"--init_from {weights} to start from its weights), or --resume never to replace it"
            )
        raise InputError(f"{other}: choose another --output_dir, or --resume never to replace it")
    return (run_dir / "result.json").is_file()


def prepare_folder(recipe: Recipe, lock: FileLock):
    """Make the run folder, lock it for this process and write the resolved recipe into it.

    The lock ends with the process. With `resume: never` the run that is there is deleted.
    """
    run_dir = recipe.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1)  # compare takes it for an instant when it looks whether a run is free
        if recipe.resume == "never" and (run_dir / "recipe.yaml").is_file():
            delete_run(run_dir)
        write_atomic(run_dir / "recipe.yaml", yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True))
    except Timeout:
        raise InputError(
            f"{run_dir}: another process is at work on this run: wait for it, or choose another --output_dir"
        ) from None
    except OSError as error:
        raise InputError(f"output_dir: {run_dir} cannot be written: {error}") from None


def run_lock(run_dir: Path) -> FileLock:
    """The lock of the process that is at work on a run, which may take it more than once."""
    return FileLock(run_dir / LOCK, is_singleton=True)


def at_work(run_dir: Path) -> bool:
    """Whether a process holds the run in a folder, which may not be there yet."""
    if not (run_dir / LOCK).is_file():
        return False
    try:
        with FileLock(run_dir / LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False  # a folder that cannot be written: the run says so itself


def delete_run(run_dir: Path):
    """Delete a run but for its lock and the log that compare writes; result.json goes first and recipe.yaml last.

    So a part of a run never looks whole.
    """
    (run_dir / "result.json").unlink(missing_ok=True)
    for path in run_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (LOCK, "run.log", "recipe.yaml"):
            path.unlink()
    (run_dir / "recipe.yaml").unlink()


class RunningSums:
    """Loss, error, sample count and the loss's parts summed on the device and read only now and then."""

    def __init__(self, accelerator: Accelerator, part_names: tuple[str, ...] = ()):
        self.accelerator, self.part_names = accelerator, part_names
        self.sums = torch.zeros(3 + len(part_names), device=accelerator.device)  # loss, errors, samples, parts

    def add(self, loss, logits, labels, parts):
        wrong = (logits.detach().argmax(dim=1) != labels).sum()
        self.sums[0] += loss.detach() * len(labels)
        self.sums[1] += wrong
        self.sums[2] += len(labels)
        self.sums[3:].add_(parts, alpha=len(labels))

    def total(self, where: str) -> list[float]:
        """The sums over all ranks (all ranks call it together); raises Diverged where the loss is not finite."""
        sums = self.accelerator.reduce(self.sums, "sum").tolist()
        if not math.isfinite(sums[0]):
            raise Diverged(f"the loss is {sums[0]} at {where}")
        return sums

    def read(self, progress: Progress, where: str) -> dict[str, float]:
        """Add the sums over all ranks to `progress` and start anew (all ranks call it together).

        Returns the mean `loss`, the `error` in % and the mean of each part.
        """
        loss, errors, samples, *parts = self.total(where)
        self.sums.zero_()
        progress.loss_sum += loss
        progress.error_sum += errors
        progress.num_seen += samples
        means = [loss, 100.0 * errors, *parts]
        names = ("loss", "error", *self.part_names)
        return {name: mean / max(samples, 1) for name, mean in zip(names, means, strict=True)}


class Clock:
    """Adds the time since it last looked to a run's seconds, which survive a resume."""

    def __init__(self):
        self.last = time.perf_counter()

    def update(self, progress: Progress):
        now = time.perf_counter()
        progress.seconds += now - self.last
        progress.epoch_seconds += now - self.last
        self.last = now


class StopSignals:
    """While active, SIGINT, SIGTERM and SIGUSR1 are noted, not obeyed; a second SIGINT is obeyed."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self):
        self.received = 0
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def _note(self, number, frame):
        # A launcher may pass on a Ctrl-C that the terminal has sent already: the second one counts a moment later.
        if self.received and number == signal.SIGINT and time.monotonic() - self.at > 2:
            raise KeyboardInterrupt
        self.received, self.at = number, time.monotonic()

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def obey(self, number: int):
        """End as the signal asks."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


def cpu_copy(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's state dict in the CPU's memory."""
    return {name: tensor.detach().cpu().clone() for name, tensor in contiguous_state(model).items()}


def write_result(run_dir: Path, of_last: Predictions, of_best: Predictions, values: dict):
    """Write predictions and, last of all, result.json, which says that the run is finished."""
    of_last.write(run_dir / "predictions.parquet")
    of_best.write(run_dir / "best" / "predictions.parquet")
    write_atomic(
        run_dir / "result.json", json.dumps(without_nan(values), indent=1, ensure_ascii=False, allow_nan=False)
    )


def environment(device: torch.device) -> dict:
    """Versions of what matters and the hardware, for result.json."""
    packages = ("pskd_timm", "torch", "torchvision", "timm", "accelerate", "datasets")
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "hardware": {
            "device": device.type,
            "name": hardware,
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }
