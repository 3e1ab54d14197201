"""Translation: pairs of sentences, an encoder–decoder, a target token each row of the prediction store."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .. import rng
from ..errors import InputError
from ..fingerprint import digest
from ..methods.sections import Scale
from ..optim import slow_warmup
from ..progress import readable
from ..ranks import warn_on_main
from ..recipe import Recipe
from ..store import store_bytes
from ..translation import beam
from ..translation.batches import TokenBatches, num_batches
from ..translation.evaluation import METRICS, TokenPredictions, predict_tokens, signatures
from ..translation.network import (
    TranslationNetwork,
    check_name,
    create_network,
    load_translator,
    own_tokenizer,
    save_translator,
    vocabulary_size,
)
from ..translation.sentences import Sentences
from ..translation.text import Corpus, Pairs, read_corpus
from ..translation.tokenizer import encode, train_tokenizer

# Streams of random numbers: the first of the run's seed, the others of data.seed.
WEIGHTS, LIMITED, HELD_OUT = 10, 22, 23
SHARE = 0.25  # of the machine's memory that a prediction store may take
NAMED = 5  # rows that a message names


class Part:
    """A part of the corpus: its pairs, and the pieces of both sides, each with the end's."""

    def __init__(self, pairs: Pairs, tokenizer):
        self.pairs = pairs
        self.sources = Sentences.of(encode(tokenizer, pairs.sources))
        self.targets = Sentences.of(encode(tokenizer, pairs.targets, target=True))

    def take(self, rows: Tensor) -> "Part":
        part = object.__new__(Part)
        part.pairs = self.pairs.take(rows.tolist())
        part.sources, part.targets = self.sources.take(rows), self.targets.take(rows)
        return part


