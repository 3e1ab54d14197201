"""wandb offline, read back with its own reader."""

import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from commands import LIMIT, cli
from pskd_timm import METHODS, load_recipe, train
from pskd_timm.cli import main
from pskd_timm.data import load_data
from pskd_timm.floors import ece_floor
from pskd_timm.metrics import ECE_BINS, METRICS
from pskd_timm.options import make_parser
from pskd_timm.recipe_files import SHIPPED
from pskd_timm.reports.plots import COLOURS
from pskd_timm.run.result import read_lines
from pskd_timm.run.tracking import Tracker
from pskd_timm.tasks import open_task

SWEEP = yaml.safe_load((SHIPPED / "sweep.yaml").read_text())


def inspect(run_folder, *options):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(run_folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT).stdout


def records(run_folder):
    return [json.loads(line) for line in inspect(run_folder).splitlines()]


def summary(run_folder):
    return json.loads(inspect(run_folder, "--summary"))


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A finished run with wandb offline: its folder, wandb's records and wandb's summary of it."""
    settings = {
        "epochs": 2,
        "model.kwargs.width": 4,
        "output_dir": str(tmp_path_factory.mktemp("tracked")),
        "tracking.wandb": "offline",
        "tracking.project": "mine",
        "tracking.tags": ["first look"],
        "tracking.notes": "does it learn?",
        "tracking.artifact": True,
        "tracking.log_every": 5,
    }
    run_dir = train(load_recipe("digits", settings)).run_dir
    folder = next((run_dir / "wandb").glob("offline-run-*"))
    return run_dir, records(folder), summary(folder)


def of_type(found, kind):
    return [record[kind] for record in found if record["type"] == kind]


def logged(found, key):
    """Every value that wandb's history has of `key`."""
    return [row["item"][key] for row in of_type(found, "history") if key in row["item"]]


def table(run_dir, name):
    path = next(run_dir.glob(f"wandb/offline-run-*/files/media/table/{name}_*.table.json"))
    return pd.DataFrame(json.loads(path.read_text())["data"], columns=json.loads(path.read_text())["columns"])


def test_wandb_gets_the_files_numbers_under_the_same_names(tracked):
    run_dir, found, ending = tracked
    for file, count in (("metrics.jsonl", 2), ("steps.jsonl", 7)):
        lines = read_lines(run_dir / file)
        assert len(lines) == count
        for key in lines[0].keys() - {"step", "epoch", "lr", "alpha"}:
            assert logged(found, key) == pytest.approx([line[key] for line in lines]), key
    assert {"loss", "error", "cross_entropy", "last_cross_entropy", "grad_norm", "lr", "alpha"} < set(lines[0])
    assert {"store_bytes", "images_per_second", "train_loss", "train_error", *METRICS} < set(ending["summary"])
    assert logged(found, "store_bytes") == [1200 * (10 * 2 + 1)] * 2 and ending["summary"]["_step"] == 2 * 19
    assert logged(found, "alpha")[-1] == pytest.approx(0.8) and logged(found, "lr")[0] == 0.1


def test_wandb_draws_over_epochs_and_keeps_the_lowest_of_what_should_be_low(tracked):
    run_dir, found, ending = tracked
    metrics = {record["name"]: record for record in of_type(found, "metric")}
    history = pd.DataFrame(read_lines(run_dir / "metrics.jsonl"))
    for name in METRICS:
        assert metrics[name]["step_metric"] == "epoch"
        assert ending["summary"][name] == pytest.approx({"min": history[name].min(), "last": history[name].iloc[-1]})
    assert ending["summary"]["images_per_second"]["max"] == history.images_per_second.max()


