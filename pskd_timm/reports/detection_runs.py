"""Detectors' run folders read back: a run as in runs.py, and what its network found in the test pictures."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow import ArrowException

from ..detection.outcomes import DETECTIONS, Found, read_found
from ..detection.settings import DetectionRecipe
from ..errors import InputError, reason
from ..methods import METHOD_SECTIONS
from ..recipe_files import load_recipe
from ..run.folder import task_of
from .kept import Kept
from .runs import Run, check_history, metric_names, read_each, read_result, run_folders, seed_in_name, why_not_finished

BACKBONE = "backbone"  # what reports of detectors compare, in their words
# What the label of a backbone stands for, and what leaves the tested pictures as they are: they are compared themselves.
_NOT_NAMED = {"seed", "task", "model.backbone", "model.pretrained", "data.path"}


@dataclass
class DetectorRun(Run):
    """A detector's run: its `name` is the backbone's label, its outcomes are those of detections that are not ignored."""

    found: Found | None = None


def are_detectors(paths: Iterable[str | Path]) -> bool:
    """Whether the runs in and below `paths` are detectors'. Raises InputError where only some of them are, or there are none."""
    folders = run_folders(paths)
    detectors = [folder for folder in folders if task_of(folder) == "detection"]
    if detectors and len(detectors) < len(folders):
        other = next(folder for folder in folders if folder not in detectors)
        raise InputError(f"{detectors[0]} is a detector's run, {other} is not: give each kind a report of its own")
    return bool(detectors)


def find_detectors(paths: Iterable[str | Path]) -> list[DetectorRun]:
    """The runs in and below `paths`, by backbone and seed. Raises InputError where they were tested on different pictures."""
    runs = read_each(paths, read_detector)
    _check_same_test([run for run in runs if run.values])
    _name_differences(runs)
    order = list(METHOD_SECTIONS)
    runs.sort(key=lambda run: (order.index(run.name) if run.name in order else len(order), run.method, run.seed))
    for one, other in zip(runs, runs[1:], strict=False):
        if (one.method, one.seed) == (other.method, other.seed):
            raise InputError(
                f"{one.folder} and {other.folder} are both called {one.method}, seed {one.seed}: leave one out, "
                "or train with another --model.label"
            )
    return runs


def read_detector(folder: Path) -> DetectorRun:
    """The run in a folder, finished, not finished or damaged. Raises InputError where nothing tells its backbone and seed."""
    recipe, values, found, damage = None, None, None, ""
    try:
        if (folder / "recipe.yaml").is_file():
            recipe = load_recipe(str(folder / "recipe.yaml"), kind=DetectionRecipe)
        if (folder / "result.json").is_file():
            values = read_result(folder)
            if recipe is None:
                raise InputError("recipe.yaml is missing")
            check_history(folder, [])
            found = read_found(folder, values["num_test"], values["num_classes"])
    except (InputError, OSError, ArrowException) as error:
        damage = f"damaged: {reason(error)}"
    seed, name = seed_in_name(folder), folder.resolve().parent.name
    if recipe or values:
        # A finished run says what its backbone was called, which the recipe knows only while the backbone's folder is there.
        name, seed = (values["method"], values["seed"]) if values else (recipe.method, recipe.seed)
    if seed is None:
        raise InputError(f"{folder}: {damage or 'no run here (a run folder has a recipe.yaml)'}")
    if damage or not values:
        return DetectorRun(folder, name, seed, damage or why_not_finished(folder, recipe), recipe)
    run = DetectorRun(folder, name, seed, "finished", recipe, values, outcomes(found), found=found)
    if found:
        run.kept["last"] = Kept(folder / DETECTIONS)
        run.kept["last"].outcomes = run.outcomes  # the file has ignored detections too
    return run


def outcomes(found: Found | None) -> pd.DataFrame | None:
    """A row a detection that is not ignored: index (its picture), label, confidence (float32, as it was kept), correct, iou."""
    if found is None:
        return None
    kept, detections = ~found.matches.ignored, found.detections
    columns = {
        "index": detections.image,
        "label": detections.label,
        "confidence": detections.value.astype(np.float32),
        "correct": found.matches.correct,
        "iou": found.iou,
    }
    return pd.DataFrame({name: values[kept] for name, values in columns.items()})


def _check_same_test(finished: list[DetectorRun]):
    """Raise InputError where runs were tested on different pictures or objects, or scored by different metrics."""
    for run in finished[1:]:
        first = finished[0]
        words = {
            "num_test": "the number of test pictures",
            "class_names": "classes",
            "num_objects": "the number of objects",
        }
        different = [said for key, said in words.items() if first.values.get(key) != run.values.get(key)]
        if metric_names(first.values) != metric_names(run.values):
            different.append("metrics")
        if different:
            raise InputError(
                f"{first.folder} and {run.folder} differ in {different[0]}: "
                "runs of different test pictures or figures need reports of their own"
            )
    kept = [run for run in finished if run.found]
    for run in kept[1:]:
        first = kept[0]
        same = all(np.array_equal(one, other) for one, other in zip(first.found.truths, run.found.truths, strict=True))
        if not same or first.found.pictures != run.found.pictures:
            raise InputError(
                f"{first.folder} and {run.folder} were tested on different pictures: give each data set a report of its own"
            )


def _name_differences(runs: list[DetectorRun]):
    """Fill in `different_settings`, and as `different_method_settings` sizes that differ among networks of one name."""
    readable = [run for run in runs if run.recipe]
    identities = [{k: v for k, v in run.recipe.identity().items() if k not in _NOT_NAMED} for run in readable]
    keys = dict.fromkeys(key for values in identities for key in values)
    differing = [key for key in keys if len({str(values.get(key)) for values in identities}) > 1]
    for run, values in zip(readable, identities, strict=True):
        run.different_settings = " ".join(f"{key}={values.get(key)}" for key in differing)
    for run in runs:
        sizes = {other.values["num_parameters"] for other in runs if other.name == run.name and other.values}
        if run.values and len(sizes) > 1:
            run.different_method_settings = f"parameters={run.values['num_parameters']}"
