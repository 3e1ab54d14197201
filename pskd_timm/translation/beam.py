"""Beam search over many sentences, by transformers' `generate`, and how sure the network is of what it found."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import ranks
from ..order import even_slice
from .batches import by_length, make_inputs
from .network import TranslationNetwork
from .section import Translation
from .sentences import Sentences
from .tokenizer import decode

BATCH_TOKENS = 1024  # source tokens translated together; each has `beam_size` hypotheses


def translate(
    network: TranslationNetwork,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sentences,
    section: Translation,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """The translation of each of `sources`, in their order; each rank translates whole batches (all call it together)."""
    rank, world_size = ranks.rank_and_world_size()
    network.eval()
    batches = source_batches(sources)
    mine = batches[even_slice(len(batches), rank, world_size)]
    found: dict[int, str] = {}
    for done, rows in enumerate(mine, 1):
        found |= zip(rows.tolist(), decode(tokenizer, search(network, sources, rows, section)), strict=True)
        if progress:
            progress("translating", done, len(mine))
    everything = {row: text for part in ranks.all_gather_objects(found) for row, text in part.items()}
    return [everything[row] for row in range(len(sources))]


def source_batches(sources: Sentences) -> list[Tensor]:
    """The rows of `sources` in batches of similar lengths, the longest first: no later one needs more memory."""
    if not len(sources):
        return []
    return [rows for rows in by_length(sources.lengths, sources.lengths, BATCH_TOKENS) if len(rows)][::-1]


@torch.no_grad()
def search(network: TranslationNetwork, sources: Sentences, rows: Tensor, section: Translation) -> list[list[int]]:
    """The best hypothesis of each of `rows` [B] of `sources`: its pieces up to the end's, which a cut-off one lacks."""
    source, _ = sources.padded(rows, network.pad)
    source = source.to(network.device)
    found = network.transformer.generate(
        input_ids=source,
        attention_mask=(source != network.pad).long(),
        num_beams=section.beam_size,
        length_penalty=section.length_penalty,
        max_new_tokens=section.max_length,
        do_sample=False,
    )
    return [_without_padding(pieces, network) for pieces in found[:, 1:].tolist()]  # the first is the start


def _without_padding(pieces: list[int], network: TranslationNetwork) -> list[int]:
    end = network.end
    return pieces[: pieces.index(end) + 1] if end in pieces else [piece for piece in pieces if piece != network.pad]


@torch.no_grad()
def confidences(
    network: TranslationNetwork, sources: Sentences, rows: Tensor, found: list[list[int]]
) -> list[list[float]]:
    """The probability, given those before it, of each piece of the translation `found` of each of `rows` [B]."""
    targets = Sentences.of(found)
    everything = torch.arange(len(found))
    inputs = make_inputs(sources.take(rows), targets, everything, network.pad, network.start)
    probabilities = network(tuple(tensor.to(network.device) for tensor in inputs)).float().softmax(dim=1)
    chosen = probabilities.gather(1, targets.tokens.to(network.device)[:, None]).squeeze(1).cpu()
    return [part.tolist() for part in chosen.split(targets.lengths.tolist())]
