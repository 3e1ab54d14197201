"""One detection run, from top to bottom: build, resume, epochs of batches, evaluate, log, save."""

import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import ranks, rng
from ..errors import Diverged, InputError
from ..files import write_atomic
from ..metrics import Metric
from ..models.build import contiguous_state
from ..optim import given_in_vain, grad_norm, lr_at, make_optimizer
from ..order import epoch_order, even_slice, num_batches, rank_batches
from ..progress import Display
from ..run import checkpoint, folder
from ..run.checkpoint import Progress, TrainState
from ..run.launch import connect, forget_single_process
from ..run.meters import Clock, RunningMeans
from ..run.outputs import better, describe_machine, write_result
from ..run.result import Result
from ..run.stopping import SaveSchedule, StopSignals, resumes
from ..run.tracking import Tracker
from .data import DetectionData, Example, examples, open_data
from .evaluation import detect
from .metrics import METRICS, objects_table, score
from .mistakes import write_mistakes
from .network import detector_on, make_backbone, save_description
from .outcomes import write_found
from .settings import DetectionRecipe

STEP = 31  # stream of random numbers: what a step draws (which anchors and proposals are trained on, the short side)
LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")  # torchvision's names


class Tracked:
    """What the tracker asks of a task."""

    metrics: tuple[Metric, ...] = METRICS
    counts = "images"


