"""wandb offline, read back with its own reader."""

import json
import subprocess
import sys

import pytest

from pskd_timm.metrics import METRICS
from pskd_timm.tracking import read_lines

TRAIN = [sys.executable, "-m", "pskd_timm", "train", "digits", "--model.kwargs.width", "4", "--tracking.log_every", "5"]


def inspect(run_folder, *options):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(run_folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def records(run_folder):
    return [json.loads(line) for line in inspect(run_folder).splitlines()]


def summary(run_folder):
    return json.loads(inspect(run_folder, "--summary"))


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A finished run with wandb offline: its folder and wandb's."""
    root = tmp_path_factory.mktemp("tracked")
    options = ["--epochs", "2", "--tracking.wandb", "offline", "--output_dir", str(root), "--tracking.project", "mine"]
    run_dir = root / "pskd" / "seed0"
    subprocess.run([*TRAIN, *options], check=True, capture_output=True, timeout=120)
    return run_dir, next((run_dir / "wandb").glob("offline-run-*"))


def test_wandb_gets_the_files_numbers_under_the_same_names(tracked):
    run_dir, folder = tracked
    found = summary(folder)["summary"]
    last = read_lines(run_dir / "metrics.jsonl")[-1]
    assert {name: found[name] for name in METRICS} == pytest.approx({name: last[name] for name in METRICS})
    assert found["alpha"] == pytest.approx(0.8) and found["_step"] == 2 * 19
    losses = [line["loss"] for line in read_lines(run_dir / "steps.jsonl")]
    history = [json.dumps(record) for record in records(folder) if record["type"] == "history"]
    assert len(losses) == 7 and sum('"loss"' in line for line in history) == 7


def test_wandb_has_the_recipe_as_config_its_name_as_group_and_the_method_as_job_type(tracked):
    _, folder = tracked
    found = summary(folder)
    assert found["config"]["optim"]["lr"] == 0.1 and found["config"]["pskd"]["alpha"] == 0.8
    assert found["project"] == "mine" and found["name"] == "digits/pskd/seed0"
    run = next(record["run"] for record in records(folder) if record["type"] == "run")
    assert (run["run_group"], run["job_type"]) == ("digits", "pskd")


def test_a_continued_run_keeps_its_wandb_id(tmp_path):
    from pskd_timm import load_recipe, train

    settings = {"epochs": 1, "model.kwargs.width": 4, "tracking.wandb": "offline", "output_dir": str(tmp_path)}
    run_dir = train(load_recipe("digits", settings)).run_dir
    (run_dir / "wandb").rename(run_dir / "first")
    (run_dir / "result.json").unlink()
    train(load_recipe("digits", settings))
    folders = [next((run_dir / name).glob("offline-run-*")) for name in ("first", "wandb")]
    assert {summary(folder)["run_id"] for folder in folders} == {(run_dir / "wandb_id").read_text()}


def test_online_without_an_account_is_refused_in_one_line_and_offline_needs_none(tmp_path):
    options = ["--epochs", "1", "--tracking.wandb", "online", "--output_dir", str(tmp_path)]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_MODE": "online"}
    done = subprocess.run([*TRAIN, *options], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert "pskd-timm: tracking.wandb online: " in done.stderr and "Traceback" not in done.stderr
