"""Run folders read back: which runs there are, how each ended, and its figures as frames."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from pyarrow import ArrowException, parquet
from pydantic import BaseModel, FiniteFloat, ValidationError, create_model
from torch import Tensor

from ..errors import InputError
from ..files import warn
from ..methods import METHOD_SECTIONS
from ..metrics import METRICS
from ..recipe import Recipe
from ..recipe_files import load_recipe
from ..run.folder import read_result as read_run_result
from ..run.result import read_lines

COLUMNS = [
    "method",
    "seed",
    "status",
    *METRICS,
    "seconds",
    "best_epoch",
    *(f"best_{name}" for name in METRICS),
    "num_classes",
]
OUTCOMES = ["index", "label", "prediction", "confidence", "correct", "nll"]
PREDICTIONS, HOLDOUT = "predictions.parquet", "holdout.parquet"
# Of the data section, what leaves the tested samples the same; a search may also choose the size they are shown in.
_SAME_TEST = {"limit_train", "holdout_fraction", "label_noise", "loading", "image_size"}
PART_NAMES = {"test": "test part", "holdout": "held-out part"}
PART = 4096  # probabilities' rows read at once: few enough that no large memory is asked for

# What a report needs of a finished run's files.
Figures = create_model("Figures", epoch=(int, ...), **{name: (FiniteFloat, ...) for name in METRICS})


class BestFigures(Figures):
    chosen_on: str


class Hardware(BaseModel):
    device: str
    name: str
    cpu_count: int | None
    threads: int


class ResultFile(BaseModel):
    method: str
    seed: int
    last: Figures
    best: BestFigures
    seconds: FiniteFloat
    num_train: int
    evaluated_on: Literal["test", "holdout"] = "test"
    num_test: int
    num_holdout: int = 0
    num_classes: int
    class_names: list[str]
    num_parameters: int
    num_processes: int
    versions: dict[str, str]
    hardware: Hardware


@dataclass
class Run:
    """A run's folder and how it ended (`finished`, or why not), its recipe where it can be read.

    A finished run has result.json's values and, where they were kept, the test samples' `outcomes` (columns OUTCOMES).
    `shared` and `own` name the settings that set it apart from other runs: those of any method, and of its method.
    """

    folder: Path
    name: str
    seed: int
    status: str
    recipe: Recipe | None = None
    values: dict | None = None
    outcomes: pd.DataFrame | None = None
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
    """The runs in and below `paths`, by method and seed. Raises InputError where there are none, or unlike ones.

    A folder of which nothing tells the method and the seed any more is left out, with a warning.
    """
    folders = {}
    for path in map(Path, paths):
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise InputError(f"{path} {what}: give run folders, or a folder that holds some (runs/digits)")
        found = list(_run_folders(path))
        if not found:
            raise InputError(f"{path}: no run here (a run folder has a recipe.yaml; a search's folder is named itself)")
        folders |= {folder.resolve(): folder for folder in found}
    runs, unknown = [], []
    for folder in folders.values():
        try:
            runs.append(read_run(folder))
        except InputError as error:
            unknown.append(str(error))
    if not runs:
        raise InputError(unknown[0])
    for line in unknown:
        warn(f"left out: {line}")
    _check_same_test(runs)
    _tell_apart(runs)
    runs.sort(key=lambda run: (list(METHOD_SECTIONS).index(run.name), run.method, run.seed))
    for one, other in zip(runs, runs[1:], strict=False):
        if (one.method, one.seed) == (other.method, other.seed):
            raise InputError(f"{one.folder} and {other.folder} are the same run twice: leave one out")
    return runs


def _run_folders(path: Path):
    for folder, inside, files in os.walk(path):
        # A run that failed early has no more than the run.log that compare wrote.
        early = "run.log" in files and _seed_in_name(Path(folder)) is not None
        if early or "recipe.yaml" in files or "result.json" in files:
            inside.clear()
            yield Path(folder)
        # A search's trials are no part of the comparison beside it: its own folder has to be named.
        inside[:] = sorted(name for name in inside if not (Path(folder) / name / "search.json").is_file())


def _seed_in_name(folder: Path) -> int | None:
    number = re.fullmatch(r"seed(\d+)", folder.resolve().name)
    return int(number[1]) if number else None


def read_run(folder: Path) -> Run:
    """The run in a folder, finished, not finished or damaged. Raises InputError where nothing tells its method and seed."""
    recipe, values, damage = None, None, ""
    try:
        if (folder / "recipe.yaml").is_file():
            recipe = load_recipe(str(folder / "recipe.yaml"))
        if (folder / "result.json").is_file():
            values = read_result(folder)
            if recipe is None:
                raise InputError("recipe.yaml is missing")
            check_history(folder)
        outcomes = read_outcomes(folder, values) if values else None
    except (InputError, OSError, ArrowException) as error:
        damage = f"damaged: {error}"
    seed, method = _seed_in_name(folder), folder.resolve().parent.name
    if recipe or values:
        method, seed = (recipe.method, recipe.seed) if recipe else (values["method"], values["seed"])
    if method not in METHOD_SECTIONS or seed is None:
        raise InputError(f"{folder}: {damage or 'no run here (a run folder has a recipe.yaml)'}")
    run = Run(folder, method, seed, damage, recipe)
    if not damage and values:
        run.status, run.values, run.outcomes = "finished", values, outcomes
    elif not damage:
        run.status = _why_not_finished(folder, recipe)
    return run


def _why_not_finished(folder: Path, recipe: Recipe | None) -> str:
    log, metrics = folder / "run.log", folder / "metrics.jsonl"
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    if lines and lines[-1].startswith("failed: "):
        return lines[-1]
    done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    return f"unfinished: {done} of {recipe.epochs} epochs" if recipe else "unfinished: not begun"


def read_result(folder: Path) -> dict:
    """The values of result.json. Raises InputError where it is damaged."""
    _check(ResultFile, (folder / "result.json").read_bytes(), "result.json")
    values = read_run_result(folder)
    if len(values["class_names"]) != values["num_classes"]:
        raise InputError(f"result.json names {len(values['class_names'])} of {values['num_classes']} classes")
    return values


def check_history(folder: Path):
    """Raise InputError where a finished run's metrics.jsonl is damaged."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    if not lines:
        raise InputError("metrics.jsonl is empty or missing")
    for number, line in enumerate(lines, start=1):
        _check(Figures, line, f"metrics.jsonl, line {number}")


