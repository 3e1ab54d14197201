"""A finished run's network on sentences of one's own."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..errors import InputError
from ..run.folder import read_recipe, read_result
from ..run.launch import prepare_scoring
from . import beam
from .network import load_translator
from .sentences import Sentences
from .text import clean
from .tokenizer import decode, encode


def translate(
    run: str | Path,
    lines: Sequence[str],
    best: bool = False,
    confidences: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict]:
    """What a finished run's network makes of `lines`: {"source", "translation"} for each, empty ones staying empty.

    With `confidences` also "tokens", [{"token", "confidence"}, …], the probability of each piece given those before it, the
    end's last, and "confidence", the product of these; of an empty line none and None. `best` takes the best epoch's network
    instead of the last's; `progress(what, done, total)` is called now and then. Raises InputError where there is no such run,
    or a line is too long.

    Example:
        >>> translate("runs/translation-multi30k_de_en/pskd/seed0", ["Ein Hund läuft."])
    """
    run = Path(run).expanduser()
    recipe = read_recipe(run)
    if recipe.task != "translation":
        raise InputError(f"{run}: a run of task {recipe.task}, which translates nothing")
    read_result(run)  # the run is finished
    network, tokenizer = load_translator(run / "best" if best else run)
    network = network.to(prepare_scoring(recipe)).eval()
    cleaned = [clean(line, recipe.translation.lowercase) for line in lines]
    rows = [row for row, text in enumerate(cleaned) if text]
    sources = Sentences.of(encode(tokenizer, [cleaned[row] for row in rows]))
    positions = getattr(network.transformer.config, "max_position_embeddings", None)
    if len(rows) and positions and sources.lengths.max() > positions:
        worst = int(sources.lengths.argmax())
        raise InputError(
            f"line {rows[worst] + 1} has {int(sources.lengths[worst]):,} pieces, more than the {positions:,} positions of the "
            "network: divide it into sentences"
        )
    unsaid = {"confidence": None, "tokens": []} if confidences else {}  # of an empty line
    found = [{"source": line, "translation": "", **unsaid} for line in lines]
    done = 0
    for batch in beam.source_batches(sources):
        pieces = beam.search(network, sources, batch, recipe.translation)
        sure = beam.confidences(network, sources, batch, pieces) if confidences else [None] * len(pieces)
        for place, text, mine, of_pieces in zip(batch.tolist(), decode(tokenizer, pieces), pieces, sure, strict=True):
            found[rows[place]] |= {"translation": text} | (_told(tokenizer, mine, of_pieces) if confidences else {})
        done += len(batch)
        if progress:
            progress("translating", done, len(rows))
    return found


def _told(tokenizer, pieces: list[int], confidences: list[float]) -> dict:
    """Each piece as it reads, with its confidence, and that of all."""
    words = [tokenizer.decode([piece]) for piece in pieces]
    tokens = [{"token": word, "confidence": sure} for word, sure in zip(words, confidences, strict=True)]
    return {"confidence": torch.tensor(confidences).double().prod().item(), "tokens": tokens}