@forget_single_process()
def train_detector(recipe: DetectionRecipe, *, display: Display | None = None) -> Result:
    """Train as `recipe` says, or resume the run in its folder, and return the result.

    Raises InputError for bad input, Diverged where the loss ends up not finite, and after a checkpoint KeyboardInterrupt
    where SIGINT, SystemExit(128 + number) where SIGTERM or SIGUSR1 asks the run to stop.
    """
    accelerator = connect(recipe)
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    is_main = accelerator.is_main_process
    display = (display or Display()) if is_main else Display(quiet=True)
    run_dir = recipe.run_dir
    if ranks.on_main(lambda: folder.is_finished(recipe)):
        finished = Result(run_dir, folder.read_result(run_dir))
        display.say(f"{run_dir}: already finished; --resume never deletes the run and trains it from scratch")
        return finished

    # Build. Nothing is written before all of it stands; the backbone comes first, for data take minutes to be read.
    torch.manual_seed(recipe.seed)
    backbone = make_backbone(recipe.model)
    data = open_data(recipe.data)
    truths = objects_table(data.test.objects)
    steps = num_batches(len(data.train), recipe.batch_size, world_size)
    if not steps:
        raise InputError(f"data.train: {len(data.train)} pictures are fewer than the {world_size} processes")
    detector = detector_on(backbone, recipe.model, len(data.class_names)).to(device)
    if recipe.model.sync_bn:
        detector = torch.nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    torch.backends.cudnn.benchmark = False  # pictures differ in size
    optimizer = make_optimizer(detector, recipe.optim)
    model, optimizer = accelerator.prepare(detector, optimizer)
    model.broadcast_buffers = False  # they are brought together where they matter: before an evaluation
    means = RunningMeans(accelerator, LOSSES)
    progress = Progress()
    state = TrainState(detector, None, optimizer, accelerator.scaler, None, means.sums, data.fingerprint)

    def forward_backward(pictures: list[Example], weight: float):
        with accelerator.autocast():
            losses = model(*_on_device(pictures, device))
        parts = torch.stack([losses[name] for name in LOSSES])
        loss = parts.sum()
        accelerator.backward(loss * weight)
        means.add_loss(loss, len(pictures), parts.detach())

    def evaluate():
        detections = detect(detector, data.test, recipe, device, display.advance)
        return detections, score(detections, truths, len(data.class_names))

    def save() -> bool:
        clock.update(progress)
        means.total(f"epoch {progress.epoch + 1}, step {progress.step}")
        saved = checkpoint.save(run_dir, progress, state, recipe.checkpoint.keep, before_commit=tracker.sync)
        schedule.saved_at = time.monotonic()
        return saved

    schedule = SaveSchedule(recipe.checkpoint, recipe.tracking.log_every)
    clock = Clock()
    lock = folder.run_lock(run_dir)
    ranks.on_main(lambda: folder.prepare(recipe, lock))
    tracker = Tracker(accelerator, recipe, Tracked(), steps, display.quiet)
    with (
        folder.released(lock),
        ranks.named_errors(),
        advice(recipe),
        tracker,
        display,
        StopSignals(display.later) as stop,
    ):
        for line in given_in_vain(recipe):
            display.say(line)
        # Resume.
        if newest := checkpoint.newest_whole(run_dir):
            progress = checkpoint.load(newest, state)
            display.say(f"{run_dir}: resuming after epoch {progress.epoch}, step {progress.step} of {steps}")
        tracker.forget_after(progress.epoch, progress.step)
        done = progress.epoch * steps + progress.step
        display.begin(f"{recipe.method} seed {recipe.seed}", recipe.epochs, steps, done, METRICS, Tracked.counts)
        found = None
        for epoch in range(progress.epoch, recipe.epochs):
            batches = rank_batches(
                epoch_order(len(data.train), recipe.seed, epoch), recipe.batch_size, rank, world_size
            )[progress.step :]
            detector.train()
            for pictures in examples(data.train, batches, epoch, recipe.data.workers, recipe.data.hflip, recipe.seed):
                step = epoch * steps + progress.step
                global_size = min(recipe.batch_size, len(data.train) - progress.step * recipe.batch_size)
                # What is drawn of anchors and proposals comes from torch's generator: a resumed run draws the same.
                torch.manual_seed(rng.derive_key(recipe.seed, STEP, step, rank))
                lr = lr_at(step, steps, recipe.epochs, recipe.optim)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                micro_batches = split(pictures, recipe.grad_accum_steps)
                for micro_batch in micro_batches:
                    # DDP averages over ranks; the weight makes of uneven shares the mean over the global batch.
                    weight = len(micro_batch) * world_size / global_size
                    with nullcontext() if micro_batch is micro_batches[-1] else accelerator.no_sync(model):
                        forward_backward(micro_batch, weight)
                to_log = (step + 1) % recipe.tracking.log_every == 0
                if recipe.optim.clip_grad_norm:
                    norm = accelerator.clip_grad_norm_(model.parameters(), recipe.optim.clip_grad_norm)
                elif to_log:
                    accelerator.unscale_gradients(optimizer)
                    norm = grad_norm(model.parameters())
                optimizer.step()
                optimizer.zero_grad()
                progress.step += 1
                if to_log:
                    now = means.read(progress, f"epoch {epoch + 1}, step {progress.step}")
                    del now["error"]
                    line = {"epoch": epoch + 1, **now, "lr": lr, "grad_norm": norm.item()}
                    tracker.log_step(step + 1, line)
                    display.step(epoch + 1, progress.step, progress.num_seen, line)
                if progress.step < steps:
                    due = schedule.after(step + 1, stop.received)
                    if due.save or due.signal:
                        saved = save()
                    if due.signal:
                        display.say(
                            f"{run_dir}: stopped in epoch {epoch + 1} after step {progress.step}; "
                            f"{resumes(recipe.resume, saved)}"
                        )
                        stop.obey(due.signal)
            means.read(progress, f"epoch {epoch + 1}")
            clock.update(progress)
            line = {
                "epoch": epoch + 1,
                "lr": lr_at((epoch + 1) * steps - 1, steps, recipe.epochs, recipe.optim),
                "train_loss": progress.loss_sum / progress.num_seen,
                "images_per_second": progress.num_seen / progress.epoch_seconds,
            }
            is_last = epoch + 1 == recipe.epochs
            if is_last or (epoch + 1) % recipe.evaluate_every == 0:
                found = evaluate()
                figures = found[1].figures
                if progress.best is None or better(METRICS[0], figures, progress.best):
                    progress.best = {"epoch": epoch + 1, **figures}
                    state.keep_best()
                clock.update(progress)
                line |= {"evaluated_on": "test", **figures, "seconds": progress.seconds}
                display.epoch(line)
                tracker.log_epoch((epoch + 1) * steps, line)

            # Log and save.
            progress.start_epoch(epoch + 1)
            due = schedule.after((epoch + 1) * steps, stop.received, epoch_end=True)
            if is_last or due.save or due.signal or progress.epoch % recipe.checkpoint.every_epochs == 0:
                saved = save()
            if due.signal:
                display.say(f"{run_dir}: stopped after epoch {progress.epoch}; {resumes(recipe.resume, saved)}")
                stop.obey(due.signal)

        # The result: the last epoch's detections; result.json, written last, says that the run is finished.
        detections, scores = found or evaluate()
        clock.update(progress)
        if is_main:
            write_weights(run_dir, recipe, detector, state.best)
            write_found(run_dir, data.test.names, detections, truths, scores)
            write_mistakes(run_dir, data.test, detections, truths, scores)
            write_result(run_dir, run_result(recipe, data, detector, scores, progress, world_size, device))
        accelerator.wait_for_everyone()
    return Result(run_dir, folder.read_result(run_dir))


