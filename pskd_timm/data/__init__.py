"""Data: sources (digits, HF data sets, image folders) become Splits; a loader turns a Split into batches."""

from .loader import Loader, eval_batches, eval_part, read_images
from .sources import Sizes, known_sizes
from .split import Data, Split, load_data
from .streaming import StreamedSplit

__all__ = [
    "Data",
    "Loader",
    "Sizes",
    "Split",
    "StreamedSplit",
    "eval_batches",
    "eval_part",
    "known_sizes",
    "load_data",
    "read_images",
]
