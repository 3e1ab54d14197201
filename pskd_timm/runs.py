"""Run folders read back: which runs there are, how each ended, and its figures as frames."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .metrics import METRICS
from .recipe import METHOD_SECTIONS, InputError, Recipe, load_recipe
from .tracking import read_lines

COLUMNS = ["method", "seed", "status", *METRICS, "seconds", "best_epoch", *(f"best_{name}" for name in METRICS)]
OUTCOMES = ["index", "label", "prediction", "confidence", "correct", "nll"]
PREDICTIONS, HOLDOUT = "predictions.parquet", "holdout.parquet"
# Of the data section, what does not touch the test part.
_TRAINING_ONLY = {"limit_train", "holdout_fraction", "label_noise", "loading"}


@dataclass
class Run:
    """A run's folder, how it ended (`finished`, or why not), its recipe where it can be read and result.json's values.

    `shared` and `own` name the settings that set it apart from other runs: those of any method, and of its method.
    """

    folder: Path
    name: str
    seed: int
    status: str
    recipe: Recipe | None = None
    values: dict | None = None
    shared: str = ""
    own: str = ""

    @property
    def method(self) -> str:
        """The method's name, and after it what sets the run apart from others of that name."""
        return " ".join(word for word in (self.name, self.shared, self.own) if word)

    @property
    def baseline(self) -> str:
        """The `method` of the runs that this one is to be held against."""
        return f"baseline {self.shared}".rstrip()


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs in and below `paths`, by method and seed. Raises InputError where there are none, or unlike ones."""
    folders = {}
    for path in map(Path, paths):
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise InputError(f"{path} {what}: give run folders, or a folder that holds some (runs/digits)")
        found = list(_run_folders(path))
        if not found:
            raise InputError(f"{path}: no run here (a run folder has a recipe.yaml; a search's folder is named itself)")
        folders |= {folder.resolve(): folder for folder in found}
    runs = [read_run(folder) for folder in folders.values()]
    _check_same_test(runs)
    _tell_apart(runs)
    runs.sort(key=lambda run: (METHOD_SECTIONS.index(run.name), run.method, run.seed))
    for one, other in zip(runs, runs[1:], strict=False):
        if (one.method, one.seed) == (other.method, other.seed):
            raise InputError(f"{one.folder} and {other.folder} are the same run twice: leave one out")
    return runs


def _run_folders(path: Path):
    for folder, inside, files in os.walk(path):
        if "recipe.yaml" in files or "run.log" in files:
            inside.clear()
            yield Path(folder)
        # A search's trials are no part of the comparison beside it: its own folder has to be named.
        inside[:] = sorted(name for name in inside if not (Path(folder) / name / "search.json").is_file())


def read_run(folder: Path) -> Run:
    """The run in a folder. One that failed early has no more than the run.log that compare wrote."""
    name, number = folder.resolve().parent.name, re.fullmatch(r"seed(\d+)", folder.resolve().name)
    try:
        recipe = load_recipe(str(folder / "recipe.yaml")) if (folder / "recipe.yaml").is_file() else None
    except InputError as error:
        recipe, unreadable = None, f"unreadable: {error}"
    else:
        unreadable = ""
    if recipe is None and (name not in METHOD_SECTIONS or number is None):
        raise InputError(f"{folder}: {unreadable or 'no run here (a run folder has a recipe.yaml)'}")
    run = Run(folder, recipe.method if recipe else name, recipe.seed if recipe else int(number[1]), unreadable, recipe)
    if recipe and (folder / "result.json").is_file():
        run.status, run.values = "finished", json.loads((folder / "result.json").read_text())
    elif not unreadable:
        run.status = _why_not_finished(folder, recipe)
    return run


def _why_not_finished(folder: Path, recipe: Recipe | None) -> str:
    log = folder / "run.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    if lines and lines[-1].startswith("failed: "):
        return lines[-1]
    done = len(read_lines(folder / "metrics.jsonl"))
    return f"unfinished: {done} of {recipe.epochs} epochs" if recipe else "unfinished: not begun"


def _identity(run: Run) -> dict:
    """The settings that decide a run's outcome, but for method and seed; where a well-known data set lies does not."""
    values = {key: value for key, value in run.recipe.identity().items() if key not in ("method", "seed")}
    if values["data.source"] is not None:
        del values["data.path"]
    return values


