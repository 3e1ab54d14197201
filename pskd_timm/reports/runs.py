"""Run folders read back: which runs there are, how each ended, and its figures as frames."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyarrow import ArrowException, parquet
from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError, create_model

from ..calibration import kept_probabilities
from ..errors import InputError, reason
from ..files import warn
from ..floors import FLOORED
from ..methods import METHOD_SECTIONS
from ..metrics import METRICS, Metric
from ..recipe import Recipe
from ..recipe_files import load_recipe
from ..run.folder import EARLIER, read_metrics
from ..run.result import RunResult, read_lines
from .kept import Kept

OUTCOMES = ["index", "label", "prediction", "confidence", "correct", "nll"]
PREDICTIONS, HOLDOUT = "predictions.parquet", "holdout.parquet"
# Of the data section, what leaves the tested samples the same; a search may also choose the size they are shown in.
_SAME_TEST = {"limit_train", "holdout_fraction", "label_noise", "loading", "shrink_to", "image_size"}
_TRAINING_ALONE = {"limit_train", "holdout_fraction", "label_noise", "shrink_to"}
PART_NAMES = {"test": "test part", "holdout": "held-out part"}  # other parts by their own name
RESULT = TypeAdapter(RunResult)


def floor_columns(name: str) -> tuple[str, str]:
    """The columns with the EceFloor of a metric."""
    return f"{name}_if_calibrated", f"{name}_if_calibrated_95"


def columns(metrics: Sequence[Metric] = tuple(METRICS.values())) -> list[str]:
    """The columns of `rows`: how a run ended, its last and best epoch's metrics, what perfect calibration would measure."""
    names = [metric.name for metric in metrics]
    names += [column for name in names if name in FLOORED for column in floor_columns(name)]
    return [
        "method",
        "seed",
        "status",
        *names,
        "seconds",
        "best_epoch",
        *(f"best_{name}" for name in names),
        "num_classes",
    ]