def _check(model: type[BaseModel], text: bytes, what: str):
    try:
        model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise InputError(f"{what} is {'not whole' if text.strip() else 'empty'}") from None
        where = [".".join(map(str, first["loc"]))] if first["loc"] else []
        raise InputError(": ".join([what, *where, first["msg"]])) from None


def read_outcomes(folder: Path, values: dict) -> pd.DataFrame | None:
    """What predictions.parquet has of each test sample (columns OUTCOMES), None where it was not kept.

    Raises InputError where it, or holdout.parquet, is damaged or of other data than result.json's `values` say.
    """
    for name in (PREDICTIONS, HOLDOUT):
        if (folder / name).is_file():
            _check_predictions(folder / name, values)
    return pd.read_parquet(folder / PREDICTIONS, columns=OUTCOMES) if (folder / PREDICTIONS).is_file() else None


def _check_predictions(path: Path, values: dict):
    try:
        file = parquet.ParquetFile(path)
        classes = file.read(columns=["label", "prediction"]).to_pandas()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path.name} cannot be read: {str(error).partition('. ')[0]}") from None
    if missing := [name for name in [*OUTCOMES, "probabilities"] if name not in file.schema_arrow.names]:
        raise InputError(f"{path.name} has no column {missing[0]!r}")
    of_rows = getattr(file.schema_arrow.field("probabilities").type, "list_size", None)
    if of_rows != values["num_classes"] or not classes.isin(range(of_rows)).all(axis=None):
        raise InputError(f"{path.name} has other classes than result.json's {values['num_classes']}")
    expected = values[f"num_{values['evaluated_on'] if path.name == PREDICTIONS else 'holdout'}"]
    if expected and len(classes) != expected:  # a run of before this was written says 0
        raise InputError(f"{path.name} has {len(classes)} samples, result.json {expected}")


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
            if key.startswith("data.") and key.split(".")[1] not in _SAME_TEST and first.get(key) != this.get(key):
                raise InputError(
                    f"{readable[0].folder} and {run.folder} were tested on different data "
                    f"({key} {first.get(key)!r}, {this.get(key)!r}): give each data set a report of its own"
                )
    finished = [run for run in runs if run.values]
    for run in finished[1:]:
        for key in ("num_classes", "num_test"):
            if run.values[key] != finished[0].values[key]:
                raise InputError(
                    f"{finished[0].folder} and {run.folder} were tested on different data "
                    f"({key} {finished[0].values[key]}, {run.values[key]}): give each data set a report of its own"
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
                line["num_classes"] = run.values["num_classes"]
            lines.append(line)
    return pd.DataFrame(lines, columns=COLUMNS)


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """The finished runs of each method."""
    finished = [run for run in runs if run.status == "finished"]
    return {m: [r for r in finished if r.method == m] for m in dict.fromkeys(run.method for run in finished)}


def scored_part(finished: dict[str, list[Run]]) -> str:
    """What the figures are of: the test part, or, where that stayed unread as in a search, the held-out part."""
    return next((PART_NAMES[run.values["evaluated_on"]] for runs in finished.values() for run in runs), "test part")


def history(folders: dict[str, list[Path]]) -> pd.DataFrame:
    """The lines of metrics.jsonl of each method's runs, with `method` and `seed`."""
    parts = []
    for method, each in folders.items():
        for folder in each:
            seed = read_run_result(folder)["seed"]
            parts.append(pd.DataFrame(read_lines(folder / "metrics.jsonl")).assign(method=method, seed=seed))
    return pd.concat(parts, ignore_index=True)


def predictions(finished: dict[str, list[Run]]) -> dict[str, dict[int, pd.DataFrame]]:
    """Method → seed → the outcome of each test sample (columns OUTCOMES) of the last epoch's weights, where it was kept."""
    kept = {m: {run.seed: run.outcomes for run in runs if run.outcomes is not None} for m, runs in finished.items()}
    return {method: tables for method, tables in kept.items() if tables}


def probability_parts(path: Path) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Probabilities [n, K], labels [n] and hits [n] of a file of predictions, part by part, each read once."""
    for part in parquet.ParquetFile(path).iter_batches(PART, columns=["label", "correct", "probabilities"]):
        columns = (part["probabilities"].flatten(), part["label"], part["correct"])
        flat, labels, correct = (torch.tensor(column.to_numpy(zero_copy_only=False)) for column in columns)
        yield flat.view(len(part), -1), labels, correct
