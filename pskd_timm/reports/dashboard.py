"""The comparison as a wandb workspace: what the runs of one recipe logged, one colour a method, mean ± std over seeds."""

import json
from pathlib import Path

from ..errors import InputError, first_line
from ..files import write_atomic
from ..metrics import METRICS, Metric
from ..recipe import Recipe
from ..recipe_files import find_recipe, load_recipe
from ..run.folder import read_metrics, read_result
from ..tasks import task_class
from .plots import COLOURS

TRAINING = {
    "train_loss": "training loss",
    "train_error": "training error %",
    "cross_entropy": "cross-entropy against the label",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
    "alpha": "α",
    "store_bytes": "bytes of the prediction store",
}
CHARTS = {  # as the tracker logs them: a table and its two columns
    "Reliability": ("reliability_table", "confidence", "accuracy"),
    "Risk and coverage": ("risk_coverage_table", "coverage %", "error %"),
    "Confidences": ("confidences_table", "confidence up to", "samples %"),
}


def find_runs(name: str) -> tuple[Path, Recipe]:
    """The folder of a comparison and its recipe, from that folder or from a recipe's file or name."""
    if Path(name).is_dir():
        recipes = sorted(Path(name).glob("*/seed*/recipe.yaml"))
        if not recipes:
            raise InputError(f"{name}: no runs here (they are folders <method>/seed<seed> with a recipe.yaml)")
        return Path(name), load_recipe(str(recipes[0]))
    try:
        find_recipe(name)
    except InputError as error:
        raise InputError(f"there is no folder {name} of runs, and {error}") from None
    recipe = load_recipe(name)
    return recipe.output_root, recipe


def metrics_of(root: Path) -> list[Metric]:
    """The metrics of the runs in a comparison's folder, as the first finished one says; the six of images without one."""
    finished = next(iter(sorted(root.glob("*/seed*/result.json"))), None)
    return read_metrics(read_result(finished.parent)) if finished else list(METRICS.values())


def make_workspace(recipe: Recipe, metrics: list[Metric], entity: str, project: str):
    """wandb_workspaces' Workspace over runs with these `metrics`. Raises InputError where that package is not installed."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise InputError("dashboard needs a package: pip install wandb-workspaces") from None
    over_seeds = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}

    def curve(metric, title, x):
        return panels.LinePlot(title=title, x=x, y=[metric], max_runs_to_show=100, **over_seeds)

    def chart(title):
        table, x, y = CHARTS[title]
        # wandb's own line charts ask for these fields, the last for each run's colour.
        query = {"summaryTable": {"tableKey": table}, "id": None, "name": None, "_defaultColorIndex": None}
        names = {"title": title, "xname": x, "yname": y}
        return panels.CustomChart(query, "wandb/line/v0", {"x": x, "y": y, "stroke": None}, names)

    final = {f"last.{metric.name}": metric.header for metric in metrics}
    bars = [panels.BarPlot(title=f"{title}, last epoch", metrics=[key], **over_seeds) for key, title in final.items()]
    every_epoch = [curve(metric.name, metric.header, "epoch") for metric in metrics if not metric.only_at_end]
    counts = task_class(recipe.task).counts
    known = TRAINING | {f"{counts}_per_second": f"{counts} a second"}
    training = [curve(key, title, "epoch" if "train" in key else "Step") for key, title in known.items()]
    mistakes = panels.WeavePanelSummaryTable(table_name="most_confident_mistakes")
    sections = [
        ws.Section("Over the epochs: mean ± standard deviation over seeds", every_epoch, is_open=True),
        ws.Section("Last epoch on the test part", bars, is_open=True),
        ws.Section("Calibration", [chart(title) for title in CHARTS], is_open=True),
        ws.Section("The most confident mistakes", [mistakes], is_open=True),
        ws.Section("Training", training),
    ]
    runs = ws.RunsetSettings(
        filters=ws.And(ws.Metric("Group") == recipe.name),
        groupby=[ws.Config("method")],
        group_colors=COLOURS,
        order=[ws.Ordering(ws.Metric("CreatedTimestamp"))],
        pinned_columns=["run:displayName", *(f"summary:{key}" for key in final)],  # the final table
    )
    settings = ws.WorkspaceSettings(x_axis="epoch", max_runs=100)
    return ws.Workspace(
        entity, project, f"{recipe.name}: {recipe.model.name}", sections, settings=settings, runset_settings=runs
    )


def dashboard(
    name: str, entity: str | None = None, project: str | None = None, publish: bool = False
) -> tuple[Path, str]:
    """Write the workspace's specification as dashboard.json beside the runs and, with `publish`, put it on wandb.

    Returns the file and the workspace's address, empty where it was not published.
    """
    root, recipe = find_runs(name)
    workspace = make_workspace(
        recipe, metrics_of(root), entity or recipe.tracking.entity or "", project or recipe.tracking.project
    )
    view = workspace._model
    path = root / "dashboard.json"
    root.mkdir(parents=True, exist_ok=True)
    spec = view.spec.model_dump(by_alias=True, exclude_none=True)
    write_atomic(path, json.dumps({"name": view.display_name, "project": view.project, "spec": spec}, indent=1))
    return path, _publish(workspace) if publish else ""


def _publish(workspace) -> str:
    import wandb

    try:
        workspace.entity = workspace.entity or wandb.Api().default_entity
        workspace.save()
    except Exception as error:  # wandb raises errors of its own for a missing account, network or permission
        raise InputError(f"the dashboard cannot be published: {first_line(error)}") from None
    return workspace.url