@dataclass
class Run:
    """A run's folder and how it ended (`finished`, or why not), its recipe where it can be read.

    A finished run has result.json's values and, where they were kept, the test samples' `outcomes` (columns OUTCOMES), and
    for `last` and `best` epoch what the file of them says.
    Where runs of one method and seed differ, `different_settings` and `different_method_settings` hold what does, as
    `optim.lr=0.1`: of the settings that every method has, and of its method's.
    """

    folder: Path
    name: str
    seed: int
    status: str
    recipe: Recipe | None = None
    values: dict | None = None
    outcomes: pd.DataFrame | None = None
    kept: dict[str, Kept] = field(default_factory=dict)
    different_settings: str = ""
    different_method_settings: str = ""

    @property
    def method(self) -> str:
        """The method's name, and after it what sets the run apart from others of that name."""
        return " ".join(filter(None, (self.name, self.different_settings, self.different_method_settings)))

    @property
    def baseline(self) -> str:
        """The `method` of the runs that this one is to be held against."""
        return f"baseline {self.different_settings}".rstrip()


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs in and below `paths`, by method and seed. Raises InputError where there are none, or unlike ones.

    A folder of which nothing tells the method and the seed any more is left out, with a warning.
    """
    runs = read_each(paths, read_run)
    _check_same_test(runs)
    _name_differences(runs)
    runs.sort(
        key=lambda run: (list(METHOD_SECTIONS).index(run.name), by_numbers(run.method), run.seed, run.values is None)
    )
    return list(_each_once(runs))


def by_numbers(text: str) -> list[tuple[float, str]]:
    """What sorts words with numbers in them, so that `epochs=5` comes before `epochs=10`."""
    return [(float(number or "inf"), word) for number, word in re.findall(r"(\d+(?:\.\d+)?)|(\D+)", text)]


def read_each(paths: Iterable[str | Path], read: Callable[[Path], Run]) -> list[Run]:
    """What `read` gives of the runs in and below `paths`; a run that it refuses is left out, with a warning.

    Raises InputError where it refuses all.
    """
    runs, unknown = [], []
    for folder in run_folders(paths):
        try:
            runs.append(read(folder))
        except InputError as error:
            unknown.append(str(error))
    if not runs:
        raise InputError(unknown[0])
    for line in unknown:
        warn(f"left out: {line}")
    return runs


def _each_once(runs: list[Run]) -> Iterator[Run]:
    """The sorted `runs` without copies. Raises InputError where two of one method and seed have other results.

    Of a finished run and one that is not, the finished one is taken.
    """
    taken = None
    for run in runs:
        if taken is None or (taken.method, taken.seed) != (run.method, run.seed):
            taken = run
            yield run
        elif taken.values == run.values:
            warn(f"{run.folder} is the run of {taken.folder} once more: taken once")
        elif run.values is None:
            warn(f"left out: {run.folder} ({run.status}), the run of {taken.folder} once more, which is finished")
        else:
            raise InputError(f"{taken.folder} and {run.folder} are one run with two results: leave one out")


def run_folders(paths: Iterable[str | Path]) -> list[Path]:
    """The folders of runs in and below `paths`, each once. Raises InputError for a path without any."""
    folders = {}
    for path in map(Path, paths):
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise InputError(f"{path} {what}: give run folders, or a folder that holds some (runs/digits)")
        found = list(_run_folders(path))
        if not found:
            raise InputError(f"{path}: no run here (a run folder has a recipe.yaml; a search's folder is named itself)")
        folders |= {folder.resolve(): folder for folder in found}
    return list(folders.values())


def _run_folders(path: Path):
    for folder, inside, files in os.walk(path):
        # A run that failed early has no more than the run.log that compare wrote.
        early = "run.log" in files and seed_in_name(Path(folder)) is not None
        if early or "recipe.yaml" in files or "result.json" in files:
            inside.clear()
            yield Path(folder)
        # A search's trials are no part of the comparison beside it: its own folder has to be named.
        inside[:] = sorted(name for name in inside if not (Path(folder) / name / "search.json").is_file())


def seed_in_name(folder: Path) -> int | None:
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
            check_history(folder, read_metrics(values))
        outcomes = read_outcomes(folder, values) if values else None
    except (InputError, OSError, ArrowException) as error:
        damage = f"damaged: {reason(error)}"
    seed, method = seed_in_name(folder), folder.resolve().parent.name
    if recipe or values:
        method, seed = (recipe.method, recipe.seed) if recipe else (values["method"], values["seed"])
    if method not in METHOD_SECTIONS or seed is None:
        raise InputError(f"{folder}: {damage or 'no run here (a run folder has a recipe.yaml)'}")
    run = Run(folder, method, seed, damage, recipe)
    if not damage and values:
        run.status, run.values, run.outcomes = "finished", values, outcomes
        files = {"last": folder / PREDICTIONS, "best": folder / "best" / PREDICTIONS}
        run.kept = {which: Kept(path) for which, path in files.items() if outcomes is not None and path.is_file()}
    elif not damage:
        run.status = why_not_finished(folder, recipe)
    return run


def why_not_finished(folder: Path, recipe: Recipe | None) -> str:
    log, metrics = folder / "run.log", folder / "metrics.jsonl"
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    # What was logged since a failure is of a later start, which writes no run.log where it is `train`'s.
    later = [path for path in (metrics, folder / "steps.jsonl") if path.is_file()]
    if lines and lines[-1].startswith("failed: ") and all(log.stat().st_mtime >= p.stat().st_mtime for p in later):
        return lines[-1]
    done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    if recipe is None:
        return "unfinished: not begun"
    return f"unfinished: {done} of {recipe.epochs} epochs{', but no result.json' * (done >= recipe.epochs)}"


def read_result(folder: Path) -> RunResult:
    """The values of result.json. Raises InputError where it is damaged."""
    values = _loaded((folder / "result.json").read_bytes(), "result.json")
    if not isinstance(values, dict):
        raise InputError("result.json holds no result")
    values = EARLIER | values
    with _said_of("result.json"):
        RESULT.validate_python(values)
        try:
            last = _figures_model(read_metrics(values))
        except TypeError as error:
            raise InputError(f"result.json: metrics: {error}") from None
        best = create_model("Best", chosen_on=(str, ...), __base__=last)
        create_model("Result", last=(last, ...), best=(best, ...)).model_validate(values)
    if values["class_names"] and len(values["class_names"]) != values["num_classes"]:  # kept results may leave them out
        raise InputError(f"result.json names {len(values['class_names'])} of {values['num_classes']} classes")
    return values


def check_history(folder: Path, metrics: Sequence[Metric]):
    """Raise InputError where a finished run's metrics.jsonl is damaged."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    if not lines:
        raise InputError("metrics.jsonl is empty or missing")
    model = _figures_model([metric for metric in metrics if not metric.only_at_end])
    for number, line in enumerate(lines, start=1):
        what = f"metrics.jsonl, line {number}"
        with _said_of(what):
            model.model_validate(_loaded(line, what))


def _figures_model(metrics: Sequence[Metric]) -> type[BaseModel]:
    return create_model("Figures", epoch=(int, ...), **{metric.name: (FiniteFloat, ...) for metric in metrics})


def _loaded(text: bytes, what: str):
    try:
        return json.loads(text)
    except ValueError:
        raise InputError(f"{what} is {'not whole' if text.strip() else 'empty'}") from None


