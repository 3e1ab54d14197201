"""Real processes over gloo."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from commands import LIMIT, Command, free_port, together, wait_until
from kills import one_rank_without_disk, score, start
from pskd_timm.methods import PAPER
from pskd_timm.run.checkpoint import damage
from pskd_timm.run.result import read_lines
from runs import newest

WORKERS = Path(__file__).parent / "workers.py"


def launch(processes, *words):
    """`accelerate launch` as the README shows it; the processes that it starts are new ones."""
    several = ["--multi_gpu", "--num_processes", processes, "--main_process_port", free_port()]
    done = Command("accelerate.commands.launch", *several, *words).wait()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_store_over_several_processes_equals_a_plain_full_table(tmp_path, processes):
    together(processes, WORKERS, "exchange", tmp_path)
    epochs = [int(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert len(epochs) == processes and len(set(epochs)) == 1 and epochs[0] >= 50


def test_torchmetrics_metric_over_two_processes_is_the_score_of_all_samples_and_starts_anew_after_a_reset(tmp_path):
    together(2, WORKERS, "gather_metrics", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics-0", "metrics-1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The paper's methods and those that remember something, two epochs on one and on two processes; an odd last batch."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = {
        "epochs": 2,
        "batch_size": 24,
        "threads": 1,
        "data.limit_train": 101,
        "data.limit_test": 51,
        "augment.crop_padding": 1,
        "model.name": "test_resnet",
        "model.kwargs": {"norm_layer": "groupnorm1"},
        "optim.lr": 0.02,
        "pskd.store_dtype": "float32",
        "tracking.log_every": 1,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    together(1, WORKERS, "train_all", folder)
    launch(2, WORKERS, "train_all", folder)
    return folder


@pytest.mark.parametrize("method", [*PAPER, "snapshot/pskd", "ols", "dlb"])
def test_two_processes_give_the_losses_and_figures_of_one(runs, method):
    alone, together = (runs / f"on{n}" / method / "seed0" for n in (1, 2))
    losses = [[line["loss"] for line in read_lines(run / "steps.jsonl")] for run in (alone, together)]
    assert len(losses[0]) == 2 * 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, weights in load_file(alone / "model.safetensors").items():
        torch.testing.assert_close(load_file(together / "model.safetensors")[name], weights, rtol=1e-3, atol=1e-4)
    results = [json.loads((run / "result.json").read_text()) for run in (alone, together)]
    assert results[1]["num_processes"] == 2
    assert results[1]["last"]["nll"] == pytest.approx(results[0]["last"]["nll"], rel=1e-3)


def test_the_final_store_of_two_processes_is_that_of_one(runs):
    def table(processes):
        folder = runs / f"on{processes}" / "pskd" / "seed0" / "checkpoints" / "000002-00000000"
        return torch.cat([load_file(path)["rows"] for path in sorted(folder.glob("store-*"))])

    assert table(1).shape == (101, 10)
    assert table(1).sum(1) == pytest.approx(torch.ones(101), abs=1e-5)
    torch.testing.assert_close(table(2), table(1), rtol=1e-3, atol=1e-4)


# A network without batch norm, whose sums are the same however a batch is shared out.
ELASTIC = {
    "method": "pskd",
    "epochs": 3,
    "batch_size": 24,
    "threads": 1,
    "timeout_minutes": 1,
    "data.limit_train": 480,
    "data.limit_test": 60,
    "augment.crop_padding": 1,
    "model.name": "test_resnet",
    "model.kwargs": {"norm_layer": "groupnorm1"},
    "optim.lr": 0.01,
    "pskd.store_dtype": "float32",
    "tracking.log_every": 1,
}


def run_until(settings, processes, step=None):
    """Run on so many processes, to the end or until SIGTERM once `step` steps are logged; returns the run's folder."""
    run_dir = Path(settings["output_dir"]) / "pskd" / "seed0"
    running = start(settings, processes)
    if step:
        steps = run_dir / "steps.jsonl"
        wait_until(lambda: any(line["step"] >= step for line in read_lines(steps)[-1:]), *running, every=0.002)
        for process in running:
            os.kill(process.pid, signal.SIGTERM)
    for process in running:
        process.join(LIMIT)
    log = (Path(settings["output_dir"]) / "rank0.log").read_text()
    assert [process.exitcode for process in running] == [143 if step else 0] * processes, log
    return run_dir


