import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pskd_timm import InputError, PredictionStore
from pskd_timm.store import store_bytes


@settings(deadline=None)
@given(st.data())
def test_one_process_equals_a_plain_table(data):
    n, k = data.draw(st.integers(1, 20)), data.draw(st.integers(2, 6))
    dtype = data.draw(st.sampled_from(["float16", "float32", "float64"]))
    labels = torch.randint(k, (n,), generator=torch.Generator().manual_seed(0))
    store = PredictionStore(n, k, dtype=dtype, labels=labels)
    table = torch.nn.functional.one_hot(labels, k).to(store.home.dtype)
    for epoch in range(data.draw(st.integers(1, 3))):
        ids = torch.tensor(data.draw(st.permutations(range(n)))[: data.draw(st.integers(0, n))], dtype=torch.int64)
        store.checkout(ids)
        for index in ids.split(data.draw(st.integers(1, 7))) if len(ids) else ():
            assert torch.equal(store.read(index, labels[index]), table[index])
            rows = torch.rand(len(index), k, generator=torch.Generator().manual_seed(epoch)).softmax(1)
            store.write(index, rows)
            table[index] = rows.to(table.dtype)
        if data.draw(st.booleans()):
            store.checkin()
        assert torch.equal(store.gather(), table)


def test_a_sample_never_seen_reads_as_its_one_hot_label_and_gathers_as_nan_where_no_label_is_known():
    store = PredictionStore(4, 3)
    store.checkout(torch.tensor([2, 0]))
    assert store.read(torch.tensor([0, 2]), torch.tensor([1, 2])).tolist() == [[0, 1, 0], [0, 0, 1]]
    store.write(torch.tensor([2]), torch.tensor([[0.25, 0.25, 0.5]]))
    table = store.gather()
    assert table[2].tolist() == [0.25, 0.25, 0.5]
    assert table[[0, 1, 3]].isnan().all()


@pytest.mark.parametrize("sample", [3, -1, 9])
def test_a_sample_that_was_not_checked_out_is_named(sample):
    store = PredictionStore(5, 2)
    store.checkout(torch.tensor([0, 1]))
    with pytest.raises(InputError, match=f"sample {sample} was not checked out"):
        store.read(torch.tensor([0, sample]), torch.tensor([0, 0]))
    store.checkin()
    with pytest.raises(InputError, match="sample 1 was not checked out"):
        store.write(torch.tensor([1]), torch.ones(1, 2))


def test_ids_outside_the_table_and_unknown_types_are_refused():
    with pytest.raises(InputError, match="0 … 4, got 2 … 5"):
        PredictionStore(5, 2).checkout(torch.tensor([5, 2]))
    with pytest.raises(InputError, match="float16, float32, float64"):
        PredictionStore(5, 2, dtype="int8")


def test_the_stated_bytes_are_those_held():
    for dtype in ("float16", "float32"):
        assert PredictionStore(100, 10, dtype=dtype).nbytes == store_bytes(100, 10, dtype)
