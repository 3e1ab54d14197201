"""The settings of translation, for the recipe's page; no torch here."""

from typing import Annotated

from pydantic import Field

from ..section import Count, Names, Section


class Translation(Section):
    source_lang: str = "de"
    """Language to translate: a column's name, a key in the column `translation`, or the ending of plain files (train.de)."""
    target_lang: str = "en"
    """Language to translate into, named likewise."""
    validation_split: str | None = None
    """Split that chooses the best epoch; by default `validation`, `valid`, `val` or `dev`, whichever there is."""
    test_splits: Names = []
    """Splits to score at the end, the first one reported; by default those whose names begin with `test`."""
    lowercase: bool = False
    """Translate lower-cased text into lower-cased text."""
    vocab_size: Annotated[int, Field(ge=300)] = 10_000
    """Pieces of the joint byte-pair encoding, trained on the training part; a pretrained network brings its own."""
    max_length: Annotated[int, Field(ge=4)] = 256
    """Training pairs with more pieces on either side are left out and named; also the longest translation."""
    batch_tokens: Count = 4096
    """Target tokens a step over all processes together, in place of `batch_size`."""
    beam_size: Count = 5
    """Hypotheses that beam search keeps."""
    length_penalty: float = 1.0
    """Exponent of the length that a hypothesis's log-probability is divided by; above 1 translations grow longer."""
