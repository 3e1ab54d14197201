"""Where numbers go: metrics.jsonl (a line an epoch), steps.jsonl (a line every few steps), and wandb through Accelerate."""

import math
import os
import re
import secrets

import numpy as np
import pandas as pd
from accelerate import Accelerator

from ..errors import InputError, first_line
from ..files import Lines, without_nan, write_atomic
from ..floors import ece_floor
from ..metrics import Outcomes, reliability_bins, risk_curve, thinned
from ..outcomes import Predictions
from ..recipe import Recipe, data_name
from ..tasks.base import Task
from .result import read_lines

MOST_POINTS = 200  # of a curve


def tags(recipe: Recipe) -> list[str]:
    """Data set, network, seed and the recipe's own tags; wandb takes 64 characters of each."""
    found = [data_name(recipe.data), recipe.model.name, f"seed{recipe.seed}", *recipe.tracking.tags]
    return [tag[:64] for tag in dict.fromkeys(found)]


def bin_rows(each: Outcomes) -> list[list[float | None]]:
    """For each of ECE's bins: upper edge, mean confidence, accuracy (None where it is empty), share of the samples in %."""
    bins = reliability_bins(each.confidence, each.correct)
    rows = np.stack([*bins[:3], 100 * bins.fraction], axis=1)
    return [[None if math.isnan(value) else value for value in row] for row in rows.tolist()]


def risk_rows(each: Outcomes) -> list[list[float]]:
    """At most MOST_POINTS of the risk–coverage curve: coverage in %, error among the covered in %."""
    risk = 100 * risk_curve(each.confidence, each.correct)
    kept = thinned(len(risk), MOST_POINTS)
    return np.stack([100 * (kept + 1) / len(risk), risk[kept]], axis=1).tolist()