@contextmanager
def _said_of(what: str):
    """Turn the first of pydantic's complaints into an InputError about `what`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = [".".join(map(str, first["loc"]))] if first["loc"] else []
        raise InputError(": ".join([what, *where, first["msg"]])) from None


def read_outcomes(folder: Path, values: RunResult) -> pd.DataFrame | None:
    """What predictions.parquet has of each test sample: columns OUTCOMES, where there are any `group` and a metric's own.

    None where it was not kept. Raises InputError where it, or holdout.parquet, is damaged or of other data than
    result.json's `values` say.
    """
    for name in (PREDICTIONS, HOLDOUT):
        if (folder / name).is_file():
            _check_predictions(folder / name, values)
    if not (folder / PREDICTIONS).is_file():
        return None
    names = parquet.read_schema(folder / PREDICTIONS).names
    extra = ["group", *(metric["name"] for metric in values["metrics"])]
    return pd.read_parquet(folder / PREDICTIONS, columns=[*OUTCOMES, *(n for n in extra if n in names and n != "nll")])


def _check_predictions(path: Path, values: RunResult):
    try:
        file = parquet.ParquetFile(path)
        classes = file.read(columns=["label", "prediction"]).to_pandas()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path.name} cannot be read: {str(error).partition('. ')[0]}") from None
    if missing := [name for name in OUTCOMES if name not in file.schema_arrow.names]:
        raise InputError(f"{path.name} has no column {missing[0]!r}")
    of_rows = values["num_classes"]
    if kept := kept_probabilities(path):
        of_rows = getattr(file.schema_arrow.field(kept).type, "list_size", None)
    if of_rows != values["num_classes"] or not classes.isin(range(of_rows)).all(axis=None):
        raise InputError(f"{path.name} has other classes than result.json's {values['num_classes']}")
    of_holdout = path.name == HOLDOUT or values["evaluated_on"] == "holdout"
    expected = values["num_holdout" if of_holdout else "num_test"]
    if expected and len(classes) != expected:  # earlier versions wrote 0
        raise InputError(f"{path.name} has {len(classes)} samples, result.json {expected}")


def identity(run: Run) -> dict:
    """The settings that decide a run's outcome, but for method and seed; where a well-known data set lies does not."""
    values = {key: value for key, value in run.recipe.identity().items() if key not in ("method", "seed")}
    if values["data.source"] is not None:
        del values["data.path"]
    return values | {f"model.kwargs.{name}": value for name, value in values.pop("model.kwargs").items()}


def _check_same_test(runs: list[Run]):
    """Raise InputError where runs were tested on different samples: no figure of theirs could be compared."""
    readable = [run for run in runs if run.recipe]
    for run in readable[1:]:
        first, this = identity(readable[0]), identity(run)
        for key in sorted(first.keys() | this.keys()):
            if key.startswith("data.") and key.split(".")[1] not in _SAME_TEST and first.get(key) != this.get(key):
                raise InputError(
                    f"{readable[0].folder} and {run.folder} were tested on different data "
                    f"({key} {first.get(key)!r}, {this.get(key)!r}): give each data set a report of its own"
                )
    finished = [run for run in runs if run.values]
    for run in finished[1:]:
        for what, first, this in _facts_of_test(finished[0], run):
            if first != this:
                raise InputError(
                    f"{finished[0].folder} and {run.folder} were trained or tested on different data "
                    f"({what} {first}, {this}): give each data set a report of its own"
                )
        first, this = metric_names(finished[0].values), metric_names(run.values)
        if first != this:
            raise InputError(
                f"{finished[0].folder} and {run.folder} were scored by different metrics "
                f"({', '.join(first)}; {', '.join(this)}): give each a report of its own"
            )


def metric_names(values: RunResult) -> list[str]:
    """The metrics of a finished run, which another version may title otherwise."""
    return [metric.name for metric in read_metrics(values)]


def _facts_of_test(one: Run, other: Run) -> Iterator[tuple[str, Any, Any]]:
    """What two finished runs of the same data must agree in: a name and both values."""
    for key in ("num_classes", "num_test"):
        yield key, one.values[key], other.values[key]
    # Where the settings of the data are the same, so must be what was read; of the training part alone, what was tested on.
    settings = [{k: v for k, v in identity(run).items() if k.startswith("data.")} for run in (one, other)]
    different = {k.removeprefix("data.") for k in settings[0] if settings[0][k] != settings[1].get(k)}
    first, this = (run.values.get("data_fingerprint", {}) for run in (one, other))
    for kind in [kind for kind in first if kind in this]:
        if not different or kind == "class_names" or (kind == "test_contents" and different <= _TRAINING_ALONE):
            yield f"fingerprint of {kind.replace('_', ' ')}", first[kind], this[kind]


