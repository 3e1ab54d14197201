"""What a run has kept of each scored sample, as the network said it or at a temperature, and the figures that this gives."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow import ArrowException

from ..calibration import kept_probabilities, probability_parts, scaled_outcomes, with_temperature
from ..floors import FLOORED, EceFloor, classwise_floor, ece_floor
from ..metrics import (
    OF_ROWS,
    Outcomes,
    further_of_outcomes,
    further_of_rows,
    squared_errors,
    summarize,
)

SCALED_METRICS = ("nll", "ece", "aurc", "eaurc")  # which a temperature changes


@dataclass
class Kept:
    """A file of predictions; with a `temperature` its confidences, and all figures of them, are those after scaling."""

    path: Path
    temperature: float = 1.0

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Probabilities [n, K] and labels [n], part by part."""
        for probabilities, labels, _ in probability_parts(self.path):
            yield probabilities if self.temperature == 1 else with_temperature(probabilities, self.temperature), labels

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """Each sample's confidence, correct and nll; a temperature leaves the predictions, and with them `correct`."""
        if self.temperature == 1:
            return pd.read_parquet(self.path, columns=["confidence", "correct", "nll"])
        found = scaled_outcomes(probability_parts(self.path), self.temperature)
        return pd.DataFrame(dict(zip(("confidence", "correct", "nll"), found, strict=True)))

    def scaled_figures(self) -> dict[str, float]:
        """SCALED_METRICS, in their units."""
        correct = self.outcomes.correct.to_numpy(bool)
        found = summarize(Outcomes(self.outcomes.confidence.to_numpy(), correct, correct, self.outcomes.nll.to_numpy()))
        return {name: found[name] for name in SCALED_METRICS}

    def further(self, names: Iterable[str]) -> dict[str, float]:
        """Those of FURTHER_METRICS among `names` that the file tells."""
        names = list(names)
        confidence, correct = self.outcomes.confidence.to_numpy(), self.outcomes.correct.to_numpy(bool)
        return further_of_outcomes(confidence, correct, names) | self.of_rows(
            lambda: further_of_rows(self.parts(), names)
        )

    def squared_errors(self) -> np.ndarray:
        """Each sample's Brier score [N]."""
        return np.concatenate([squared_errors(*part) for part in self.parts()])

    def floors(self, names: Iterable[str]) -> dict[str, EceFloor]:
        """What perfect calibration would measure with these confidences, of those among `names` that are FLOORED."""
        names, confidence = list(names), self.outcomes.confidence.to_numpy()
        if not len(confidence):  # a detector that found nothing
            return {}
        found = {name: ece_floor(confidence, name) for name in names if name in FLOORED and name not in OF_ROWS}
        if "classwise_ece" not in names:
            return found

        def floor() -> dict[str, EceFloor]:
            return {"classwise_ece": classwise_floor((rows for rows, _ in self.parts()), len(confidence))}

        return found | self.of_rows(floor)

    def of_rows(self, figures: Callable[[], dict]) -> dict:
        """What `figures` makes of the probabilities; nothing where there are none, or their column cannot be read."""
        try:
            return figures() if kept_probabilities(self.path) else {}
        except (ArrowException, OSError):
            return {}