def _check_same_test(runs: list[Run]):
    """Raise InputError where runs were tested on different samples: no figure of theirs could be compared."""
    readable = [run for run in runs if run.recipe]
    for run in readable[1:]:
        first, this = _identity(readable[0]), _identity(run)
        for key in sorted(first.keys() | this.keys()):
            if key.startswith("data.") and key.split(".")[1] not in _TRAINING_ONLY and first.get(key) != this.get(key):
                raise InputError(
                    f"{readable[0].folder} and {run.folder} were tested on different data "
                    f"({key} {first.get(key)!r}, {this.get(key)!r}): give each data set a report of its own"
                )


def _tell_apart(runs: list[Run]):
    """Fill in `shared` and `own` where runs of one method and seed differ in more than these."""
    readable = [run for run in runs if run.recipe]
    identities = [_identity(run) for run in readable]

    def differing(chosen: list[dict]) -> list[str]:
        keys = dict.fromkeys(key for values in chosen for key in values)
        return [key for key in keys if len({str(values.get(key)) for values in chosen}) > 1]

    def words(keys: list[str], values: dict) -> str:
        return " ".join(f"{key}={values[key]}" for key in keys)

    common = [{k: v for k, v in values.items() if k.split(".")[0] not in METHOD_SECTIONS} for values in identities]
    shared = differing(common)
    for run, values in zip(readable, identities, strict=True):
        same_method = [other for of, other in zip(readable, identities, strict=True) if of.name == run.name]
        own = [key for key in differing(same_method) if key.split(".")[0] in METHOD_SECTIONS]
        run.shared, run.own = words(shared, values), words(own, values)


def rows(runs: list[Run]) -> pd.DataFrame:
    """A row a run with COLUMNS: how it ended, the figures of its last and its best epoch; also of seeds that are missing."""
    seeds = sorted({run.seed for run in runs})
    by_place = {(run.method, run.seed): run for run in runs}
    lines = []
    for method in dict.fromkeys(run.method for run in runs):
        for seed in seeds:
            run = by_place.get((method, seed))
            line = {"method": method, "seed": seed, "status": run.status if run else "missing"}
            if run and run.values:
                last, best = run.values["last"], run.values["best"]
                line |= {name: last[name] for name in METRICS} | {"seconds": run.values["seconds"]}
                line |= {"best_epoch": best["epoch"]} | {f"best_{name}": best[name] for name in METRICS}
            lines.append(line)
    return pd.DataFrame(lines, columns=COLUMNS)


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """The finished runs of each method."""
    finished = [run for run in runs if run.status == "finished"]
    return {m: [r for r in finished if r.method == m] for m in dict.fromkeys(run.method for run in finished)}


def history(folders: dict[str, list[Path]]) -> pd.DataFrame:
    """The lines of metrics.jsonl of each method's runs, with `method` and `seed`."""
    parts = []
    for method, each in folders.items():
        for folder in each:
            seed = json.loads((folder / "result.json").read_text())["seed"]
            parts.append(pd.DataFrame(read_lines(folder / "metrics.jsonl")).assign(method=method, seed=seed))
    return pd.concat(parts, ignore_index=True)


def predictions(finished: dict[str, list[Run]]) -> dict[str, dict[int, pd.DataFrame]]:
    """Method → seed → the outcome of each test sample (columns OUTCOMES) of the last epoch's weights, where it was kept."""
    found = {}
    for method, runs in finished.items():
        for run in runs:
            if (run.folder / PREDICTIONS).is_file():
                table = pd.read_parquet(run.folder / PREDICTIONS, columns=OUTCOMES)
                found.setdefault(method, {})[run.seed] = table
    return found


def probabilities(path: Path):
    """Probabilities [N, K] and labels [N], as tensors, in a file of predictions."""
    import torch
    from pyarrow import parquet

    table = parquet.read_table(path, columns=["label", "probabilities"])
    flat = table["probabilities"].combine_chunks().flatten().to_numpy()
    return torch.tensor(flat).view(len(table), -1), torch.tensor(table["label"].to_numpy())


def class_names(folder: Path) -> list[str]:
    """What a finished run's classes are called."""
    return json.loads((folder / "config.json").read_text())["label_names"]