def final_table(run_dir):
    return torch.cat([load_file(path)["rows"] for path in sorted(newest(run_dir).glob("store-*"))])


def test_a_run_stopped_in_mid_epoch_on_2_1_and_3_processes_ends_on_4_as_the_uninterrupted_run_on_one(tmp_path):
    whole = run_until(ELASTIC | {"output_dir": str(tmp_path / "whole")}, 1)
    settings = ELASTIC | {"output_dir": str(tmp_path / "chain")}
    stops = []
    for processes, step in ((2, 5), (1, 25), (3, 45)):
        run_dir = run_until(settings, processes, step)
        stops.append(newest(run_dir).name)
        assert not stops[-1].endswith("-00000000"), "stopped between epochs"
    assert [int(stop[:6]) for stop in stops] == [0, 1, 2]
    run_until(settings, 4)
    losses = [[(line["step"], line["loss"]) for line in read_lines(run / "steps.jsonl")] for run in (whole, run_dir)]
    assert [step for step, _ in losses[1]] == list(range(1, 61))
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0, atol=1e-5)
    weights, others = (load_file(run / "model.safetensors") for run in (whole, run_dir))
    furthest = max(float((weights[name] - others[name]).abs().max()) for name in weights)
    print(f"stopped at {stops}; furthest weight {furthest:.1e}")
    assert furthest < 1e-5
    torch.testing.assert_close(final_table(run_dir), final_table(whole), rtol=0, atol=1e-5)
    assert final_table(whole).shape == (480, 10)


def test_a_run_with_a_snapshot_teacher_stopped_in_mid_epoch_on_two_processes_ends_on_one_as_if_it_had_not_been(
    tmp_path,
):
    snapshot = ELASTIC | {"pskd.teacher": "snapshot", "epochs": 2, "data.limit_train": 240}
    whole = run_until(snapshot | {"output_dir": str(tmp_path / "whole")}, 1)
    settings = snapshot | {"output_dir": str(tmp_path / "parts")}
    stopped = newest(run_until(settings, 2, 13))
    assert stopped.name.startswith("000001-") and not stopped.name.endswith("-00000000")
    # The teacher that the checkpoint holds is the first epoch's network, not the one that was stopped.
    taught, trained = (load_file(stopped / f"{name}.safetensors") for name in ("method", "model"))
    assert taught.keys() == trained.keys() and any(not torch.equal(taught[name], trained[name]) for name in taught)
    parts = run_until(settings, 1)
    losses = [torch.tensor([line["loss"] for line in read_lines(run / "steps.jsonl")]) for run in (whole, parts)]
    assert len(losses[0]) == 20
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)


def test_figures_do_not_depend_on_the_number_of_ranks_by_a_single_bit(runs, tmp_path):
    finished = runs / "on1" / "baseline" / "seed0"
    for processes in (1, 2, 3):
        scoring = start({"run_dir": str(finished), "output_dir": str(tmp_path)}, processes, target=score)
        for process in scoring:
            process.join(LIMIT)
        assert [process.exitcode for process in scoring] == [0] * processes
    found = [load_file(tmp_path / f"on{processes}.safetensors") for processes in (1, 2, 3)]
    assert found[0]["confidence"].shape == (51,)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_when_a_rank_dies_or_hangs_the_other_ends_with_one_line_in_bounded_time(tmp_path, number):
    settings = ELASTIC | {"epochs": 2000, "timeout_minutes": 0.1, "output_dir": str(tmp_path)}
    running = start(settings, 2)
    try:
        run_dir = tmp_path / "pskd" / "seed0"
        wait_until(lambda: len(read_lines(run_dir / "metrics.jsonl")) >= 2, running[0])
        os.kill(running[1].pid, number)
        running[0].join(LIMIT)
        assert running[0].exitcode == 1
    finally:
        for process in running:
            process.kill()
    said = [line for line in (tmp_path / "rank0.log").read_text().splitlines() if line.startswith("pskd-timm:")]
    assert said == [
        f"pskd-timm: {run_dir}: rank 0 lost another, which failed or did not answer for 0.1 minutes; "
        f"unless a line of that rank says why, the same command resumes from {newest(run_dir).name}"
    ]
    assert "Traceback" not in (tmp_path / "rank0.log").read_text()
    assert newest(run_dir) and damage(newest(run_dir)) is None


