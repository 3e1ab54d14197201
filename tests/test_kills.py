"""A run that is killed at any moment and started again ends as the run that nobody killed."""

import random

import pytest

from kills import SETTINGS, differences, kill_once, to_end
from pskd_timm import METHODS
from pskd_timm.run.folder import read_result


def killed_and_whole(tmp_path, method, world_size, kills, seed):
    settings = SETTINGS | {"method": method}
    whole = to_end(settings | {"output_dir": str(tmp_path / "whole")}, world_size)
    draw = random.Random(seed)
    settings["output_dir"] = str(tmp_path / "killed")
    seconds = 0.6 * read_result(whole)["seconds"]
    outcomes = [kill_once(settings, world_size, draw, seconds) for _ in range(kills)]
    killed = to_end(settings, world_size)
    return [outcome for outcome in outcomes if outcome], differences(whole, killed)


@pytest.mark.parametrize(("method", "world_size"), [("pskd", 1), ("cskd", 2)])
def test_a_run_killed_three_times_equals_the_uninterrupted_one_bit_for_bit(tmp_path, method, world_size):
    outcomes, differing = killed_and_whole(tmp_path, method, world_size, kills=3, seed=1)
    assert outcomes and all(outcome["newest_is_whole"] for outcome in outcomes)
    assert not differing


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_killed_at_many_seeded_moments_equals_the_uninterrupted_run(tmp_path, method, world_size):
    """Prints a line a kill (pytest -m long -s)."""
    outcomes, differing = killed_and_whole(
        tmp_path, method, world_size, kills=6, seed=10 * world_size + list(METHODS).index(method)
    )
    for outcome in outcomes:
        print("\n|", method, *outcome.values(), differing or "equal", sep=" | ", end="")
    assert outcomes and all(outcome["newest_is_whole"] for outcome in outcomes)
    assert not differing
