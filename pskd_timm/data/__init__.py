"""Data: sources (digits, HF data sets, image folders) become Splits; a loader turns a Split into batches."""

from .loader import Loader, eval_batches, eval_part, read_images
from .split import Split, load_data

__all__ = [
    "Loader",
    "Split",
    "eval_batches",
    "eval_part",
    "load_data",
    "read_images",
]