def _name_differences(runs: list[Run]):
    """Fill in `different_settings` and `different_method_settings`."""
    readable = [run for run in runs if run.recipe]
    identities = [identity(run) for run in readable]

    def differing(chosen: list[dict]) -> list[str]:
        keys = dict.fromkeys(key for values in chosen for key in values)
        return [key for key in keys if len({str(values.get(key)) for values in chosen}) > 1]

    def words(keys: list[str], values: dict) -> str:
        return " ".join(f"{key}={values.get(key)}" for key in keys)

    common = [{k: v for k, v in values.items() if k.split(".")[0] not in METHOD_SECTIONS} for values in identities]
    of_all = differing(common)
    for run, values in zip(readable, identities, strict=True):
        same_method = [other for of, other in zip(readable, identities, strict=True) if of.name == run.name]
        of_method = [key for key in differing(same_method) if key.split(".")[0] in METHOD_SECTIONS]
        run.different_settings, run.different_method_settings = words(of_all, values), words(of_method, values)


def common_metrics(runs: list[Run]) -> list[Metric]:
    """The metrics of the finished runs, which all have the same; the six of images where none has finished."""
    return next((read_metrics(run.values) for run in runs if run.values), list(METRICS.values()))


def other_parts(finished: dict[str, list[Run]]) -> list[str]:
    """The parts that all finished runs were scored on once they had ended, beside the one that their figures are of."""
    of_runs = [
        [name for name, value in run.values.items() if isinstance(value, dict) and {"last", "best"} <= value.keys()]
        for runs in finished.values()
        for run in runs
    ]
    return [name for name in (of_runs[0] if of_runs else ()) if all(name in names for names in of_runs)]


def rows(runs: list[Run], further: Sequence[Metric] = (), part: str | None = None) -> pd.DataFrame:
    """A row a run with `columns`: how it ended, the metrics of its last and best epoch.

    A seed that other methods have, with the same settings, is a row too, as missing. A metric of `further` that a run's
    figures lack is NaN. With a `part` of `other_parts` the figures are those of that part.
    """
    seeds = {run.different_settings: set() for run in runs}
    for run in runs:
        seeds[run.different_settings].add(run.seed)
    by_place = {(run.method, run.seed): run for run in runs}
    metrics = [*common_metrics(runs), *further]
    lines = []
    for method, settings in {run.method: run.different_settings for run in runs}.items():
        for seed in sorted(seeds[settings]):
            run = by_place.get((method, seed))
            line = {"method": method, "seed": seed, "status": run.status if run else "missing"}
            lines.append(line | (_figures(run, metrics, part) if run and run.values else {}))
    return pd.DataFrame(lines, columns=columns(metrics))


def _figures(run: Run, metrics: Sequence[Metric], part: str | None) -> dict:
    line = {"seconds": run.values["seconds"], "num_classes": run.values["num_classes"]}
    line["best_epoch"] = run.values["best"]["epoch"]
    of_part = run.values[part] if part else run.values
    for which, prefix in (("last", ""), ("best", "best_")):
        line |= {prefix + metric.name: of_part[which].get(metric.name, np.nan) for metric in metrics}
        has_floors = which in run.kept and not part
        floors = run.kept[which].floors(metric.name for metric in metrics) if has_floors else {}
        for name, floor in floors.items():
            line |= dict(zip((prefix + column for column in floor_columns(name)), floor, strict=True))
    return line


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """The finished runs of each method."""
    finished = [run for run in runs if run.status == "finished"]
    return {m: [r for r in finished if r.method == m] for m in dict.fromkeys(run.method for run in finished)}


def part_name(part: str) -> str:
    """What people call an evaluated part."""
    return PART_NAMES.get(part, f"{part} part")


def scored_part(finished: dict[str, list[Run]]) -> str:
    """What the figures are of: the test part, or, where that stayed unread as in a search, the held-out part."""
    return next((part_name(run.values["evaluated_on"]) for runs in finished.values() for run in runs), "test part")


def history(runs: dict[str, list[Run]]) -> pd.DataFrame:
    """The lines of metrics.jsonl of each method's runs, with `method` and `seed`."""
    parts = [
        pd.DataFrame(read_lines(run.folder / "metrics.jsonl")).assign(method=method, seed=run.seed)
        for method, each in runs.items()
        for run in each
    ]
    return pd.concat(parts, ignore_index=True)


def predictions(finished: dict[str, list[Run]]) -> dict[str, dict[int, pd.DataFrame]]:
    """Method → seed → the outcome of each test sample (columns OUTCOMES) of the last epoch's weights, where it was kept."""
    kept = {m: {run.seed: run.outcomes for run in runs if run.outcomes is not None} for m, runs in finished.items()}
    return {method: tables for method, tables in kept.items() if tables}
