"""The most confident mistakes of a run, from its predictions, with the pictures or texts that the run has kept of them."""

import base64
import struct
from pathlib import Path

import pandas as pd

from ..metrics import most_confident_mistakes

SHOWN = 6
SMALL = 64  # pixels up to which a picture is enlarged without smoothing


def shown_mistakes(folder: Path, outcomes: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """The rows of a run's `outcomes` that are wrong with the most confidence, and whether the run has kept what they show.

    Beside the columns of `outcomes` there may be `image` (a PNG file's bytes) or `text`.
    """
    rows = most_confident_mistakes(outcomes.confidence.to_numpy(), outcomes.correct.to_numpy(bool), SHOWN)
    wrong = outcomes.iloc[rows]
    if not (folder / "mistakes.parquet").is_file():
        return wrong, len(wrong) == 0
    kept = pd.read_parquet(folder / "mistakes.parquet")
    seen = kept[["index", *(name for name in ("image", "text") if name in kept)]].drop_duplicates("index")
    return wrong.merge(seen, on="index", how="left"), True


def data_uri(picture: bytes, kind: str = "png") -> str:
    """A picture file as a `data:` URI."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def is_small(png: bytes) -> bool:
    """Whether neither side of a PNG picture has more than SMALL pixels."""
    return max(struct.unpack(">II", png[16:24])) <= SMALL