def test_wandb_has_the_recipe_as_config_and_files_the_run_by_recipe_method_and_tags(tracked):
    run_dir, found, ending = tracked
    resolved = load_recipe(str(run_dir / "recipe.yaml")).model_dump()
    assert {key: ending["config"].get(key, {}) for key in resolved} == resolved
    assert ending["project"] == "mine" and ending["name"] == "digits/pskd/seed0"
    assert ending["notes"] == "does it learn?"
    assert set(ending["tags"]) == {"digits", "cifar_preact_resnet_tiny", "seed0", "first look"}
    run = of_type(found, "run")[0]
    assert (run["run_group"], run["job_type"]) == ("digits", "pskd")
    assert any("proc.memory.rssMB" in stats["item"] for stats in of_type(found, "stats"))  # system metrics


def test_wandb_ends_with_figures_charts_and_the_most_confident_mistakes(tracked):
    run_dir, found, ending = tracked
    result = json.loads((run_dir / "result.json").read_text())
    assert ending["summary"]["last"] == result["last"] and ending["summary"]["best"] == result["best"]
    charts = {key for record in of_type(found, "config") for key in record["update"] if "visualize" in key}
    assert charts == {f"_wandb.visualize.{name}" for name in ("reliability", "risk_coverage", "confidences")}
    predictions = pd.read_parquet(run_dir / "predictions.parquet")

    bins = table(run_dir, "confidences_table")
    gap = (bins.accuracy - bins.confidence).abs() * bins["samples %"]
    assert len(bins) == ECE_BINS and gap.sum() == pytest.approx(result["last"]["ece"])
    assert len(table(run_dir, "reliability_table")) == bins.confidence.notna().sum()
    risk = table(run_dir, "risk_coverage_table")
    assert risk.iloc[-1].tolist() == pytest.approx([100, result["last"]["top1_error"]])
    assert risk["error %"].mean() * 10 == pytest.approx(result["last"]["aurc"], rel=0.05)

    mistakes = table(run_dir, "most_confident_mistakes")
    wrong = predictions[~predictions.correct].nlargest(len(mistakes), "confidence")
    assert mistakes.confidence.tolist() == pytest.approx(wrong.confidence.tolist())
    shown = predictions.set_index("index").loc[mistakes["sample"]]
    assert (shown.label.astype(str).tolist(), shown.prediction.astype(str).tolist()) == (
        mistakes.label.tolist(),
        mistakes.prediction.tolist(),
    )
    contents = {file["path"]: file for record in of_type(found, "artifact") for file in record["manifest"]["contents"]}
    pictures = [path for path in contents if path.startswith("media/images/")]
    assert len(pictures) == len(mistakes)
    weights = contents["best/model.safetensors"]
    assert int(weights["size"]) == (run_dir / "best/model.safetensors").stat().st_size and "recipe.yaml" in contents


def panels_of(section):
    return [panel["config"] for panel in section["panels"]]


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_the_dashboard_shows_what_runs_log_with_mean_and_deviation_over_seeds_in_the_methods_colours(tracked, capsys):
    run_dir, found, ending = tracked
    root = run_dir.parent.parent
    assert main(["dashboard", str(root)]) == 0
    assert f"wrote {root / 'dashboard.json'}" in (said := capsys.readouterr().out) and "--publish" in said
    spec = json.loads((root / "dashboard.json").read_text())["spec"]["section"]
    epochs, last, calibration, mistakes, training = spec["panelBankConfig"]["sections"]

    history = {key for row in of_type(found, "history") for key in row["item"]}
    curves = panels_of(epochs) + panels_of(training)
    assert {metric for panel in panels_of(epochs) for metric in panel["metrics"]} == set(METRICS)
    for panel in curves:
        assert set(panel["metrics"]) <= history and (panel["groupAgg"], panel["groupArea"]) == ("mean", "stddev")
    final = [f"last.{name}" for name in METRICS]
    assert [metric for panel in panels_of(last) for metric in panel["metrics"]] == final
    columns = list(spec["runSets"][0]["runFeed"]["columnPinned"])
    assert columns == ["run:displayName", *(f"summary:{name}" for name in final)]
    for panel in panels_of(calibration):
        key = re.search(r'"tableKey", "value": "(\w+)"', json.dumps(panel)).group(1)
        fields = panel["fieldSettings"]
        assert {fields["x"], fields["y"]} <= set(table(run_dir, key).columns)
    assert "most_confident_mistakes" in json.dumps(mistakes)

    runs = spec["runSets"][0]
    assert runs["filters"]["filters"][0]["value"] == of_type(found, "run")[0]["run_group"]
    assert runs["grouping"][0]["name"].split(".")[0] in ending["config"]
    colours = {re.search(r"value%22%3A%22(\w+)%22", key).group(1): c for key, c in spec["customRunColors"].items()}
    assert colours == COLOURS