class Tracker:
    """Files of a run folder and, where the recipe asks for it, wandb: the same numbers under the same names."""

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        task: Task,
        steps_per_epoch: int,
        quiet: bool = False,
    ):
        self.accelerator, self.steps_per_epoch, self.task = accelerator, steps_per_epoch, task
        self.run_dir = recipe.run_dir
        self.is_main, self.recipe = accelerator.is_main_process, recipe
        self.files: dict[str, Lines] = {}
        self.uses_wandb, self.quiet = recipe.tracking.wandb != "disabled", quiet

    def __enter__(self):
        if self.uses_wandb:
            self._start_wandb(self.recipe, self.quiet)
        if self.uses_wandb and self.is_main:
            self.wandb_run = self.accelerator.get_tracker("wandb", unwrap=True)
            self._define_metrics()
        return self

    def _start_wandb(self, recipe: Recipe, quiet: bool):
        options = {
            "id": self._wandb_id(),
            "resume": "allow",
            "name": f"{recipe.name}/{recipe.method}/seed{recipe.seed}",
            "group": recipe.name,
            "job_type": recipe.method,
            "tags": tags(recipe),
            "notes": recipe.tracking.notes,
            "entity": recipe.tracking.entity,
            "dir": str(self.run_dir),
            "mode": recipe.tracking.wandb,
            # Offline there is nothing to look at yet: its lines would bury the run's own.
            "settings": {"silent": quiet or recipe.tracking.wandb == "offline"},
        }
        try:
            self.accelerator.init_trackers(recipe.tracking.project, recipe.model_dump(), {"wandb": options})
        except Exception as error:  # wandb raises errors of its own for a missing account, network or permission
            raise InputError(
                f"tracking.wandb {recipe.tracking.wandb}: {first_line(error)} (tracking.wandb offline needs no account)"
            ) from None

    def _wandb_id(self) -> str | None:
        """One id for the life of the run: without it a resumed run appears as a second one."""
        path = self.run_dir / "wandb_id"
        if self.is_main and not path.is_file():
            # A sweep knows its runs by ids of its own.
            of_sweep = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
            write_atomic(path, of_sweep or secrets.token_hex(4))
        return path.read_text() if self.is_main else None

    def _define_metrics(self):
        self.wandb_run.define_metric("epoch")
        for metric in self.task.metrics:
            best = "max" if metric.higher_is_better else "min"
            self.wandb_run.define_metric(metric.name, step_metric="epoch", summary=f"{best},last")
        for name in ("train_loss", "train_error"):
            self.wandb_run.define_metric(name, step_metric="epoch", summary="min,last")
        self.wandb_run.define_metric(f"{self.task.counts}_per_second", step_metric="epoch", summary="max,last")

    def forget_after(self, epoch: int, step: int):
        """Drop lines that a run resumed at (epoch, step) is about to write again."""
        if self.is_main:
            self._open("metrics.jsonl", lambda line: line["epoch"] <= epoch)
            self._open("steps.jsonl", lambda line: line["step"] <= epoch * self.steps_per_epoch + step)

    def _open(self, name: str, wanted):
        path = self.run_dir / name
        self.files[name] = Lines(path, [line for line in read_lines(path) if wanted(line)])

    def log_step(self, step: int, values: dict):
        """A line of steps.jsonl; `step` counts from the start of the run."""
        self._log("steps.jsonl", step, {"step": step, **values})

    def log_epoch(self, step: int, values: dict):
        """A line of metrics.jsonl; `values` has the number of the epoch (from 1) and its figures."""
        self._log("metrics.jsonl", step, values)

    def _log(self, name: str, step: int, values: dict):
        if self.is_main:
            self.files[name].add(values)
        if self.uses_wandb:
            # A gap says of a number that is none what metrics.jsonl says with null.
            shown = {key: value for key, value in without_nan(values).items() if key != "step" and value is not None}
            self.accelerator.log(shown, step=step)

    def log_result(self, values: dict, predictions: Predictions, mistakes: pd.DataFrame):
        """The end of a run, on the main rank: figures, charts, mistakes and, where the recipe asks for it, the weights.

        `values` are result.json's, `mistakes` those of run/mistakes.py.
        """
        if not self.uses_wandb:
            return
        import wandb

        each = Outcomes(*map(np.asarray, predictions.outcomes))
        floor = {}
        if "ece" in values["last"]:
            floor = {"ece_if_calibrated": ece_floor(each.confidence)._asdict()}
        bins = wandb.Table(["confidence up to", "confidence", "accuracy", "samples %"], bin_rows(each))
        filled = wandb.Table(["confidence", "accuracy"], [row[1:3] for row in bins.data if row[1] is not None])
        risk = wandb.Table(["coverage %", "error %"], risk_rows(each))
        charts = {
            "reliability": wandb.plot.line(filled, "confidence", "accuracy", title="Reliability"),
            "risk_coverage": wandb.plot.line(risk, "coverage %", "error %", title="Risk and coverage"),
            "confidences": wandb.plot.bar(bins, "confidence up to", "samples %", title="Confidences"),
            "most_confident_mistakes": self._mistakes_table(mistakes, values["class_names"]),
        }
        self.wandb_run.log(charts, step=self.recipe.epochs * self.steps_per_epoch)
        self.wandb_run.summary.update({key: values[key] for key in ("last", "best", "num_parameters")} | floor)
        if self.recipe.tracking.artifact:
            self.wandb_run.log_artifact(self._artifact(values))

    @staticmethod
    def _mistakes_table(mistakes: pd.DataFrame, names: list[str]):
        """wandb's table of a run's most confident mistakes; `sample` is the row in the source."""
        import wandb

        shown = [wandb.Image(pixels) for pixels in mistakes.image] if "image" in mistakes else mistakes.text
        columns = {
            "image": shown,
            "label": [names[k] for k in mistakes.label],
            "prediction": [names[k] for k in mistakes.prediction],
            "confidence": mistakes.confidence.tolist(),
            "sample": mistakes["index"].tolist(),
            **({"path": mistakes.path} if "path" in mistakes else {}),
        }
        return wandb.Table(list(columns), [list(row) for row in zip(*columns.values(), strict=True)])

    def _artifact(self, values: dict):
        import wandb

        name = f"{self.recipe.name}-{self.recipe.method}-seed{self.recipe.seed}"
        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9._-]", "-", name), "model", metadata=values)
        for name in ("model.safetensors", "config.json", "best/model.safetensors", "best/config.json", "recipe.yaml"):
            artifact.add_file(str(self.run_dir / name), name)
        return artifact

    def sync(self):
        """Have all lines on the disk; raises OSError."""
        for file in self.files.values():
            file.sync()

    def __exit__(self, *_):
        # Accelerate's end_training would part the processes too, which may have another run before them.
        for tracker in self.accelerator.trackers:
            tracker.finish()
