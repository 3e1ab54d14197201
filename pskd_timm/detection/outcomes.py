"""The files that keep what a detector found and what there was to find, written and read without torch."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow
from pyarrow import ArrowException, parquet

from ..errors import InputError
from .metrics import Matches, Scores, Table

DETECTIONS, OBJECTS = "detections.parquet", "objects.parquet"
CORNERS = ["left", "top", "right", "bottom"]


class Found(NamedTuple):
    """A run's detections and what VOC's rule made of them, the objects of the same pictures, and the pictures' names."""

    detections: Table
    matches: Matches
    iou: np.ndarray  # [N] largest overlap with an object of the class
    truths: Table
    pictures: list[str]


def write_found(folder: Path, names: list[str], detections: Table, truths: Table, scores: Scores):
    """Write detections.parquet, a row a detection with what it turned out to be, and objects.parquet, a row an object."""
    parquet.write_table(
        pyarrow.table(
            {
                **_columns(detections),
                "confidence": detections.value.astype(np.float32),
                "iou": scores.iou.astype(np.float32),
                "correct": scores.matches.correct,
                "ignored": scores.matches.ignored,
            }
        ).replace_schema_metadata({"pictures": "\n".join(names)}),
        folder / DETECTIONS,
    )
    parquet.write_table(pyarrow.table({**_columns(truths), "difficult": truths.difficult}), folder / OBJECTS)


def _columns(table: Table) -> dict[str, np.ndarray]:
    """The columns that detections and objects share: the picture's number, the class's, and the box in pixels from 0."""
    corners = dict(zip(CORNERS, table.box.T.astype(np.float32), strict=True))
    return {"index": table.image.astype(np.int32), "label": table.label.astype(np.int32), **corners}


def read_found(folder: Path, num_pictures: int, num_classes: int) -> Found | None:
    """What `write_found` has written into a run's folder; None where it was not kept.

    Raises InputError where a file is damaged, or has other pictures or classes than so many.
    """
    if not (folder / DETECTIONS).is_file() or not (folder / OBJECTS).is_file():
        return None
    found = _read(folder / DETECTIONS, ["confidence", "iou", "correct", "ignored"])
    objects = _read(folder / OBJECTS, ["difficult"])
    for name, each in ((DETECTIONS, found), (OBJECTS, objects)):
        if not each["index"].between(0, num_pictures - 1).all() or not each.label.between(0, num_classes - 1).all():
            raise InputError(
                f"{name} has other pictures or classes than result.json's {num_pictures} and {num_classes}"
            )
    metadata = parquet.read_schema(folder / DETECTIONS).metadata or {}
    return Found(
        _table(found, found.confidence),
        Matches(found.correct.to_numpy(bool), found.ignored.to_numpy(bool)),
        found.iou.to_numpy(),
        _table(objects, objects.difficult),
        metadata.get(b"pictures", b"").decode().split("\n"),
    )


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    wanted = ["index", "label", *CORNERS, *columns]
    try:
        if missing := [name for name in wanted if name not in parquet.read_schema(path).names]:
            raise InputError(f"{path.name} has no column {missing[0]!r}")
        return pd.read_parquet(path, columns=wanted)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path.name} cannot be read: {str(error).partition('. ')[0]}") from None


def _table(frame: pd.DataFrame, value: pd.Series) -> Table:
    image, label = (frame[name].to_numpy(np.int64) for name in ("index", "label"))
    return Table(image, label, frame[CORNERS].to_numpy(np.float64), value.to_numpy(np.float64))