def test_a_dashboard_without_its_extra_or_without_runs_is_a_line(tmp_path, monkeypatch, capsys):
    assert main(["dashboard", str(tmp_path)]) == 2
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["dashboard", "nowhere/runs"]) == main(["dashboard", "digits"]) == 2
    no_runs, no_folder, no_extra = capsys.readouterr().err.splitlines()
    assert "there is no folder nowhere/runs of runs, and no recipe 'nowhere/runs'" in no_folder
    assert "no runs here" in no_runs and "pip install wandb-workspaces" in no_extra


def test_a_continued_run_keeps_its_wandb_id_and_repeats_no_epoch(tmp_path):
    class Stop(Exception):
        pass

    def stop(line):
        raise Stop

    recipe = load_recipe(
        "digits",
        {"epochs": 2, "model.kwargs.width": 4, "tracking.wandb": "offline", "output_dir": str(tmp_path)},
    )
    with pytest.raises(Stop):
        train(recipe, callbacks=[stop])
    (recipe.run_dir / "wandb").rename(recipe.run_dir / "first")
    train(recipe)
    folders = [next((recipe.run_dir / name).glob("offline-run-*")) for name in ("first", "wandb")]
    assert {summary(folder)["run_id"] for folder in folders} == {(recipe.run_dir / "wandb_id").read_text()}
    rows = [[(row["item"]["_step"], row["item"]["epoch"]) for row in of_type(records(f), "history")] for f in folders]
    assert rows == [[(19, 1)], [(38, 2)]]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """For each method the lines of a run of eight steps, all of them logged."""
    settings = {
        "epochs": 2,
        "batch_size": 64,
        "threads": 1,
        "data.limit_train": 256,
        "data.limit_test": 50,
        "model.kwargs": {"width": 4},
        "tracking.log_every": 1,
        "output_dir": str(tmp_path_factory.mktemp("steps")),
    }
    recipes = {method: load_recipe("digits", settings | {"method": method}) for method in METHODS}
    return {method: pd.DataFrame(read_lines(train(r).run_dir / "steps.jsonl")) for method, r in recipes.items()}


@pytest.mark.parametrize(
    ("method", "put_together"),
    [
        ("baseline", lambda s: s.cross_entropy),
        ("label_smoothing", lambda s: 0.9 * s.cross_entropy + 0.1 * s.uniform_cross_entropy),
        ("cskd", lambda s: s.cross_entropy + 16 * s.kl),
        ("tfkd", lambda s: 0.9 * s.cross_entropy + 0.1 * s.kl),
        ("pskd", lambda s: (1 - s.alpha) * s.cross_entropy + s.alpha * s.last_cross_entropy),
        ("ols", lambda s: 0.5 * s.cross_entropy + 0.5 * s.soft_cross_entropy),
        ("mbls", lambda s: s.cross_entropy + 0.1 * s.excess),
        ("focal", lambda s: s.focal),
        ("dual_focal", lambda s: s.focal),
        ("dlb", lambda s: s.cross_entropy + 9 * s.kl),
        ("zipf", lambda s: s.cross_entropy + 0.1 * s.kl),
        ("maxsup", lambda s: s.cross_entropy + s.suppression_weight * s.suppression),
    ],
)
def test_the_logged_parts_of_a_loss_make_up_the_loss(steps, method, put_together):
    assert steps[method].loss.tolist() == pytest.approx(put_together(steps[method]).tolist(), rel=1e-5)
    assert np.isfinite(steps[method].grad_norm).all()


