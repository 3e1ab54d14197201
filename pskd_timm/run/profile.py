"""Where a run's time goes: torch's profiler over some of its steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import profiler

from ..files import write_atomic

SKIPPED = 20  # the first steps allocate, choose algorithms, compile and record
WARMUP = 3  # under the profiler but not kept: its own start takes time
LINES = 30


@contextmanager
def profiled(folder: Path, steps: int, say: Callable[[str], None]) -> Iterator[profiler.profile | None]:
    """Profile `steps` training steps after the first 23; with 0 steps nothing is done, and given None.

    Call `step()` of what is given after every training step. Into `folder` go `profile.txt`, the operations that take most
    time, and `profile.json.gz`, the timeline, for ui.perfetto.dev.
    """
    if not steps:
        yield None
        return

    def write(profile: profiler.profile):
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=LINES, max_name_column_width=60)
        write_atomic(folder / "profile.txt", f"{profile.step_num - SKIPPED - WARMUP} steps\n{table}")
        profile.export_chrome_trace(str(folder / "profile.json.gz"))
        say(f"{folder}: where the time of some steps went is in profile.txt and profile.json.gz (ui.perfetto.dev)")

    plan = profiler.schedule(wait=SKIPPED, warmup=WARMUP, active=steps, repeat=1)
    with profiler.profile(schedule=plan, on_trace_ready=write, acc_events=True) as profile:
        yield profile
    if profile.step_num <= SKIPPED + WARMUP:
        say(f"tracking.profile_steps: {profile.step_num} steps are too few, the first {SKIPPED + WARMUP} are left out")
