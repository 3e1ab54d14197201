"""Where numbers go: metrics.jsonl (a line an epoch), steps.jsonl (a line every few steps), and wandb through Accelerate."""

import json
import secrets
from pathlib import Path

from .files import Lines, write_whole
from .recipe import InputError, Recipe


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


class Tracker:
    """Files of a run folder and, where the recipe asks for it, wandb: the same numbers under the same names."""

    def __init__(self, accelerator, recipe: Recipe, run_dir: Path, steps_per_epoch: int):
        self.accelerator, self.run_dir, self.steps_per_epoch = accelerator, run_dir, steps_per_epoch
        self.is_main = accelerator.is_main_process
        self.files: dict[str, Lines] = {}
        self.uses_wandb = recipe.tracking.wandb != "disabled"
        if self.uses_wandb:
            self._start_wandb(recipe)

    def _start_wandb(self, recipe: Recipe):
        options = {
            "id": self._wandb_id(),
            "resume": "allow",
            "name": f"{recipe.name}/{recipe.method}/seed{recipe.seed}",
            "group": recipe.name,
            "job_type": recipe.method,
            "entity": recipe.tracking.entity,
            "dir": str(self.run_dir),
            "mode": recipe.tracking.wandb,
        }
        try:
            self.accelerator.init_trackers(recipe.tracking.project, recipe.model_dump(), {"wandb": options})
        except Exception as error:  # wandb raises errors of its own for a missing account, network or permission
            raise InputError(
                f"tracking.wandb {recipe.tracking.wandb}: {str(error).splitlines()[0]} (tracking.wandb offline needs no account)"
            ) from None

    def _wandb_id(self) -> str | None:
        """One id for the life of the run: without it a resumed run appears as a second one."""
        path = self.run_dir / "wandb_id"
        if self.is_main and not path.is_file():
            write_whole(path, secrets.token_hex(4))
        return path.read_text() if self.is_main else None

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
            self.accelerator.log({key: value for key, value in values.items() if key != "step"}, step=step)

    def sync(self):
        """Have all lines on the disk; raises OSError."""
        for file in self.files.values():
            file.sync()

    def finish(self):
        if self.uses_wandb:
            self.accelerator.end_training()
