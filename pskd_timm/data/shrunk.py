"""Training images made smaller once, so that each epoch has less to decode."""

import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from filelock import FileLock
from torchvision.transforms import functional as tv

from ..cpus import num_cpus
from ..errors import InputError, reason
from ..fingerprint import digest
from .decode import CHUNK, DamagedImage, open_image
from .sources import Table

VERSION = 1  # of what a cached file holds; a change makes old files be written again
QUALITY = 95  # of the JPEGs


def shrunk(table: Table, side: int, folder: Path, progress=None):
    """The images of `table`'s `Dataset` as one of a single column, those whose shorter side is longer resized to `side`.

    These are JPEGs, the others as they were. It lies in `folder`, from where other runs read it. `progress(done, total)`
    is called now and then. Raises InputError where it cannot be written.
    """
    from datasets import Features, Image

    images, name = table.encoded_images, table.image_column
    if not isinstance(images.features[name], Image):
        raise InputError(f"data.shrink_to: the column {name} holds no image files, but {images.features[name]}")
    path = folder / f"{digest([f'{VERSION} {table.dataset._fingerprint} {name} {side}'.encode()])}.arrow"

    def shrink_all(batch: dict, rows: list[int]) -> dict:
        smaller = list(pool.map(partial(_shrink, side=side), batch[name], rows))
        if progress:
            progress(rows[-1] + 1, len(images))
        return {name: smaller}

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # PIL works outside the interpreter lock, so threads help. Of several processes one writes, the others wait.
        with FileLock(f"{path}.lock"), ThreadPoolExecutor(num_cpus()) as pool:
            return images.map(
                shrink_all,
                with_indices=True,
                batched=True,
                batch_size=CHUNK,
                writer_batch_size=CHUNK,
                features=Features({name: Image(decode=False)}),
                cache_file_name=str(path),
                new_fingerprint=path.stem,
            )
    except OSError as error:
        raise InputError(f"data.shrink_to: the smaller images cannot be kept in {folder}: {reason(error)}") from None


def _shrink(stored, row: int, side: int) -> dict:
    """A stored image as {bytes, path}; one that cannot be decoded stays as it is, to be named where it is shown."""
    try:
        image = open_image(stored, row)
    except DamagedImage:
        return stored
    if min(image.size) <= side:
        return stored
    file = io.BytesIO()
    tv.resize(image, side, tv.InterpolationMode.BICUBIC).save(file, "JPEG", quality=QUALITY)
    return {"bytes": file.getvalue(), "path": stored["path"]}
