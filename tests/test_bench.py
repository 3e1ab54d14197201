import json

import pytest

from pskd_timm import bench
from pskd_timm.cli import main


@pytest.mark.parametrize("processes", [1, 2])
def test_the_store_adds_its_formula_to_a_processs_memory_and_the_released_way_the_full_float32_table(processes):
    said = []
    (row,) = bench.store([(40_000, 500)], [processes], steps=3, say=said.append)
    overhead = 10e6  # ids, slots and what the interpreter takes on the way
    assert row["formula_bytes"] == 40_000_000
    assert 0.95 * row["formula_bytes"] < row["resident_bytes"] < row["formula_bytes"] + overhead
    # A round sends and receives at most EXCHANGE_BYTES each, and the process group keeps a copy.
    assert row["peak_bytes"] < row["formula_bytes"] + 2 * 20e6 * processes + overhead
    assert row["released_measured"] and row["released_resident_bytes"] == pytest.approx(80e6, rel=0.1)
    assert len(said) == 1 and "extrapolated" in said[0]


def test_bench_store_writes_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "store", lambda processes: [{"processes": count} for count in processes])
    assert main(["bench", "store", "--processes", "1", "3", "--json", str(tmp_path / "bench.json")]) == 0
    assert json.loads((tmp_path / "bench.json").read_text()) == [{"processes": 1}, {"processes": 3}]
