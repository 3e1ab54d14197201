"""What a finished run is to other people: result.json's contents, and the object that `train` returns."""

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, with_config
from typing_extensions import NotRequired, TypedDict

if TYPE_CHECKING:
    import pandas as pd

TAIL = 8192  # bytes, longer than two lines


@with_config(ConfigDict(extra="allow"))
class EpochFigures(TypedDict):
    """An epoch (from 1) and, by name, each metric's value on the scored part; `chosen_on` names the part that chose it."""

    epoch: int
    chosen_on: NotRequired[str]


class Hardware(TypedDict):
    """What a run was computed on."""

    device: str
    name: str
    cpu_count: int | None
    threads: int


class RunResult(TypedDict):
    """result.json: written once by a run that has finished, read by everything else."""

    name: str
    task: str
    method: str
    seed: int
    metrics: list[dict[str, Any]]  # metrics.Metric as dictionaries; the first one chose the best epoch
    evaluated_on: (
        str  # the part that `last` and `best` were scored on: `test`, or `holdout` where the test part is not read
    )
    last: EpochFigures
    best: EpochFigures
    holdout: NotRequired[dict[str, EpochFigures]]  # `last` and `best` on the held-out part
    seconds: float
    num_train: int
    num_test: int
    num_holdout: int
    num_classes: int
    class_names: list[str]
    data_fingerprint: NotRequired[dict[str, str]]
    num_parameters: int
    num_processes: int
    versions: dict[str, str]
    hardware: Hardware
    teacher: NotRequired[dict[str, Any]]


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


def last_line(path: Path) -> dict | None:
    """The last whole object of a JSON-lines file, read from its end; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        whole = [line for line in file.read().splitlines(keepends=True)[-3:] if line.endswith(b"\n")]
    return json.loads(whole[-1]) if whole else None


@dataclass
class Result:
    """A finished run: its folder and what result.json holds of it.

    Example:
        >>> result = train("digits", {"method": "pskd", "epochs": 2})
        >>> result.last["top1_error"], result.history_frame.columns
    """

    run_dir: Path
    values: RunResult

    @property
    def last(self) -> EpochFigures:
        """Number of the last epoch and its metrics on the scored part."""
        return self.values["last"]

    @property
    def best(self) -> EpochFigures:
        """Number of the best epoch, its metrics on the scored part, and the part it was chosen on."""
        return self.values["best"]

    @property
    def history(self) -> list[dict]:
        """The lines of metrics.jsonl, one an epoch."""
        return read_lines(self.run_dir / "metrics.jsonl")

    @property
    def frame(self) -> "pd.DataFrame":
        """The metrics of the last and of the best epoch on the scored part, a row each."""
        import pandas as pd

        names = [metric["name"] for metric in self.values["metrics"]]
        return pd.DataFrame({"last": self.last, "best": self.best}).T[["epoch", *names]].infer_objects()

    @property
    def history_frame(self) -> "pd.DataFrame":
        """The lines of metrics.jsonl, a row an epoch."""
        import pandas as pd

        return pd.DataFrame(self.history)

    def _repr_html_(self) -> str:
        where = html.escape(f"{self.values['method']}, seed {self.values['seed']}: {self.run_dir}")
        table = self.frame.to_html(formatters={"epoch": "{:.0f}".format}, float_format="{:.2f}".format, border=0)
        return f"<p>{where}</p>{table}"