class TranslationTask:
    """A `Task` (see base.py) over the recipe's `translation`, `data` and `model` sections; a target is a token."""

    counts = "tokens"
    metrics = METRICS

    def __init__(self, recipe: Recipe, progress: Callable | None = None):
        check_settings(recipe)
        self.recipe, section = recipe, recipe.translation
        corpus, held_out = divide(read_corpus(recipe), recipe)
        name_shared(corpus)
        self.tokenizer = own_tokenizer(recipe.model) or train_tokenizer(
            corpus.train.sources + corpus.train.targets, section.vocab_size, section.max_length
        )
        self.train = usable(Part(corpus.train, self.tokenizer), section.max_length)
        chosen = {"holdout": held_out} if held_out else {corpus.validation.name: corpus.validation}
        # The last chooses the best epoch, also where it is named among the tests.
        tests = {name: pairs for name, pairs in corpus.tests.items() if name not in chosen}
        self.evaluated = {name: Part(pairs, self.tokenizer) for name, pairs in (tests | chosen).items()}
        self.splits = tuple(self.evaluated)
        name_empty(self.evaluated.values())
        self.labels = self.train.targets.tokens
        self.num_rows = len(self.labels)
        self.num_classes = vocabulary_size(recipe.model, self.tokenizer)
        self.class_names = piece_names(self.tokenizer, self.num_classes)
        parts = [self.train, *self.evaluated.values()]
        self.fingerprint = {
            "class_names": digest(f"{name}\n".encode() for name in self.class_names),
            "samples": digest(
                f"{text}\n".encode() for part in parts for text in [part.pairs.name, *part.pairs.sources]
            ),
            "labels": digest(part.targets.tokens.numpy().tobytes() for part in parts),
        }

    def network(self) -> TranslationNetwork:
        torch.manual_seed(rng.derive_key(self.recipe.seed, WEIGHTS))
        return create_network(self.recipe.model, self.tokenizer)

    def check(self, network: TranslationNetwork, world_size: int):
        batch_tokens, longest = self.recipe.translation.batch_tokens, int(self.train.targets.lengths.max())
        steps = num_batches(self.num_rows, batch_tokens)
        if self.num_rows // steps < longest * world_size:
            raise InputError(
                f"translation.batch_tokens {batch_tokens}: batches of {self.num_rows // steps:,} target tokens are too small "
                f"for {world_size} process{'es' * (world_size > 1)} and targets of up to {longest} tokens"
            )
        self._check_lengths(network)
        check_store(self.recipe, self.num_rows, self.num_classes, world_size)

    def _check_lengths(self, network: TranslationNetwork):
        positions = getattr(network.transformer.config, "max_position_embeddings", None)
        if positions is None:
            return
        if self.recipe.translation.max_length > positions:
            raise InputError(
                f"translation.max_length {self.recipe.translation.max_length} exceeds the {positions} positions that "
                f"{self.recipe.model.name} has"
            )
        for part in self.evaluated.values():
            lengths = part.sources.lengths.maximum(part.targets.lengths)
            if lengths.max() > positions:
                row = int(lengths.argmax())
                raise InputError(
                    f"data: pair {part.pairs.numbers[row]} of the {part.pairs.name} split has {int(lengths[row]):,} pieces, more "
                    f"than the {positions} positions of {self.recipe.model.name}, and no pair of it is left out: shorten it"
                )

    def loader(self, network: TranslationNetwork, device, rank: int, world_size: int, partners: str) -> TokenBatches:
        return TokenBatches(
            self.train.sources,
            self.train.targets,
            self.recipe.translation.batch_tokens,
            network.pad,
            network.start,
            self.recipe.seed,
            device,
            rank,
            world_size,
        )

    def evaluate(
        self,
        network: TranslationNetwork,
        split: str,
        final: bool = False,
        progress: Callable | None = None,
        rows_in: Path | None = None,
    ) -> TokenPredictions:
        """With `final` the sentences are translated too; the probabilities of all pieces are never kept."""
        here = self.evaluated[split]
        outcomes, guesses = predict_tokens(network, here.sources, here.targets, self.recipe.mixed_precision, progress)
        sentence = torch.arange(len(here.targets)).repeat_interleave(here.targets.lengths)
        translations = None
        if final:
            translations = beam.translate(network, self.tokenizer, here.sources, self.recipe.translation, progress)
        return TokenPredictions(outcomes, here.targets.tokens, guesses, sentence, translations, here.pairs.targets)

    def save(self, network: TranslationNetwork, folder: Path):
        save_translator(network, self.tokenizer, folder)

    def load(self, folder: Path) -> TranslationNetwork:
        network, tokenizer = load_translator(folder)
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise InputError(
                f"{folder}: its pieces are not those of the training part: the data are not what they were"
            )
        return network

    def describe(self) -> dict:
        scored = self.splits[0]
        return {
            "num_train": self.num_rows,
            "num_test": 0 if scored == self.splits[-1] else len(self.evaluated[scored].targets.tokens),
            "num_holdout": len(self.evaluated[self.splits[-1]].targets.tokens) if "holdout" in self.splits else 0,
            "num_pairs": {"train": len(self.train.targets)}
            | {name: len(p.targets) for name, p in self.evaluated.items()},
            "num_classes": self.num_classes,
            "class_names": readable_names(self.tokenizer, self.class_names),
            "data_fingerprint": self.fingerprint,
            "sacrebleu": signatures(),
        }

    def cost_lines(self) -> list[str]:
        """Sizes of the data, steps, memory of the prediction store, and what the method costs beside it, a line each."""
        network, recipe = self.network(), self.recipe
        self.check(network, 1)
        sizes = {"train": self.train} | self.evaluated
        pairs = ", ".join(f"{name} {len(part.targets):,}" for name, part in sizes.items())
        steps = num_batches(self.num_rows, recipe.translation.batch_tokens)
        late = slow_warmup(recipe.optim, steps, recipe.epochs)
        lines = [
            f"data: pairs: {pairs}; {self.num_rows:,} target tokens to train on, of {self.num_classes:,} pieces",
            f"steps: {steps} an epoch × {recipe.epochs} epochs = {steps * recipe.epochs:,}",
            self._store_line(),
            *filter(None, [late]),
        ]
        size = readable(sum(weights.nbytes for weights in network.parameters()))
        scale = Scale(self.num_rows, self.num_classes, recipe.epochs, 1.0, lambda: size, self.counts)
        return lines + recipe.method_section.cost_lines(scale)

    def _store_line(self) -> str:
        if self.recipe.method_section.store_settings is None:
            return f"prediction store: none with {self.recipe.method}"
        dtype, topk = self.recipe.method_section.store_settings
        sizes = self.num_rows, self.num_classes, dtype
        parts = [f"{n} rank{'s' * (n > 1)} {readable(store_bytes(*sizes, n, topk))}" for n in (1, 2, 8)]
        of_top = f": the {topk} largest of each token's probabilities; in full {readable(store_bytes(*sizes))}"
        return f"prediction store per rank: {', '.join(parts)}{of_top if topk else ''}"

    def examples(self, split: str, rows: Tensor) -> list[str]:
        """The source of each of the target tokens `rows` [n], and the target up to it."""
        here, found = self.evaluated[split], []
        for row in rows.tolist():
            sentence = int(torch.searchsorted(here.targets.offsets, row, right=True)) - 1
            pieces = here.targets.tokens[here.targets.offsets[sentence] : row]
            found.append(f"{here.pairs.sources[sentence]} → {self.tokenizer.decode(pieces)} …")
        return found


def piece_names(tokenizer, num_classes: int) -> list[str]:
    """What the pieces are called, and those that a network has beyond its tokenizer's."""
    names = tokenizer.convert_ids_to_tokens(range(min(len(tokenizer), num_classes)))
    return names + [f"unused {i}" for i in range(len(names), num_classes)]


def readable_names(tokenizer, names: list[str]) -> list[str]:
    """The pieces called `names` as they read, a blank before one as ␣; a part of a letter stays what it is called."""
    found = []
    for i, name in enumerate(names):
        text = tokenizer.decode([i]).strip() if i < len(tokenizer) else ""
        blank = "␣" if name[:1] in ("Ġ", "▁") else ""  # as byte-level tokenizers and SentencePiece write it
        is_whole = text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text
        found.append(blank + text if blank + text and is_whole else name)
    return found


