"""The figures of a large test set."""

import torch

from .. import metrics
from .rounds import peak, ratio, rounds

TITLE = "the six figures of 50 000 × 1000 probabilities"
OPTIONS = ()
SAMPLES, CLASSES = 50_000, 1_000


def measure(say) -> list[dict]:
    """Seconds, and the most memory held while it runs as a multiple of the table's, the table included."""
    probabilities = torch.rand(SAMPLES, CLASSES).pow_(8)
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    labels = torch.randint(CLASSES, (SAMPLES,))

    def work():
        metrics.score(probabilities, labels)

    row = ratio(rounds({"score": work}, seconds=3.0), "score", "score")
    row = {"seconds": row["seconds"], "rounds": row["rounds"]}
    row["memory_ratio"] = 1.0 + peak(work) / probabilities.nbytes
    say(f"  {row['seconds']:.2f} s (median of {row['rounds']}), memory {row['memory_ratio']:.2f} × the table's")
    return [row]
