"""When a run saves and when it stops: by steps, by minutes, by a signal."""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from .. import ranks
from ..recipe import Checkpoint


def resumes(resume: str, saved: bool) -> str:
    """How a stopped run of that `resume` setting goes on, whose last state was `saved` or could not be."""
    command = "the same command (without --resume never)" if resume == "never" else "the same command"
    return f"{command} resumes it from {'there' if saved else 'its last checkpoint, if there is one'}"


@dataclass
class Due:
    """What a run has to do after a step, the same on every rank: save, and stop for `signal` (0: go on)."""

    save: bool = False
    signal: int = 0


class SaveSchedule:
    """When a run is to save or to stop: by steps, by minutes, or by a signal.

    A step count is the same on every rank. A clock and a signal are not, so several ranks speak of them only every
    `meet_every` steps and at the end of an epoch.
    """

    def __init__(self, section: Checkpoint, meet_every: int):
        self.section, self.meet_every = section, meet_every
        self.saved_at = time.monotonic()

    def after(self, steps: int, signal: int, epoch_end: bool = False) -> Due:
        """What to do after `steps` steps of the run, where this rank has got `signal` (0: none)."""
        save = bool(self.section.every_steps) and steps % self.section.every_steps == 0
        if epoch_end or ranks.rank_and_world_size()[1] == 1 or steps % self.meet_every == 0:
            minutes = (time.monotonic() - self.saved_at) / 60
            overdue = self.section.every_minutes is not None and minutes >= self.section.every_minutes
            overdue, signal = map(int, ranks.largest([float(overdue), float(signal)]))
            return Due(save or bool(overdue), signal)
        return Due(save)


class StopSignals:
    """While active, SIGINT, SIGTERM and SIGUSR1 are noted, which `say` is told of, not obeyed; a second SIGINT is obeyed."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, say: Callable[[str], None]):
        self.say = say

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
        if not self.received:  # where it comes while the test images are scored, the end of that may be far
            self.say("stopping once this step or evaluation is done and saved; Ctrl-C (once more) ends the run at once")
        self.received, self.at = number, time.monotonic()

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def obey(self, number: int):
        """End as the signal asks."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt("interrupted")  # what was saved is said already
        raise SystemExit(128 + number)
