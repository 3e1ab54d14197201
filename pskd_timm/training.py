"""One run, from top to bottom: build, resume, epochs of batches, evaluate, log, save."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from timm.utils import ModelEmaV3

from . import ranks, rng
from .batch import Batch
from .errors import InputError
from .methods.build import build_method
from .optim import given_in_vain, grad_norm, lr_at, make_optimizer, slow_warmup
from .progress import Display
from .recipe import Recipe
from .recipe_files import as_recipe
from .run import checkpoint, folder
from .run.checkpoint import Progress, TrainState
from .run.graph import StepGraph, check_recordable
from .run.init_from import start_from
from .run.launch import connect, forget_single_process, place_network
from .run.meters import Clock, RunningMeans
from .run.mistakes import find_mistakes, write_mistakes
from .run.outputs import better, run_result, score_splits, write_result
from .run.profile import profiled
from .run.result import Result
from .run.stopping import SaveSchedule, StopSignals, resumes
from .run.tracking import Tracker
from .tasks import open_task

STEP = 11  # stream of random numbers: what a step draws (dropout)


@forget_single_process()
def train(
    recipe: Recipe | str | Path,
    overrides: dict | None = None,
    *,
    display: Display | None = None,
    callbacks: Sequence[Callable[[dict], None]] = (),
) -> Result:
    """Train as `recipe` says, or resume the run in its folder, and return the result.

    `recipe` is a Recipe, a recipe's file or the name of a shipped one; `overrides` replaces settings of it by dotted name.
    Each of `callbacks` is called, on every rank, with an epoch's line of metrics.jsonl once that epoch is logged and saved
    as the recipe says; what it raises ends the run, which can be resumed.

    Raises InputError for bad input, Diverged where the loss ends up not finite, and after a checkpoint KeyboardInterrupt
    where SIGINT, SystemExit(128 + number) where SIGTERM or SIGUSR1 asks the run to stop.

    Example:
        >>> train("digits", {"method": "pskd", "optim.lr": 0.05, "epochs": 5}).last["ece"]
    """
    recipe = as_recipe(recipe, overrides, callbacks=callbacks)
    if not all(map(callable, callbacks)):
        raise InputError("callbacks should be functions, each of one argument: an epoch's line of metrics.jsonl")
    recipe.check_method(recipe.method)
    accelerator = connect(recipe)
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    is_main = accelerator.is_main_process
    display = (display or Display()) if is_main else Display(quiet=True)
    run_dir = recipe.run_dir
    if ranks.on_main(lambda: folder.is_finished(recipe)):
        finished = Result(run_dir, folder.read_result(run_dir))
        display.say(f"{run_dir}: already finished; --resume never deletes the run and trains it from scratch")
        return finished

    # Build. Nothing is written before all of it stands. `network` has the weights, `model` is what a step calls.
    task = open_task(recipe, display.advance)
    network = task.network()
    task.check(network, world_size)
    network = place_network(network, recipe.model, device)
    ema = ModelEmaV3(network, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    method = build_method(recipe, task, network, device)
    loader = task.loader(network, device, rank, world_size, method.needs_partners)
    optimizer = make_optimizer(network, recipe.optim)
    model, optimizer = accelerator.prepare(network, optimizer)
    # Running statistics matter in evaluation only, and are brought together there (ranks.py): no step waits for them.
    model.broadcast_buffers = False
    means = RunningMeans(accelerator, method.term_names)
    progress = Progress()
    state = TrainState(
        network, ema, optimizer, accelerator.scaler, method.store, means.sums, task.fingerprint, method=method
    )
    scored_on, chosen_on = task.splits[0], task.splits[-1]  # the split reported; the one that chooses the best epoch

    def forward_backward(batch: Batch, weight: float):
        with accelerator.autocast():
            loss, logits = method.loss(model, batch)
        accelerator.backward(loss * weight)
        means.add(loss, logits, batch.labels, method.terms)

    recorded = recipe.model.compile == "graphs"
    if recorded:
        check_recordable(method)
        forward_backward = StepGraph(forward_backward, lambda: method.variant)

    schedule, clock = SaveSchedule(recipe.checkpoint, recipe.tracking.log_every), Clock()
    lock = folder.run_lock(run_dir)
    ranks.on_main(lambda: folder.prepare(recipe, lock))
    tracker = Tracker(accelerator, recipe, task, loader.steps, display.quiet)

    def save() -> bool:
        clock.update(progress)
        means.total(f"epoch {progress.epoch + 1}, step {progress.step}")
        saved = checkpoint.save(run_dir, progress, state, recipe.checkpoint.keep, before_commit=tracker.sync)
        schedule.saved_at = time.monotonic()
        return saved

    with folder.released(lock), ranks.named_errors(), tracker, display, closing(loader):
        if late := slow_warmup(recipe.optim, loader.steps, recipe.epochs):
            display.say(late)
        for line in given_in_vain(recipe):
            display.say(line)
        # Resume.
        if newest := checkpoint.newest_whole(run_dir):
            progress = checkpoint.load(newest, state)
            display.say(f"{run_dir}: resuming after epoch {progress.epoch}, step {progress.step} of {loader.steps}")
        elif recipe.init_from:
            progress = start_from(recipe.init_from, network, optimizer, method.store, recipe.epochs)
            if ema:
                ema.set(network)
            display.say(f"{run_dir}: starting from {recipe.init_from} after epoch {progress.epoch}")
        tracker.forget_after(progress.epoch, progress.step)
        first_epoch, done = progress.epoch, progress.epoch * loader.steps + progress.step
        display.begin(
            f"{recipe.method} seed {recipe.seed}", recipe.epochs, loader.steps, done, task.metrics, task.counts
        )
        if description := method.describe():
            display.say(description)

        profile_steps = recipe.tracking.profile_steps if is_main else 0
        with StopSignals(display.later) as stop, profiled(run_dir, profile_steps, display.say) as profile:
            for epoch in range(progress.epoch, recipe.epochs):
                batches = loader.rank_batches(epoch)[progress.step :]
                method.begin_epoch(epoch, loader.rows(batches))
                model.train()
                for micro_batches in loader.batches(batches, epoch, recipe.grad_accum_steps):
                    step = epoch * loader.steps + progress.step
                    # Dropout and the like draw from torch's generator: seeded here, a resumed run draws the same.
                    torch.manual_seed(rng.derive_key(recipe.seed, STEP, step, rank))
                    lr = lr_at(step, loader.steps, recipe.epochs, recipe.optim)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    for batch in micro_batches:
                        # DDP averages over ranks; the weight makes of uneven shares the mean over the global batch.
                        weight = len(batch.labels) * world_size / loader.global_size(epoch, progress.step)
                        with nullcontext() if batch is micro_batches[-1] else accelerator.no_sync(model):
                            forward_backward(batch, weight)
                    to_log = (step + 1) % recipe.tracking.log_every == 0
                    if recipe.optim.clip_grad_norm:
                        norm = accelerator.clip_grad_norm_(model.parameters(), recipe.optim.clip_grad_norm)
                    elif to_log:
                        accelerator.unscale_gradients(optimizer)
                        norm = grad_norm(model.parameters())
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=not recorded)  # a recording adds to the tensors it has seen
                    if ema:
                        ema.update(network, step + 1)
                    progress.step += 1
                    if profile:
                        profile.step()
                    if to_log:
                        now = means.read(progress, f"epoch {epoch + 1}, step {progress.step}")
                        line = {"epoch": epoch + 1, **now, "lr": lr, "grad_norm": norm.item(), **method.values()}
                        tracker.log_step(step + 1, line)
                        display.step(epoch + 1, progress.step, progress.num_seen, line)
                    if progress.step < loader.steps:
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
                line = {
                    "epoch": epoch + 1,
                    "lr": lr_at((epoch + 1) * loader.steps - 1, loader.steps, recipe.epochs, recipe.optim),
                    "train_loss": progress.loss_sum / progress.num_seen,
                    "train_error": 100.0 * progress.error_sum / progress.num_seen,
                    **method.values(),
                    **({"rows_renewed": loader.rows_renewed(epoch)} if method.store else {}),
                    "store_bytes": method.store.nbytes if method.store else 0,
                }
                clock.update(progress)
                targets_per_second = progress.num_seen / progress.epoch_seconds

                # Evaluate.
                try:
                    figures = task.evaluate(state.eval_network, chosen_on, progress=display.advance).score()
                except InputError:  # a damaged image: the epoch's training is not lost
                    if world_size == 1:
                        save()
                    raise
                method.end_epoch()
                if epoch == first_epoch and (described := method.describe()) != description:
                    display.say(described)  # the store's error is known after an epoch
                clock.update(progress)
                if progress.best is None or better(task.metrics[0], figures, progress.best):
                    progress.best = {"epoch": epoch + 1, **figures}
                    state.keep_best()

                # Log and save.
                line |= {"evaluated_on": chosen_on, **figures}
                line |= {f"{task.counts}_per_second": targets_per_second, "seconds": progress.seconds}
                tracker.log_epoch((epoch + 1) * loader.steps, line)
                display.epoch(line)
                progress.start_epoch(epoch + 1)
                is_last = progress.epoch == recipe.epochs
                due = schedule.after((epoch + 1) * loader.steps, stop.received, epoch_end=True)
                if is_last or due.save or due.signal or progress.epoch % recipe.checkpoint.every_epochs == 0:
                    saved = save()
                for callback in callbacks:
                    callback(line)
                if due.signal:
                    display.say(f"{run_dir}: stopped after epoch {progress.epoch}; {resumes(recipe.resume, saved)}")
                    stop.obey(due.signal)

        # The result: the last and the best epoch's weights over each part; result.json, written last, says it is finished.
        last = score_splits(task, state.eval_network, run_dir, display.advance)
        if is_main:
            task.save(state.eval_network, run_dir)
        state.put_back_best()
        best = score_splits(task, state.eval_network, run_dir / "best", display.advance)
        clock.update(progress)
        if is_main:
            task.save(state.eval_network, run_dir / "best")
            values = run_result(recipe, task, network, last, best, progress, world_size, device)
            mistakes = find_mistakes(last[scored_on], lambda rows: task.examples(scored_on, rows))
            tracker.log_result(values, last[scored_on], mistakes)
            write_mistakes(run_dir, mistakes)
            write_result(run_dir, values)
        accelerator.wait_for_everyone()
    return Result(run_dir, folder.read_result(run_dir))
