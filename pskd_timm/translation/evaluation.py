"""What a network says of each target token, and of each sentence as a whole."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import metrics, ranks
from ..errors import Diverged
from ..losses import at_least_float32
from ..metrics import Metric, Outcomes
from ..order import even_slice
from ..outcomes import batch_outcomes
from ..run.launch import autocast
from .batches import by_length, make_inputs
from .network import TranslationNetwork
from .sentences import Sentences

METRICS = (
    *metrics.METRICS.values(),  # over target tokens
    Metric("bleu", "BLEU", digits=1, higher_is_better=True, only_at_end=True),
    Metric("bleu_lowercase", "BLEU lower-cased", digits=1, higher_is_better=True, in_brief=False, only_at_end=True),
    Metric("chrf", "chrF", digits=1, higher_is_better=True, in_brief=False, only_at_end=True),
)
BATCH_TOKENS = 2048  # target tokens looked at together: their probabilities of all pieces fit into memory


@dataclass
class TokenPredictions:
    """Each target token's outcome, label, most probable piece and sentence [T]; the translations, where they were made."""

    outcomes: Outcomes
    labels: Tensor
    guesses: Tensor
    sentence: Tensor
    translations: list[str] | None
    references: list[str]

    @property
    def source(self) -> dict:
        """The column that says where each token comes from."""
        return {"index": np.arange(len(self.labels))}

    def score(self) -> dict[str, float]:
        """The six metrics over all target tokens and, where there are translations, BLEU and chrF by sacreBLEU.

        The perplexity of a piece is exp(`nll`); `bleu_lowercase` is BLEU of lower-cased text, as older papers have it.
        """
        found = metrics.summarize(self.outcomes)
        if self.translations is not None:
            given = self.translations, [self.references]
            found |= {name: metric.corpus_score(*given).score for name, metric in scorers().items()}
        return found

    def write(self, path: Path):
        """A Parquet file with a row a token: index, group (its sentence), label, prediction, confidence, correct, nll.

        Where sentences were translated, `translations.jsonl` beside it, named after it, has them and their references.
        """
        import json

        import pyarrow
        from pyarrow import parquet

        columns = {
            **self.source,
            "group": self.sentence.numpy(),
            "label": self.labels.numpy(),
            "prediction": self.guesses.numpy(),
            **{name: np.asarray(values) for name, values in self.outcomes._asdict().items()},
        }
        parquet.write_table(pyarrow.table(columns), path)
        if self.translations is not None:
            rows = zip(self.translations, self.references, strict=True)
            lines = [json.dumps({"translation": t, "reference": r}, ensure_ascii=False) + "\n" for t, r in rows]
            path.with_suffix(".translations.jsonl").write_text("".join(lines), encoding="utf-8")


def scorers() -> dict:
    """sacreBLEU's metrics by name: BLEU as it is by default (13a, cased), of lower-cased text, and chrF."""
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU(), "bleu_lowercase": BLEU(lowercase=True), "chrf": CHRF()}


def signatures() -> dict[str, str]:
    """sacreBLEU's signature of each score, which says how to compute it again."""
    found = {}
    for name, metric in scorers().items():
        metric.corpus_score(["a"], [["a"]])  # before it has scored something a signature does not know of how many
        found[name] = str(metric.get_signature())
    return found


@torch.no_grad()
def predict_tokens(
    network: TranslationNetwork,
    sources: Sentences,
    targets: Sentences,
    mixed_precision: str = "no",
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Outcomes, Tensor]:
    """Outcome and most probable piece [T] of each target token, given those before it, in eval mode.

    Each rank looks at whole batches, the same ones on any number of ranks; the result is on each rank, on the CPU.
    """
    ranks.copy_buffers_from_main(network)
    network.eval()
    batches = [pairs for pairs in by_length(sources.lengths, targets.lengths, BATCH_TOKENS) if len(pairs)]
    sizes = torch.tensor([int(targets.lengths[batch].sum()) for batch in batches])
    mine, parts = _shares(sizes)
    device = next(network.parameters()).device
    found = [_look(network, sources, targets, torch.empty(0), mixed_precision, device)]
    for done, batch in enumerate(batches[mine], 1):
        found.append(_look(network, sources, targets, batch, mixed_precision, device))
        if progress:
            progress("evaluating", done, mine.stop - mine.start)
    places = targets.places(torch.cat(batches))
    columns = [torch.cat(each) for each in zip(*found, strict=True)]
    *each, guesses = (_in_order(ranks.gather_rows(column, parts), places) for column in columns)
    outcomes = Outcomes(*(column.numpy() for column in each))
    if wrong := int((~np.isfinite(outcomes.nll)).sum()):
        raise Diverged(f"the network's outputs are not finite for {wrong} of {len(places)} evaluated tokens")
    return outcomes, guesses


def _shares(sizes: Tensor) -> tuple[slice, list[slice]]:
    """This rank's batches, and the rows of every rank, of batches of `sizes` rows each."""
    rank, world_size = ranks.rank_and_world_size()
    batches = [even_slice(len(sizes), part, world_size) for part in range(world_size)]
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).tolist()
    return batches[rank], [slice(ends[part.start], ends[part.stop]) for part in batches]


def _look(network, sources, targets, pairs, mixed_precision, device) -> tuple[Tensor, ...]:
    """Outcomes and most probable pieces of the target tokens of `pairs` [B], on the CPU."""
    if not len(pairs):
        types = (torch.float32, torch.bool, torch.bool, torch.float64, torch.int64)
        return tuple(torch.empty(0, dtype=dtype) for dtype in types)
    inputs = make_inputs(sources, targets, pairs, network.pad, network.start)
    labels = targets.tokens[targets.places(pairs)].to(device)
    with autocast(device, mixed_precision):
        logits = network(tuple(tensor.to(device) for tensor in inputs))
    logits = at_least_float32(logits)
    probabilities = logits.softmax(dim=1)
    each = batch_outcomes(logits, probabilities, labels)
    return tuple(column.cpu() for column in (*each, probabilities.argmax(dim=1)))


def _in_order(column: Tensor, places: Tensor) -> Tensor:
    return torch.empty_like(column).index_copy_(0, places, column)
