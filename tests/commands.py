"""Commands in processes of their own, which are forked from one that has the slow imports done.

What they are given (words, environment, folder), their output and their exit code are those of `python -m pskd_timm`; only the
interpreter's start is left out. Tests of start-up, imports, launchers and Ctrl-C in imports start a real one.
"""

import io
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

# Seconds that anything may take: what does not end at all fails, what a busy machine holds up does not.
LIMIT = 900


def forkserver():
    """The context whose processes have torch, timm and the package's slow imports from their first moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pskd_timm.training", "pskd_timm.tasks.images", "pskd_timm.tasks.translation", "datasets"]
    )
    return context


class Done(NamedTuple):
    """What has become of a command."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """The module (`pskd_timm`) or script `name` with `words`, running. Without `error` stderr goes where stdout does."""

    def __init__(self, name, *words, cwd=None, env=None, error=True):
        self.folder = Path(tempfile.mkdtemp())
        self.output, self.errors = self.folder / "stdout", self.folder / ("stderr" if error else "stdout")
        environment, place = dict(os.environ if env is None else env), str(cwd or os.getcwd())
        given = str(name), [str(word) for word in words], place, environment, str(self.output), str(self.errors)
        self.process = forkserver().Process(target=_run, args=given)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def stdout(self) -> str:
        """What it has said so far."""
        return self.output.read_text() if self.output.is_file() else ""

    def wait(self) -> Done:
        """Its end, however long that takes."""
        self.process.join(LIMIT)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"{self.stdout()[-3000:]}\nhas not ended after {LIMIT} seconds")
        return Done(self.process.exitcode, self.output.read_text(), self.errors.read_text())


def _run(name: str, words: list[str], cwd: str, environment: dict[str, str], output: str, errors: str):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    sys.argv = [name, *words]
    if name.endswith(".py"):
        sys.path.insert(0, str(Path(name).parent))
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def cli(*words, **options) -> Done:
    """`pskd-timm` with `words`, to its end."""
    return Command("pskd_timm", *words, **options).wait()


def here(*words) -> Done:
    """`pskd-timm` with `words` in this very process, whose own processes then are forked too."""
    from pskd_timm.cli import main

    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        code = main([str(word) for word in words])
    return Done(code, output.getvalue(), errors.getvalue())


def writers(path: Path) -> list[int]:
    """The processes that have the file `path` as their output."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):  # it has ended meanwhile
            if os.readlink(output) == str(path):
                found.append(int(output.parts[2]))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def told_by_launcher(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment variables that a launcher gives a process; none where there is but one."""
    if world_size == 1:
        return {}
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {key: str(value) for key, value in ours.items()}


def together(world_size: int, name, *words) -> list[Done]:
    """A module or script on `world_size` processes, each to its end; all have to succeed."""
    port = free_port()
    given = [os.environ | told_by_launcher(rank, world_size, port) for rank in range(world_size)]
    done = [command.wait() for command in [Command(name, *words, env=env) for env in given]]
    assert all(each.returncode == 0 for each in done), "\n".join((each.stdout + each.stderr)[-2000:] for each in done)
    return done


def wait_until(reached: Callable[[], bool], *working, every: float = 0.02):
    """Until `reached()`, asked `every` so many seconds, while all that are `working` (commands or processes) do so."""
    deadline = time.monotonic() + LIMIT
    while not reached():
        assert time.monotonic() < deadline, f"not reached in {LIMIT} seconds"
        for each in working:
            assert each.is_alive(), each.stdout()[-3000:] if isinstance(each, Command) else "a process has ended"
        time.sleep(every)