def test_a_rank_that_cannot_write_its_part_of_a_checkpoint_stops_none_and_the_earlier_one_stays(tmp_path):
    settings = ELASTIC | {"epochs": 2, "output_dir": str(tmp_path)}
    running = start(settings, 2, target=one_rank_without_disk)
    for process in running:
        process.join(LIMIT)
    log = (tmp_path / "rank0.log").read_text()
    assert [process.exitcode for process in running] == [0, 0], log
    assert log.count("000001-00000000: the checkpoint cannot be written: ") == 1 and "File too large" in log
    assert newest(tmp_path / "pskd" / "seed0").name == "000002-00000000"


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (["--cpu", "--num_processes", "2"], ["train", "digits"]),
        (["--num_processes", "2"], ["train", "digits"]),
        (["--num_processes", "2"], ["detect", "resnet10t", "--data.path", "."]),
    ],
)
def test_a_launch_that_would_run_one_process_instead_of_two_is_refused(tmp_path, options, command):
    environment = {key: value for key, value in os.environ.items() if key not in ("MASTER_PORT", "WORLD_SIZE")}
    words = [*options, "-m", "pskd_timm", *command, "--output_dir", tmp_path]
    done = Command("accelerate.commands.launch", *words, env=environment).wait()
    assert done.returncode != 0
    assert f"accelerate launch --multi_gpu --num_processes N -m pskd_timm {command[0]} …" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_stopped_before_a_batch_that_two_processes_leave_out_goes_on_with_them(tmp_path, tiny, monkeypatch):
    from pskd_timm import train
    from pskd_timm.run.tracking import Tracker

    original = Tracker.log_step

    def log_step(self, step, values):
        original(self, step, values)
        if step == 3:  # the first of two of epoch 2; the second has a single sample
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Tracker, "log_step", log_step)
    settings = {
        "data.limit_train": 65,
        "data.limit_test": 50,
        "batch_size": 64,
        "epochs": 3,
        "model.kwargs": {"width": 8},
        "tracking.wandb": "offline",
    }
    recipe = tiny(**{key.replace(".", "__"): value for key, value in settings.items()}, output_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert json.loads((newest(recipe.run_dir) / "state.json").read_text())["progress"]["step"] == 1
    together(2, "pskd_timm", "train", recipe.run_dir / "recipe.yaml")
    assert [line["epoch"] for line in read_lines(recipe.run_dir / "metrics.jsonl")] == [1, 2, 3]
    # wandb knows one run: a folder for each of the two launches, none for the second rank.
    wandb_id = (recipe.run_dir / "wandb_id").read_text()
    assert len(list(recipe.run_dir.glob("wandb/offline-run-*"))) == 2
    assert len(list(recipe.run_dir.glob(f"wandb/offline-run-*/run-{wandb_id}.wandb"))) == 2


def test_the_rank_that_meets_a_damaged_picture_says_which_and_the_other_does_not_promise_that_the_run_resumes(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for name in ("one", "two"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "two" / "5.png").write_bytes(b"no picture")
    options = ["--data.path", tmp_path, "--data.loading", "streaming", "--data.workers", 0, "--data.image_size", 12]
    options += ["--model.name", "cifar_preact_resnet_tiny", "--model.kwargs", "{width: 4}", "--batch_size", 4]
    options += ["--output_dir", tmp_path / "runs", "--epochs", 2, "--augment.crop_padding", 1]
    several = ["--multi_gpu", "--num_processes", "2", "--main_process_port", free_port()]
    done = Command("accelerate.commands.launch", *several, "-m", "pskd_timm", "train", "custom", *options).wait()
    said = [line for line in done.stderr.splitlines() if line.startswith("pskd-timm:")]
    (named,) = (line for line in said if "cannot be decoded" in line)
    assert named.startswith(("pskd-timm: rank 0: data: image 13", "pskd-timm: rank 1: data: image 13"))
    assert "two/5.png" in named and done.returncode != 0
    assert not any("resumes" in line for line in said)
