"""The most confident mistakes as pictures: only their images are decoded, and nothing is downloaded for them."""

import base64
import io
import json
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from ..data import load_data
from ..errors import InputError
from ..recipe import Recipe

LARGEST = 112  # pixels of a picture's longer side
SMALL = 64  # up to which side a picture is kept without loss


def most_confident_mistakes(table: pd.DataFrame, count: int = 6) -> pd.DataFrame:
    """The `count` rows of a run's predictions that are wrong with the most confidence."""
    return table[~table.correct].sort_values("confidence", ascending=False, kind="stable").head(count)


def pictures(recipe: Recipe, mistakes: pd.DataFrame, image_size: tuple[int, int]) -> dict[int, str]:
    """Index in the part that was scored → `data:` URI, for `mistakes`' rows. Raises InputError where images cannot be had."""
    section = recipe.data
    if section.source != "digits" and not section.gaussian_noise and image_size[0] == image_size[1]:
        # Streaming decodes what is asked for; the network saw the same, since it is resized to the size it has.
        section = section.model_copy(update={"loading": "streaming", "image_size": image_size[0], "workers": 0})
    with _offline():
        data = load_data(section, recipe.augment)
    test = data.test or data.holdout  # as train scores
    ids = torch.tensor(mistakes["index"].to_numpy())
    if ids.max() >= len(test) or not torch.equal(test.labels[ids], torch.tensor(mistakes["label"].to_numpy())):
        raise InputError("the data set has changed since the runs were tested")
    _, (images,) = next(iter(test.stream([(ids, [(ids, None)])])))
    return {int(i): data_uri(image.permute(1, 2, 0).numpy()) for i, image in zip(ids, images, strict=True)}


def data_uri(pixels) -> str:
    """uint8 pixels [H, W, 3] as a `data:` URI, at most LARGEST pixels wide and high."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    small = max(image.size) <= SMALL
    image.thumbnail((LARGEST, LARGEST))
    image.save(file, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


@contextmanager
def _offline():
    """While active, data sets of the hub are taken from its cache or not at all: a report downloads nothing."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def image_size(folder: Path) -> tuple[int, int]:
    """Height and width that a finished run's network was made for. Raises InputError where config.json does not say."""
    try:
        return tuple(json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"][1:])
    except (ValueError, TypeError, LookupError):
        raise InputError(f"{folder / 'config.json'} is damaged") from None
