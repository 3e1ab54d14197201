"""Real processes over gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pskd_timm import METHODS
from pskd_timm.tracking import read_lines

WORKERS = Path(__file__).parent / "workers.py"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(processes, *command):
    """`accelerate launch` as the README shows it; on one process plain python."""
    several = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--main_process_port",
        str(free_port()),
    ]
    command = [sys.executable, *(several if processes > 1 else []), *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.parametrize("processes", [2, 4])
def test_the_store_over_several_processes_equals_a_plain_full_table(tmp_path, processes):
    launch(processes, WORKERS, "exchange", tmp_path)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["90"] * processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every method, two epochs, on one and on two processes; 101 samples leave an odd last batch."""
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
    launch(1, WORKERS, "train_all", folder)
    launch(2, WORKERS, "train_all", folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("options", [["--cpu", "--num_processes", "2"], ["--num_processes", "2"]])
def test_a_launch_that_would_run_one_process_instead_of_two_is_refused(tmp_path, options):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *options,
        "-m",
        "pskd_timm",
        "train",
        "digits",
        "--epochs",
        "1",
        "--output_dir",
        str(tmp_path),
    ]
    environment = {key: value for key, value in os.environ.items() if key not in ("MASTER_PORT", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode != 0
    assert "accelerate launch --multi_gpu --num_processes N -m pskd_timm train" in done.stderr
    assert not list(tmp_path.iterdir())
