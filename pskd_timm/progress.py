"""What a run tells the person who waits: bars where there is a terminal, plain lines where there is none."""

import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from .metrics import Metric, format_metrics

WIDE = 140  # columns of a terminal that has room for everything
LINE_EVERY = 10.0  # seconds between two lines about the same work where there is no terminal


class Row(NamedTuple):
    """A bar: `done` of `total` of `what`, and what stands behind it."""

    what: str
    done: float
    total: float
    count: str


class Display:
    """Shows one run, or one comparison; `quiet` shows nothing."""

    def __init__(self, quiet: bool = False, file: TextIO | None = None):
        self.quiet = quiet
        self.console = Console(file=file or sys.stdout, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and not quiet
        self.bars = _Bars(console=self.console)
        self.tasks = {}
        self.last_line = time.monotonic()
        self.began = {}  # when each work was first heard of, and how much of it was done then
        self.training = None
        self.to_say = deque()

    def say(self, text: str):
        """A line that stays."""
        if not self.quiet:
            self._say_waiting()
            self.console.print(text, markup=False, emoji=False)
            self.last_line = time.monotonic()

    def _say_waiting(self):
        while self.to_say:
            self.console.print(self.to_say.popleft(), markup=False, emoji=False)

    def later(self, text: str):
        """A line before what is said or shown next: a signal's handler must not write while something else is written."""
        self.to_say.append(text)

    def advance(self, what: str, done: int, total: int):
        """`done` of `total` of `what`: a bar, or without a terminal a line every ten seconds."""
        left = self.left(what, done, total)
        self.show([Row(what, done, total, f"{done:,}/{total:,} {left}")], f"{what}: {done:,}/{total:,} {left}")

    def begin(self, name: str, epochs: int, steps: int, done: int, metrics: Sequence[Metric], counts: str):
        """Show the run `name` of so many epochs of so many steps, `done` of them done; `counts` is what is trained on."""
        shown = [metric for metric in metrics if metric.in_brief and not metric.only_at_end]
        self.training = _Training(name, epochs, steps, shown, counts)
        self.began[name] = (time.monotonic(), done)

    def step(self, epoch: int, step: int, num_seen: float, values: dict):
        """Step `step` of epoch `epoch` (both from 1) is done, `num_seen` targets of it seen; `values` is the line logged."""
        run = self.training
        total = run.epochs * run.steps
        done = (epoch - 1) * run.steps + step
        left = self.left(run.name, done, total)
        facts = [f"loss {values['loss']:.3f}"] + ([f"error {values['error']:.1f} %"] if "error" in values else [])
        facts += [f"α {values['alpha']:.2f}"] if "alpha" in values else []
        facts += [f"lr {values['lr']:.3g}", f"{run.per_second(epoch, num_seen):,.0f} {run.counts}/s"]
        count = f"step {step}/{run.steps} {left}"
        name = f"{run.name}, epoch {epoch}/{run.epochs}"
        self.show([Row(name, done, total, count)], f"{name}, {count}: {'  '.join(facts)}", "  ".join(facts))

    def epoch(self, line: dict):
        """An epoch's line of metrics.jsonl: a row of the table that grows above the bar, or a line with the same facts."""
        run = self.training
        left = self.left(run.name, line["epoch"] * run.steps, run.epochs * run.steps)
        if not self.live:
            self.say(run.words(line, left))
            return
        if not run.headed:
            self.console.print(run.header(line), style="bold", markup=False)
            run.headed = True
        self.say(run.row(line))
        run.per_second(line["epoch"] + 1, 0)  # the time of the evaluation is not the next steps'

    def show(self, rows: list[Row], line: str, below: str = ""):
        """`rows` as bars with `below` under them, or without a terminal `line` every ten seconds."""
        if not self.quiet:
            self._say_waiting()
        if self.live:
            self._draw(rows, below)
        elif not self.quiet and time.monotonic() - self.last_line > LINE_EVERY:
            self.say(line.rstrip())

    def _draw(self, rows: list[Row], below: str):
        self.bars.start()
        self.bars.below = below
        while len(self.tasks) > len(rows):
            self.bars.remove_task(self.tasks.pop(len(self.tasks) - 1))
        for i, (what, done, total, count) in enumerate(rows):
            if i not in self.tasks:
                self.tasks[i] = self.bars.add_task(what, count=count)
            self.bars.update(self.tasks[i], description=what, completed=done, total=total, count=count)

    def left(self, what: str, done: float, total: float) -> str:
        """The time that is left of `what`, at the pace it has had since it was first heard of."""
        now = time.monotonic()
        began, before = self.began.get(what, (now, done))
        if done <= before:  # heard of for the first time, or begun again
            self.began[what] = (now, done)
            return ""
        return f"{duration((now - began) / (done - before) * (total - done))} left"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Take the bars off the terminal."""
        if self.live:
            self.bars.stop()


class _Bars(Bars):
    """rich's bars with a line of text under them."""

    below = ""

    def __init__(self, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[count]}"))
        super().__init__(*columns, console=console, transient=True, expand=True)

    def get_renderables(self):
        yield self.make_tasks_table(self.tasks)
        if self.below:
            yield Text(self.below, style="dim", no_wrap=True, overflow="ellipsis")


class _Training:
    """The run that is trained: how long it is, and how its epochs look."""

    def __init__(self, name: str, epochs: int, steps: int, metrics: list[Metric], counts: str):
        self.name, self.epochs, self.steps, self.metrics, self.counts = name, epochs, steps, metrics, counts
        self.headed = False
        self.at, self.seen = time.monotonic(), (1, 0.0)

    def per_second(self, epoch: int, num_seen: float) -> float:
        """The pace since this was asked last, or since the epoch began."""
        now = time.monotonic()
        new = num_seen - (self.seen[1] if self.seen[0] == epoch else 0.0)
        pace = new / max(now - self.at, 1e-9)
        self.at, self.seen = now, (epoch, num_seen)
        return pace

    def words(self, line: dict, left: str) -> str:
        """An epoch in a line of words."""
        error = f"  error {line['train_error']:.2f} %" if "train_error" in line else ""
        alpha = f"  alpha {line['alpha']:.3f}" if "alpha" in line else ""
        return (
            f"{self.name}  epoch {line['epoch']}/{self.epochs}  loss {line['train_loss']:.3f}"
            f"{error}{alpha}  {line['evaluated_on']}: {format_metrics(line, self.metrics)}  "
            f"{line[f'{self.counts}_per_second']:,.0f} {self.counts}/s  {left}"
        ).rstrip()

    def header(self, line: dict) -> str:
        """The head of the table of epochs; with an image's metrics it fits 80 columns."""
        alpha = f"{'α':>5}" if "alpha" in line else ""
        pace = f"{self.counts}/s"
        error = f"{'error %':>8}" if "train_error" in line else ""
        return f"{'epoch':>6}{'loss':>7}{error}{alpha} │ {' '.join(self._heads(line))} │ {pace:>8}"

    def row(self, line: dict) -> str:
        """A row of the table of epochs."""
        alpha = f"{line['alpha']:>5.2f}" if "alpha" in line else ""
        error = f"{line['train_error']:>8.2f}" if "train_error" in line else ""
        values = [
            f"{metric.format(line[metric.name]):>{len(head)}}"
            for metric, head in zip(self.metrics, self._heads(line), strict=True)
        ]
        return (
            f"{line['epoch']:>6}{line['train_loss']:>7.3f}{error}{alpha} │ {' '.join(values)} │ "
            f"{line[f'{self.counts}_per_second']:>8,.0f}"
        )

    def _heads(self, line: dict) -> list[str]:
        first, *others = (metric.title for metric in self.metrics)
        return [f"{line['evaluated_on']} {first}", *(f"{title:>6}" for title in others)]


def duration(seconds: float) -> str:
    """`seconds` for people: 0:05, 12:34, 3:25:45."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def readable(count: float) -> str:
    """`count` bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
