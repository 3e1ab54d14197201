"""What `predict RUN --against` kept in a run's folder: its confidences against those of images of something else."""

import json
from pathlib import Path

import pandas as pd
from pydantic import TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from ..errors import InputError
from ..files import warn, write_atomic
from .plots import title
from .runs import Run
from .tables import Cell, rows_in_markdown

OUTSIDE = "Images of something else, last epoch"
FILE = "out_of_distribution.json"
MEASURES = {"auroc": "AUROC %", "fpr95": "FPR95 %"}  # higher, and lower, is better
CALIBRATED = {"calibrated_auroc": "AUROC %, calibrated", "calibrated_fpr95": "FPR95 %, calibrated"}


class Against(TypedDict):
    """A run's test images against the images of the data `name`, whose decoded pixels have the digest `contents`.

    `weights` are those of the `last` or the `best` epoch. `auroc`, in %: how often a test image is the more confident one of
    a pair. `fpr95`, in %: the part of the other images at or above the highest threshold that 95 % of the test images reach.
    The calibrated ones are of confidences at the `temperature`, where the run has one.
    """

    name: str
    weights: str
    contents: str
    images: int
    unreadable: int
    test_images: int
    auroc: float
    fpr95: float
    temperature: NotRequired[float]
    calibrated_auroc: NotRequired[float]
    calibrated_fpr95: NotRequired[float]


LIST = TypeAdapter(list[Against])


def read(run: Path) -> list[Against]:
    """What a run's folder has kept. Raises InputError where the file is damaged."""
    path = run / FILE
    if not path.is_file():
        return []
    try:
        return LIST.validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: damaged: {error.errors()[0]['msg']}") from None


def keep(run: Path, found: Against):
    """Write `found` into the run's folder, in the place of an earlier one of the same images and weights."""

    def same(other: Against) -> bool:
        return all(other[key] == found[key] for key in ("name", "weights", "contents"))

    kept = [other for other in read(run) if not same(other)]
    write_atomic(run / FILE, json.dumps([*kept, found], indent=1, ensure_ascii=False))


def outside(finished: dict[str, list[Run]]) -> dict | None:
    """A table of what the last epoch's networks of the finished runs were held against: a line a method, over its seeds.

    None where there is nothing; a damaged file is left out with a warning.
    """
    found = []
    for method, runs in finished.items():
        for run in runs:
            try:
                found += [each | {"method": method, "seed": run.seed} for each in read(run.folder)]
            except InputError as error:
                warn(f"left out: {error}")
    found = [each for each in found if each["weights"] == "last"]
    if not found:
        return None
    frame = pd.DataFrame(found)
    measures = MEASURES | {name: measure for name, measure in CALIBRATED.items() if name in frame}
    sets = frame[["name", "contents", "images"]].drop_duplicates(["name", "contents"]).to_dict("records")
    heads = [f"{measure}, {each['name']} ({each['images']:,})" for each in sets for measure in measures.values()]
    lines = []
    for method in frame.method.unique():
        mine = frame[frame.method == method]
        cells = []
        for each in sets:
            chosen = mine[(mine.name == each["name"]) & (mine.contents == each["contents"])]
            cells += [Cell(chosen[name].mean(), chosen[name].std(), chosen[name].count(), 2) for name in measures]
        lines.append({"title": title(method), "n": mine.seed.nunique(), "cells": cells})
    return {"heads": heads, "lines": lines, "calibrated": len(measures) > len(MEASURES)}


def outside_markdown(table: dict) -> str:
    """The table of `outside` in Markdown."""
    body = [[line["title"], str(line["n"]), *map(str, line["cells"])] for line in table["lines"]]
    return rows_in_markdown(["method", "runs", *table["heads"]], body)
