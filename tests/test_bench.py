import json

import pytest

from pskd_timm.bench import metrics, rounds, step, store
from pskd_timm.cli import main
from pskd_timm.store import EXCHANGE_BYTES


@pytest.mark.parametrize("processes", [1, 2])
def test_the_store_adds_its_formula_to_a_processs_memory_and_the_released_way_the_full_float32_table(
    processes, monkeypatch
):
    # glibc may keep what was freed for the next allocation, which is no memory of the store's.
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    said = []
    (row,) = store.measure(said.append, [(100_000, 1000)], [processes], steps=3)
    overhead = 10e6  # ids, slots and what the interpreter takes on the way
    # A round sends and receives at most EXCHANGE_BYTES each; whether the system has taken them back is up to it.
    buffers = 2 * EXCHANGE_BYTES * (processes > 1)
    # Two bytes a probability, on two processes twice half of the rows; a byte a sample, or 16 bytes a row of one's own.
    assert row["formula_bytes"] == 100_000 * 1000 * 2 + (100_000 if processes == 1 else 50_000 * 16)
    assert 0.95 * row["formula_bytes"] < row["resident_bytes"] < row["formula_bytes"] + buffers + overhead
    assert row["peak_bytes"] < row["formula_bytes"] + 1.25 * buffers + overhead
    assert row["released_measured"] and row["released_resident_bytes"] == pytest.approx(400e6, rel=0.1)
    assert row["ratio"] == row["epoch_seconds"] / row["released_epoch_seconds"]
    assert len(said) == 1 and "extrapolated" in said[0]


def test_bench_measures_the_parts_that_are_named_with_the_options_they_know(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "measure", lambda say, **options: [options])
    monkeypatch.setattr(metrics, "measure", lambda say: [{"seconds": 1.0}])
    path = tmp_path / "bench.json"
    options = ["--processes", "1", "3", "--sizes", "128x2", "--json", str(path)]
    assert main(["bench", "store", "metrics", *options]) == 0
    assert json.loads(path.read_text()) == {
        "store": [{"sizes": [[128, 2]], "processes": [1, 3]}],
        "metrics": [{"seconds": 1.0}],
    }
    assert store.TITLE in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, says",
    [
        (
            ["stor"],
            "bench has no part 'stor', only step, data, store, metrics, start, translation, detection: did you mean store?",
        ),
        (["store", "--sizes", "5x"], "'5x' should be SAMPLESxCLASSES"),
        (["store", "--processes", "0"], "--processes must be from 1 to 64"),
        (["store", "--json", "/nowhere/b.json"], "there is no folder /nowhere"),
        (["store", "--processes", "3000"], "--processes must be from 1 to 64"),
        (["metrics", "--json", "."], ". is a folder"),
        (["store", "--sizes", "99999999999x99999"], "GB, this machine has"),
        (["translation", "--text", "nowhere"], "--text: there is no folder nowhere"),
        (["data", "--images", "/nowhere"], "/nowhere holds 0 JPEG files"),
    ],
)
def test_bench_refuses_what_it_cannot_measure_before_it_starts(options, says, capsys):
    assert main(["bench", *options]) == 2
    assert says in capsys.readouterr().err


def test_a_ratio_is_the_median_of_each_rounds_own():
    found = {"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}
    assert rounds.ratio(found, "a", "b") == {"seconds": 2.0, "ratio": 1.0, "low": 0.5, "high": 2.0, "rounds": 3}


def test_a_whole_run_is_measured_against_the_bare_step_of_its_network(monkeypatch):
    monkeypatch.setattr(step, "_repeat", lambda work, times: work)
    said = []
    found = step._whole_run(said.append, 2, step.BATCH, "off")
    assert found["images_per_second"] > 0 and found["bare_images_per_second"] > 0 and len(said) == 1


def test_what_has_been_measured_is_kept_where_a_later_part_fails(tmp_path, monkeypatch):
    def fails(say):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(store, "measure", lambda say, **options: [{"seconds": 2.0}])
    monkeypatch.setattr(metrics, "measure", fails)
    with pytest.raises(RuntimeError):
        main(["bench", "store", "metrics", "--json", str(tmp_path / "bench.json")])
    assert json.loads((tmp_path / "bench.json").read_text()) == {"store": [{"seconds": 2.0}]}


def test_every_method_and_teacher_is_measured_as_a_step_that_trains():
    model, steps = step._steps(width=2)
    assert set(steps) == {"bare", *step.TAUGHT}
    assert {name for name, _ in step.TAUGHT.values()} == set(step.METHODS)
    for take in steps.values():
        before = [p.detach().clone() for p in model.parameters()]
        take()
        assert any((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