def test_a_label_is_the_last_prediction_only_in_the_first_epoch(steps):
    same = np.isclose(steps["pskd"].cross_entropy, steps["pskd"].last_cross_entropy, rtol=1e-6)
    assert same.tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_logged_norm_is_that_of_the_gradient_before_it_is_clipped(tmp_path, clip):
    settings = {
        "method": "baseline",
        "epochs": 1,
        "batch_size": 100,
        "threads": 1,
        "data.limit_train": 100,
        "data.limit_test": 50,
        "optim.clip_grad_norm": clip,
        "output_dir": str(tmp_path),
        "tracking.log_every": 1,
    }
    recipe = load_recipe("digits", settings)
    line = read_lines(train(recipe).run_dir / "steps.jsonl")[0]
    data = load_data(recipe.data, recipe.augment)
    model = open_task(recipe).network().train()
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    torch.nn.functional.cross_entropy(model((data.train.images / 255 - mean) / std), data.train.labels).backward()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.5


def test_a_number_that_is_none_is_null_in_the_files_and_a_gap_in_wandb(tiny, tmp_path):
    class Sink:  # the two things that a tracker asks of Accelerate
        is_main_process, logged = True, []

        def log(self, values, step):
            self.logged.append((step, values))

    recipe = tiny(output_dir=str(tmp_path))
    recipe.run_dir.mkdir(parents=True)
    tracker = Tracker(Sink(), recipe, task=None, steps_per_epoch=7)
    tracker.uses_wandb = True
    tracker.forget_after(0, 0)
    tracker.log_step(3, {"epoch": 1, "loss": 0.5, "grad_norm": math.inf, "parts": [1.0, math.nan]})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((recipe.run_dir / "steps.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 3, "epoch": 1, "loss": 0.5, "grad_norm": None, "parts": [1.0, None]}
    assert Sink.logged == [(3, {"epoch": 1, "loss": 0.5, "parts": [1.0, None]})]


def test_online_without_an_account_is_refused_in_one_line_and_offline_needs_none(tmp_path):
    options = ["--epochs", "1", "--model.kwargs.width", "4", "--tracking.wandb", "online", "--output_dir", tmp_path]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_MODE": "online"}
    done = cli("train", "digits", *options, env=environment)
    assert done.returncode == 2
    assert "pskd-timm: tracking.wandb online: " in done.stderr and "Traceback" not in done.stderr


def agent(command, monkeypatch, tmp_path):
    """wandb's own agent, as far as it needs no server: what turns a sweep's command into a process."""
    from wandb.wandb_agent import Agent

    for name, value in {
        "WANDB_SWEEP_ID": "s1",
        "WANDB_RUN_ID": "",
        "WANDB_SWEEP_PARAM_PATH": "",
        "WANDB_DIR": tmp_path,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    made = Agent(api=None, queue=None, sweep_id="s1")
    made._sweep_command = command
    return made


def test_the_sweeps_command_is_one_that_wandbs_agent_starts_and_that_trains_under_the_sweeps_run_id(
    monkeypatch, tmp_path
):
    command = [word.replace("wandb online", "wandb offline") for word in SWEEP["command"]]
    of_run = {name: {"value": values["values"][-1]} for name, values in SWEEP["parameters"].items()}
    small = {"epochs": {"value": 1}, "data.limit_train": {"value": 200}, "model.kwargs.width": {"value": 4}}
    process = agent(command, monkeypatch, tmp_path)
    process._command_run({"run_id": "abc123", "program": None, "args": of_run | small})
    assert process._run_processes["abc123"].wait() == 0
    run_dir = tmp_path / "runs/sweep/abc123/pskd/seed2"
    assert load_recipe(str(run_dir / "recipe.yaml")).pskd.alpha == 1.0 and (run_dir / "result.json").is_file()
    assert summary(next(run_dir.glob("wandb/offline-run-*")))["run_id"] == "abc123"


def test_every_setting_in_the_sweep_is_one_of_the_command_line():
    words = shlex.split(SWEEP["command"][2])
    for name, values in SWEEP["parameters"].items():
        for value in values["values"]:
            arguments, rest = make_parser().parse_known_args([*words[2:-1], f"--{name}={value}"])
            assert not rest and str(vars(arguments)[name]) == str(value)


def test_wandb_says_what_ece_perfect_calibration_would_give(tracked):
    run_dir, _, ending = tracked
    confidence = pd.read_parquet(run_dir / "predictions.parquet").confidence.to_numpy()
    assert ending["summary"]["ece_if_calibrated"] == pytest.approx(ece_floor(confidence)._asdict())


def test_a_run_keeps_pictures_of_its_most_confident_mistakes(tracked):
    run_dir, *_ = tracked
    predictions = pd.read_parquet(run_dir / "predictions.parquet").set_index("index")
    kept = pd.read_parquet(run_dir / "mistakes.parquet").rename(columns={"index": "index_of"})
    wrong = predictions[~predictions.correct].confidence.sort_values(ascending=False)
    assert kept.confidence.tolist() == pytest.approx(wrong[: len(kept)].tolist()) and len(kept) == min(24, len(wrong))
    test = load_data(load_recipe(str(run_dir / "recipe.yaml")).data, load_recipe("digits").augment).test
    rows = {source: row for row, source in enumerate(test.source_id.tolist())}
    for row in kept.itertuples():
        assert (row.label, row.prediction) == tuple(predictions.loc[row.index_of, ["label", "prediction"]])
        with Image.open(io.BytesIO(row.image)) as image:
            np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), test.images[rows[row.index_of]])


@pytest.mark.parametrize("loading", ["resident", "streaming"])
def test_predictions_of_a_folder_name_the_row_in_the_source_and_the_file(tmp_path, loading):
    shade = {}
    for part, count in (("train", 10), ("test", 6)):
        for i in range(2 * count):
            path = tmp_path / "images" / part / ("dark", "light")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade[path.relative_to(tmp_path / "images").as_posix()] = 10 + 5 * i
            Image.new("RGB", (16, 16), (10 + 5 * i,) * 3).save(path)
    settings = {
        "data.path": str(tmp_path / "images"),
        "data.image_size": 16,
        "data.loading": loading,
        "data.workers": 0,
        "data.limit_test": 8,
        "data.holdout_fraction": 0.2,
        "model.name": "cifar_preact_resnet_tiny",
        "model.kwargs": {"width": 4},
        "epochs": 1,
        "batch_size": 10,
        "optim.warmup_epochs": 0,
        "threads": 1,
        "tracking.wandb": "disabled",
        "output_dir": str(tmp_path / "runs"),
    }
    run_dir = train(load_recipe("custom", settings)).run_dir
    listed = {part: sorted(name for name in shade if name.startswith(part)) for part in ("train", "test")}
    for name, part, count in (("predictions", "test", 8), ("holdout", "train", 4), ("best/predictions", "test", 8)):
        table = pd.read_parquet(run_dir / f"{name}.parquet")
        assert len(table) == count
        assert [listed[part][row] for row in table["index"]] == table.path.tolist()
        assert [("dark", "light").index(path.split("/")[1]) for path in table.path] == table.label.tolist()
    for row in pd.read_parquet(run_dir / "mistakes.parquet").itertuples():
        with Image.open(io.BytesIO(row.image)) as image:
            assert image.getpixel((3, 3)) == (shade[row.path],) * 3
