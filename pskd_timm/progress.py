"""What a run tells the person who waits: a bar where there is a terminal, plain lines where there is none."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Display:
    """Shows one run; `quiet` shows nothing but what must be said."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and not quiet
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        self.bars = Bars(*columns, console=self.console, transient=True)
        self.tasks = {}
        self.last_line = 0.0

    def say(self, text: str):
        """A line that stays."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def advance(self, what: str, done: int, total: int, facts: str = ""):
        """`done` of `total` of `what`: a bar, or without a terminal a line every ten seconds."""
        if self.live:
            self._bar(what, done, total, facts)
        elif not self.quiet and time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            self.say(f"{what}: {done}/{total} {facts}".rstrip())

    def _bar(self, what: str, done: int, total: int, facts: str):
        self.bars.start()
        if what not in self.tasks:
            for task in self.tasks.values():
                self.bars.remove_task(task)
            self.tasks = {what: self.bars.add_task(what, total=total, facts=facts)}
        self.bars.update(self.tasks[what], completed=done, facts=facts)

    def close(self):
        """Take the bars off the terminal."""
        if self.live:
            self.bars.stop()


def readable(count: float) -> str:
    """`count` bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
