"""The samples that a finished run was wrong about with the most confidence, with a picture or the text of each."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from ..metrics import most_confident_mistakes
from ..outcomes import Predictions

MISTAKES = 24
LARGEST = 112  # pixels of a picture's longer side


def find_mistakes(predictions: Predictions, examples: Callable[[torch.Tensor], list]) -> pd.DataFrame:
    """A row a mistake: where it comes from, label, prediction, confidence, `image` (uint8 [H, W, C]) or `text`.

    `examples(rows)` gives what samples look like, as arrays or texts.
    """
    each = predictions.outcomes
    rows = most_confident_mistakes(np.asarray(each.confidence), np.asarray(each.correct), MISTAKES)
    shown = examples(torch.from_numpy(rows)) if len(rows) else []
    kind = "text" if shown and isinstance(shown[0], str) else "image"
    columns = {
        **{name: [values[row] for row in rows] for name, values in predictions.source.items()},
        "label": predictions.labels.numpy()[rows],
        "prediction": predictions.guesses.numpy()[rows],
        "confidence": np.asarray(each.confidence)[rows],
        kind: list(shown),
    }
    return pd.DataFrame(columns)


def write_mistakes(run_dir: Path, mistakes: pd.DataFrame):
    """Write mistakes.parquet: `find_mistakes`' rows, each image as a PNG file's bytes, at most 112 pixels wide and high."""
    if "image" in mistakes:
        mistakes = mistakes.assign(image=[_thumbnail(pixels) for pixels in mistakes.image])
    mistakes.to_parquet(run_dir / "mistakes.parquet")


def _thumbnail(pixels: np.ndarray) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((LARGEST, LARGEST))
    image.save(file, format="PNG")
    return file.getvalue()
