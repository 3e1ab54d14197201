"""The wrong detections that a finished run was surest of, with their pictures: what a report shows of them."""

import io
from pathlib import Path

import numpy as np
import pandas as pd

from ..metrics import most_confident_mistakes
from .data import Part
from .drawing import DETECTED, TRUE, Box, drawn
from .metrics import Scores, Table, overlaps

MISTAKES = 24
LARGEST = 400  # pixels of a kept picture's longer side
FILE = "mistakes.parquet"


def write_mistakes(folder: Path, part: Part, detections: Table, truths: Table, scores: Scores):
    """Write mistakes.parquet: a row a wrong detection, the surest first, with its picture and all marked objects in it.

    Columns: index and picture (which one), label, confidence, iou (largest overlap with an object of the class), other and
    other_iou (class of and overlap with the object of any other class that it overlaps most; −1 and 0 where there is none),
    image (a JPEG file's bytes).
    """
    rows = most_confident_mistakes(detections.value, scores.matches.correct | scores.matches.ignored, MISTAKES)
    others = [_other(detections, truths, row) for row in rows]
    pd.DataFrame(
        {
            "index": detections.image[rows],
            "picture": [part.names[i] for i in detections.image[rows]],
            "label": detections.label[rows],
            "confidence": detections.value[rows],
            "iou": scores.iou[rows],
            "other": [label for label, _ in others],
            "other_iou": [iou for _, iou in others],
            "image": [_picture(part, detections, truths, row) for row in rows],
        }
    ).to_parquet(folder / FILE)


def _other(detections: Table, truths: Table, row: int) -> tuple[int, float]:
    """Class of the object of another class that a detection overlaps most, and that overlap; −1 and 0 where none does."""
    near = np.flatnonzero((truths.image == detections.image[row]) & (truths.label != detections.label[row]))
    iou = overlaps(np.repeat(detections.box[[row]], len(near), axis=0), truths.box[near])
    if not len(near) or not iou.max() > 0:
        return -1, 0.0
    return int(truths.label[near[iou.argmax()]]), float(iou.max())


def _picture(part: Part, detections: Table, truths: Table, row: int) -> bytes:
    """The picture of a detection, made smaller, with its objects' boxes and the detection's on top."""
    picture = part.picture(detections.image[row])
    scale = min(1.0, LARGEST / max(picture.size))
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size])
    boxes = [Box(box * scale, TRUE) for box in truths.box[truths.image == detections.image[row]]]
    file = io.BytesIO()
    drawn(picture, [*boxes, Box(detections.box[row] * scale, DETECTED)]).save(file, format="JPEG", quality=85)
    return file.getvalue()
