"""A detector's run that is killed at any moment and started again ends as the run that nobody killed."""

import random

import pytest
from detection_data import make_devkit, small_settings

from kills import detect, differences, kill_once, to_end
from pskd_timm.run.folder import read_result

MORE = {"checkpoint__every_steps": 1, "grad_accum_steps": 2, "tracking__log_every": 2, "epochs": 3, "threads": 1}


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_detectors_run_killed_twice_equals_the_uninterrupted_one_bit_for_bit(tmp_path, world_size):
    devkit = make_devkit(tmp_path / "VOCdevkit")
    settings = small_settings(devkit, tmp_path / "whole", timeout_minutes=0.5, **MORE)
    settings["method"] = "test_resnet-untrained"
    whole = to_end(settings, world_size, detect)
    draw, settings["output_dir"] = random.Random(world_size), str(tmp_path / "killed")
    seconds = 0.6 * read_result(whole)["seconds"]
    outcomes = [kill_once(settings, world_size, draw, seconds, detect) for _ in range(2)]
    killed = to_end(settings, world_size, detect)
    outcomes = [outcome for outcome in outcomes if outcome]
    assert outcomes and all(outcome["newest_is_whole"] for outcome in outcomes)
    assert not differences(whole, killed, ("detections.parquet", "objects.parquet", "mistakes.parquet"))
