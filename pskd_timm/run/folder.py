"""A run's folder without torch: its lock, whether it is finished, making, reading and deleting it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from ..errors import InputError, reason
from ..files import write_atomic
from ..metrics import METRICS, Metric
from ..recipe import Recipe
from ..recipe_files import load_recipe
from ..section import Section
from .result import RunResult

LOCK = ".lock"  # file that is locked while a process is at work on the run
LOG = "run.log"  # what a run prints that `compare` started
DELETED = "deleted"  # folder of checkpoints that are being deleted
# In place of what result.json did not say in earlier versions.
EARLIER = {
    "task": "images",
    "evaluated_on": "test",
    "num_holdout": 0,
    "metrics": [metric._asdict() for metric in METRICS.values()],
}


def read_recipe(run_dir: Path, overrides: dict | None = None, kind: type[Section] = Recipe) -> Section:
    """The resolved recipe of a run. Raises InputError where the folder holds no run."""
    if not (run_dir / "recipe.yaml").is_file():
        why = "no run here (a run folder has a recipe.yaml)" if run_dir.is_dir() else "there is no such folder"
        raise InputError(f"{run_dir}: {why}")
    return load_recipe(str(run_dir / "recipe.yaml"), overrides, kind)


def task_of(run_dir: Path) -> str:
    """The task that a run's recipe.yaml, or else its result.json, names; `images` where neither does or can be read."""
    for name in ("recipe.yaml", "result.json"):
        try:
            values = yaml.safe_load((run_dir / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(values, dict) and "task" in values:
            return str(values["task"])
    return "images"


def read_result(run_dir: Path) -> RunResult:
    """What a finished run's result.json holds. Raises InputError where there is none, or a damaged one."""
    path = run_dir / "result.json"
    if not path.is_file():
        raise InputError(f"{run_dir}: the run is not finished (no result.json); the same train command resumes it")
    try:
        values = EARLIER | json.loads(path.read_text(encoding="utf-8"))
        values["last"], values["best"]  # noqa: B018 (what a result is for)
        return values
    except KeyError as error:
        raise InputError(f"{path}: damaged: it has no {error}; {how_to_mend(run_dir)}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged: {error}; {how_to_mend(run_dir)}") from None


def how_to_mend(run_dir: Path) -> str:
    """What brings back a finished run's damaged files."""
    if checkpoints(run_dir):
        return "without result.json the same train command writes the run's files again from its last checkpoint"
    return "--resume never deletes the run and trains it from scratch"


def read_metrics(result: RunResult) -> list[Metric]:
    """The metrics of a finished run, the one that chose its best epoch first."""
    return [Metric(**metric) for metric in result["metrics"]]


def is_finished(recipe: Recipe) -> bool:
    """Whether the run folder holds this recipe's result. Raises InputError where it holds another recipe's run."""
    run_dir = recipe.run_dir
    if recipe.resume == "never" or not (run_dir / "recipe.yaml").is_file():
        return False
    there, here = read_recipe(run_dir, kind=type(recipe)).identity(), recipe.identity()
    different = [key for key in here if there.get(key) != here[key]]
    if different and (checkpoints(run_dir) or (run_dir / "result.json").is_file()):
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


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoints, the newest last; nothing of them is checked."""
    return sorted((run_dir / "checkpoints").glob("[0-9]*-[0-9]*"))


def own_checkpoint(recipe: Recipe, since: float) -> Path | None:
    """The newest checkpoint of a run that was started at `since` (seconds as of time.time()); None where it has none yet.

    Those that `resume: never` has not deleted so far are another run's.
    """
    if recipe.resume == "never" and not is_renewed(recipe, since):
        return None
    return next(iter(checkpoints(recipe.run_dir)[-1:]), None)


def is_renewed(recipe: Recipe, since: float) -> bool:
    """Whether a run that was started at `since` has begun its folder; before that, another run's lies there or nothing."""
    written = recipe.run_dir / "recipe.yaml"  # by `prepare`, after it has deleted
    return written.is_file() and written.stat().st_mtime >= since


def run_lock(run_dir: Path) -> FileLock:
    """The lock of the process that is at work on a run, which may take it more than once."""
    return FileLock(run_dir / LOCK, is_singleton=True)


@contextmanager
def released(lock: FileLock) -> Iterator[None]:
    """Releases `lock` at the end: a notebook keeps what an error has seen, the lock among it."""
    try:
        yield
    finally:
        lock.release()


def is_locked(run_dir: Path) -> bool:
    """Whether a process is at work on the run in a folder, which may not exist yet."""
    if not (run_dir / LOCK).is_file():
        return False
    try:
        with FileLock(run_dir / LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False  # a folder that cannot be written: the run says so itself


def prepare(recipe: Recipe, lock: FileLock):
    """Make the run folder, lock it for this process and write the resolved recipe into it.

    The lock ends with the process. With `resume: never` the run that is there is deleted.
    """
    run_dir = recipe.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1)  # compare takes it for an instant when it looks whether a run is free
        shutil.rmtree(run_dir / DELETED, ignore_errors=True)  # of a deletion that was interrupted
        if recipe.resume == "never" and (run_dir / "recipe.yaml").is_file():
            delete(run_dir)
        for left in [*run_dir.glob("*.partial"), *run_dir.glob("best/*.partial")]:  # by a process that was killed
            left.unlink()
        write_atomic(run_dir / "recipe.yaml", yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True))
    except Timeout:
        raise InputError(
            f"{run_dir}: another process is at work on this run: wait for it, or choose another --output_dir"
        ) from None
    except OSError as error:
        raise InputError(f"output_dir: {run_dir} cannot be written: {reason(error)}") from None


def delete(run_dir: Path):
    """Delete a run but for its lock and log; result.json goes first and recipe.yaml last, so no part of it looks whole.

    The checkpoints go all at once: half of one would have to be called damaged.
    """
    (run_dir / "result.json").unlink(missing_ok=True)
    if (run_dir / "checkpoints").is_dir():
        (run_dir / "checkpoints").rename(run_dir / DELETED)
    for path in run_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (LOCK, LOG, "recipe.yaml"):
            path.unlink()
    (run_dir / "recipe.yaml").unlink()