def _on_device(pictures: list[Example], device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images and targets as torchvision's detectors take them."""
    images = [picture.image.to(device, non_blocking=True) for picture in pictures]
    return images, [{"boxes": picture.boxes.to(device), "labels": picture.labels.to(device)} for picture in pictures]


def split(pictures: list[Example], parts: int) -> list[list[Example]]:
    """The pictures of a step in at most `parts` contiguous parts, none of them empty."""
    count = min(parts, len(pictures))
    return [pictures[even_slice(len(pictures), part, count)] for part in range(count)]


@contextmanager
def advice(recipe: DetectionRecipe):
    """Say of a loss that is not finite what to lower."""
    try:
        yield
    except Diverged as error:
        optim = recipe.optim
        raise Diverged(
            f"{error}: lower --optim.lr (it is {optim.lr:g}), lengthen --optim.warmup_epochs ({optim.warmup_epochs:g}) or "
            f"clip shorter with --optim.clip_grad_norm ({optim.clip_grad_norm})"
        ) from None


def write_weights(run_dir: Path, recipe: DetectionRecipe, detector, best: dict[str, Tensor]):
    """Write the last epoch's weights, the best epoch's into best/, and beside them what the backbone is built from."""
    from safetensors.torch import save as encode

    for place, weights in ((run_dir, contiguous_state(detector)), (run_dir / "best", best)):
        place.mkdir(exist_ok=True)
        write_atomic(place / "model.safetensors", encode(weights))
    save_description(recipe.model, detector, run_dir / "backbone")


def run_result(recipe: DetectionRecipe, data: DetectionData, detector, scores, progress, world_size, device) -> dict:
    """What result.json says of a run."""
    num_objects = np.bincount(
        np.concatenate([objects.easy().labels for objects in data.test.objects]), minlength=len(data.class_names)
    )
    return {
        "name": recipe.name,
        "task": recipe.task,
        "method": recipe.method,
        "seed": recipe.seed,
        "metrics": [metric._asdict() for metric in METRICS],
        "evaluated_on": "test",
        "last": {"epoch": recipe.epochs, **scores.figures},
        "best": {**progress.best, "chosen_on": "test"},
        "ap_per_class": dict(zip(data.class_names, (100.0 * scores.per_class).tolist(), strict=True)),
        "seconds": progress.seconds,
        "num_train": len(data.train),
        "num_test": len(data.test),
        "num_holdout": 0,
        "num_classes": len(data.class_names),
        "class_names": data.class_names,
        "data_fingerprint": data.fingerprint,
        "num_objects": dict(zip(data.class_names, num_objects.tolist(), strict=True)),
        "num_parameters": sum(weights.numel() for weights in detector.parameters()),
        "num_processes": world_size,
        **describe_machine(device),
    }
