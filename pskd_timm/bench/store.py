"""The prediction store beside the way of PS-KD's released code, over several processes."""

import multiprocessing
import tempfile
import time

import torch
import torch.distributed as dist

from .. import order
from ..errors import InputError
from ..progress import readable
from ..store import PredictionStore, store_bytes
from . import rounds

TITLE = "the prediction store (float16) beside two all-gathers and a float32 table a process (batch 128)"
OPTIONS = ("sizes", "processes")


def parse_size(text: str) -> tuple[int, int]:
    """`50000x100` as (50000, 100): samples and classes."""
    try:
        num_samples, num_classes = (int(part) for part in text.lower().split("x"))
        if num_samples < 128 or num_classes < 2:
            raise ValueError
    except ValueError:
        raise InputError(
            f"--sizes: {text!r} should be SAMPLESxCLASSES, as in 50000x100 (128 samples at least)"
        ) from None
    return num_samples, num_classes


def measure(say, sizes=((50_000, 100), (300_000, 1_000)), processes=(1, 2, 4), batch_size=128, steps=100) -> list[dict]:
    """A row for each size (N, K) and number of processes.

    Seconds are those of the slowest process, bytes those of the largest. `resident` is what the store added to a process's
    resident memory, `peak` the most it added for a moment, `formula` what it should hold. Checkout and checkin are those of
    a later epoch than the first, which also takes its memory from the system (`first_checkout_seconds`). The released way
    keeps a float32 table in every process and gathers and writes it row by row; its epoch is extrapolated from `steps`
    steps, and its memory is computed where the tables of all processes do not fit into this machine (`measured` is False).
    """
    rows = []
    for num_samples, num_classes in sizes:
        for world_size in processes:
            row = {"num_samples": num_samples, "num_classes": num_classes, "processes": world_size}
            table_bytes, free = num_samples * num_classes * 4, rounds.free_bytes()
            if table_bytes > free:
                what = f"{num_samples}x{num_classes} takes {table_bytes / 1e9:,.1f} GB"
                raise InputError(f"--sizes: {what}, this machine has {free / 1e9:,.1f} free")
            fits = 1.5 * world_size * table_bytes < free
            row |= _over_processes(world_size, (num_samples, num_classes, batch_size, steps, fits))
            row["formula_bytes"] = store_bytes(num_samples, num_classes, "float16", world_size)
            row["epoch_seconds"] = row["checkout_seconds"] + row["checkin_seconds"]
            row["epoch_seconds"] += row["step_seconds"] * (num_samples / batch_size)
            row["released_measured"] = fits
            if not fits:
                row["released_resident_bytes"] = table_bytes
            row["released_epoch_seconds"] = row["released_step_seconds"] * (num_samples / batch_size)
            row["ratio"] = row["epoch_seconds"] / row["released_epoch_seconds"]
            rows.append(row)
            say(_line(row))
    return rows


def _line(row: dict) -> str:
    size = {key: readable(value) for key, value in row.items() if key.endswith("_bytes")}
    return (
        f"  {row['num_samples']:>9,} × {row['num_classes']:<5,} W {row['processes']} | "
        f"resident {size['resident_bytes']}, peak {size['peak_bytes']}, formula {size['formula_bytes']} | "
        f"checkout {row['checkout_seconds']:.2f} s, checkin {row['checkin_seconds']:.2f} s, "
        f"step {1e3 * row['step_seconds']:.2f} ms, epoch {row['epoch_seconds']:.2f} s | released way: "
        f"{size['released_resident_bytes']}{'' if row['released_measured'] else ' (computed)'}, "
        f"step {1e3 * row['released_step_seconds']:.2f} ms, epoch {row['released_epoch_seconds']:.1f} s (extrapolated) | "
        f"ours / theirs {row['ratio']:.3f}"
    )


def _over_processes(world_size: int, arguments: tuple) -> dict[str, float]:
    """Both ways in so many connected processes: the largest of each figure."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        meeting = f"file://{folder}/meeting"
        workers = [
            context.Process(target=_worker, args=(rank, world_size, meeting, arguments, results))
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failed := [worker.exitcode for worker in workers if worker.exitcode]:
            raise RuntimeError(f"a measuring process ended with exit code {failed[0]}")
        found = [results.get() for _ in workers]
    return {key: max(one[key] for one in found) for key in found[0]}


def _worker(rank: int, world_size: int, meeting: str, arguments: tuple, results):
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    *shape, whole = arguments
    ours = _measure_store(rank, world_size, *shape)
    released = _measure_released(rank, world_size, *shape, whole)
    results.put(ours | {f"released_{key}": value for key, value in released.items()})
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def _measure_store(rank: int, world_size: int, num_samples: int, num_classes: int, batch_size: int, steps: int) -> dict:
    batches = order.rank_batches(order.epoch_order(num_samples, 0, 0), batch_size, rank, world_size)
    mine = torch.cat(batches)
    labels = torch.zeros(len(batches[0]), dtype=torch.int64)
    predictions = torch.rand(len(batches[0]), num_classes).softmax(1)

    def step(table, index):
        table.read(index, labels[: len(index)])
        table.write(index, predictions[: len(index)])

    # The first use of anything takes time and memory of its own.
    small = PredictionStore(batch_size, num_classes)
    small.checkout(torch.arange(batch_size))
    step(small, torch.arange(len(labels)))
    small.checkin()
    before, before_all = rounds.memory("RssAnon"), rounds.memory("VmRSS")
    rounds.forget_peak()
    table = PredictionStore(num_samples, num_classes)
    first_checkout_seconds = _timed(lambda: table.checkout(mine))
    resident = rounds.memory("RssAnon") - before
    table.checkin()
    checkout_seconds = _timed(lambda: table.checkout(mine))
    step_seconds = _timed(lambda: [step(table, index) for index in batches[:steps]]) / min(steps, len(batches))
    checkin_seconds = _timed(table.checkin)
    return {
        "resident_bytes": resident,
        "peak_bytes": rounds.memory("VmHWM") - before_all,
        "first_checkout_seconds": first_checkout_seconds,
        "checkout_seconds": checkout_seconds,
        "checkin_seconds": checkin_seconds,
        "step_seconds": step_seconds,
    }


def _measure_released(
    rank: int, world_size: int, num_samples: int, num_classes: int, batch_size: int, steps: int, whole: bool
) -> dict:
    batches = order.rank_batches(order.epoch_order(num_samples, 0, 0), batch_size, rank, world_size)[:steps]
    # Shares of one batch may differ by a row, which an all-gather does not take.
    rows = batch_size // world_size
    batches = [index[:rows] for index in batches if len(index) >= rows]
    before = rounds.memory("RssAnon")
    table = torch.zeros(num_samples, num_classes)
    if whole:
        table.fill_(1.0 / num_classes)
    resident = rounds.memory("RssAnon") - before
    predictions = torch.rand(rows, num_classes).softmax(1)

    def gather(mine):
        if world_size == 1:
            return mine
        parts = [torch.ones_like(mine) for _ in range(world_size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts)

    def step(index):
        table[index]
        all_predictions, all_indices = gather(predictions), gather(index)
        for j in range(len(all_predictions)):
            table[all_indices[j]] = all_predictions[j].detach()

    step(batches[0])
    return {
        "resident_bytes": resident,
        "step_seconds": _timed(lambda: [step(index) for index in batches]) / len(batches),
    }


def _timed(work) -> float:
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    work()
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter() - start
