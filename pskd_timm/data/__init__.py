"""Data: sources (digits, HF data sets, image folders) become Splits; a loader turns a Split into batches."""

from .resident import ResidentLoader, eval_batches, eval_part
from .sources import Sizes, known_sizes
from .split import Data, Split, load_data

__all__ = ["Data", "ResidentLoader", "Sizes", "Split", "eval_batches", "eval_part", "known_sizes", "load_data"]