def check_settings(recipe: Recipe):
    """Raise InputError for settings that do not go with a translation."""
    if recipe.translation.source_lang == recipe.translation.target_lang:
        raise InputError(f"translation.source_lang and target_lang are both {recipe.translation.source_lang!r}")
    check_name(recipe.model)


def check_store(recipe: Recipe, num_rows: int, num_classes: int, world_size: int):
    """Raise InputError where the prediction store of a run would take more than SHARE of the machine's memory."""
    if recipe.method_section.store_settings is None:
        return
    dtype, topk = recipe.method_section.store_settings
    size = store_bytes(num_rows, num_classes, dtype, world_size, topk)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size <= SHARE * memory:
        return
    small = store_bytes(num_rows, num_classes, dtype, world_size, min(20, num_classes - 1))
    raise InputError(
        f"{recipe.method}'s prediction store of {num_rows:,} tokens × {num_classes:,} pieces takes {readable(size)} a rank, "
        f"more than {SHARE:.0%} of {readable(memory)}:\n{recipe.method}.store_topk 20 takes "
        f"{readable(small)}, {recipe.method}.teacher snapshot none"
    )


def divide(corpus: Corpus, recipe: Recipe) -> tuple[Corpus, Pairs | None]:
    """The corpus as the recipe limits it, and the training pairs held out of it, where some are."""
    data = recipe.data
    train, held_out = limited(corpus.train, data.limit_train, data.seed), None
    if data.holdout_fraction:
        count = round(data.holdout_fraction * len(train))
        if not 0 < count < len(train):
            raise InputError(
                f"data.holdout_fraction {data.holdout_fraction:g} has nothing to take of {len(train)} pairs"
            )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(rng.derive_key(data.seed, HELD_OUT)))
        held_out, train = (
            train.take(order[:count].sort().values.tolist()),
            train.take(order[count:].sort().values.tolist()),
        )
    elif corpus.validation is None:
        raise InputError(
            f"data: no validation split among {', '.join(corpus.splits)} to choose the best epoch on: name one with "
            "translation.validation_split, or hold part of the training pairs out with data.holdout_fraction 0.03"
        )
    tests = {name: limited(pairs, data.limit_test, data.seed) for name, pairs in corpus.tests.items()}
    return replace(corpus, train=train, tests=tests), held_out


def name_shared(corpus: Corpus):
    """Name the test splits that hold training pairs, whose figures are too good."""
    known = set(zip(corpus.train.sources, corpus.train.targets, strict=True))
    for name, pairs in corpus.tests.items():
        if shared := sum(pair in known for pair in zip(pairs.sources, pairs.targets, strict=True)):
            warn_on_main(f"data: {shared:,} of the {len(pairs):,} pairs of {name} are training pairs too")


def name_empty(parts: Iterable[Part]):
    """Name the pairs of the scored parts that have an empty side; they are scored all the same."""
    for part in parts:
        rows = (part.sources.lengths.minimum(part.targets.lengths) <= 1).nonzero().squeeze(1).tolist()
        if rows:
            count, named = f"{len(rows):,} of {len(part.pairs):,}", first_of(part.pairs, rows)
            warn_on_main(f"data: scored as they are, {count} pairs of {part.pairs.name} with an empty side: {named}")


def first_of(pairs: Pairs, rows: list[int]) -> str:
    """The numbers of the first few of `rows` in the data, counted from 1 as the lines of a file are."""
    more = f" and {len(rows) - NAMED:,} more" * (len(rows) > NAMED)
    return ", ".join(str(pairs.numbers[row]) for row in rows[:NAMED]) + more


def limited(pairs: Pairs, count: int | None, seed: int) -> Pairs:
    """`count` drawn pairs, in their order, as a function of `seed`; all of them where `count` is None."""
    if count is None or count >= len(pairs):
        return pairs
    drawn = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(rng.derive_key(seed, LIMITED)))
    return pairs.take(drawn[:count].sort().values.tolist())


def usable(train: Part, max_length: int) -> Part:
    """The training pairs that are neither empty nor longer than `max_length` pieces a side; the others are named."""
    shorter, longer = (
        getattr(torch, name)(train.sources.lengths, train.targets.lengths) for name in ("minimum", "maximum")
    )
    empty, long = shorter <= 1, longer > max_length  # the end is a piece too
    kept = (~(empty | long)).nonzero().squeeze(1)
    reasons = {"with an empty side": empty, f"longer than translation.max_length {max_length}": long & ~empty}
    for reason, which in reasons.items():
        rows = which.nonzero().squeeze(1).tolist()
        if rows:
            count, named = f"{len(rows):,} of {len(train.pairs):,}", first_of(train.pairs, rows)
            warn_on_main(f"data: left out of training, {count} pairs {reason}: {named}")
    if not len(kept):
        raise InputError("data: no training pair is left: all are empty or too long")
    return train if len(kept) == len(train.pairs) else train.take(kept)
