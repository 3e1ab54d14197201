import gzip
import json

import torch

from pskd_timm.run.profile import profiled
from pskd_timm.training import train


def steps_of_two_products(folder, count, steps):
    said = []
    with profiled(folder, steps, said.append) as profile:
        for _ in range(count):
            torch.ones(8, 8) @ torch.ones(8, 8) @ torch.ones(8, 8)
            profile.step()
    return said


def test_a_profile_holds_the_operations_of_as_many_steps_as_were_asked_for(tmp_path):
    said = steps_of_two_products(tmp_path, count=40, steps=4)
    assert len(said) == 1 and "profile.txt" in said[0]
    with gzip.open(tmp_path / "profile.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in events) == 2 * 4
    line = next(line for line in (tmp_path / "profile.txt").read_text().splitlines() if "aten::mm" in line)
    assert line.split()[-1] == "8"


def test_a_run_too_short_for_its_profile_says_so(tmp_path):
    assert "23" in steps_of_two_products(tmp_path, count=10, steps=4)[0]
    assert list(tmp_path.iterdir()) == []


def test_without_steps_nothing_is_profiled(tmp_path):
    with profiled(tmp_path, 0, print) as profile:
        assert profile is None
    assert list(tmp_path.iterdir()) == []


def test_a_profiled_run_trains_as_one_that_is_not(tiny, tmp_path):
    settings = {"epochs": 6, "tracking__wandb": "disabled"}
    plain = train(tiny(**settings, output_dir=str(tmp_path / "plain")))
    profiled_run = train(tiny(**settings, output_dir=str(tmp_path / "profiled"), tracking__profile_steps=3))
    assert profiled_run.last == plain.last
    assert (profiled_run.run_dir / "profile.txt").read_text().startswith("3 steps\n")
