import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pskd_timm import PSKD, Batch, InputError, PredictionStore
from pskd_timm.store import choose_device, store_bytes
from workers import nearest_row


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
def test_a_sample_that_was_not_checked_out_is_named_when_the_rows_go_home(sample):
    # Not at the step itself, which would have to wait for the device.
    store = PredictionStore(5, 2)
    store.checkout(torch.tensor([0, 1]))
    store.read(torch.tensor([0, sample]), torch.tensor([0, 0]))
    with pytest.raises(InputError, match=f"sample {sample} was not checked out"):
        store.checkin()
    store.checkin()
    store.write(torch.tensor([1]), torch.ones(1, 2))
    with pytest.raises(InputError, match="sample 1 was not checked out"):
        store.checkin()


def test_ids_outside_the_table_and_unknown_types_are_refused():
    with pytest.raises(InputError, match="0 … 4, got 2 … 5"):
        PredictionStore(5, 2).checkout(torch.tensor([5, 2]))
    with pytest.raises(InputError, match="float16, float32, float64"):
        PredictionStore(5, 2, dtype="int8")


def test_the_stated_bytes_are_those_held():
    for dtype in ("float16", "float32"):
        assert PredictionStore(100, 10, dtype=dtype).nbytes == store_bytes(100, 10, dtype)
        assert PredictionStore(100, 10, dtype=dtype, topk=3).nbytes == store_bytes(100, 10, dtype, topk=3)
    # A byte a sample says whether it is checked out.
    assert store_bytes(1_281_167, 1_000, "float16", topk=10) == 1_281_167 * (10 * (2 + 2) + 1)
    assert store_bytes(100, 40_000, "float16", topk=10) == 100 * (10 * (2 + 4) + 1)
    # Among 64 ranks: twice the rows, and for each the id of its sample and its place at home.
    assert store_bytes(14_200_000, 21_841, "float16", 64, topk=10) == 221_875 * (2 * 10 * (2 + 2) + 2 * 8)


def held_bytes(thing, seen):
    """Bytes of every tensor that an object holds, directly or in lists; those that share memory once."""
    if isinstance(thing, torch.Tensor):
        memory = thing.untyped_storage()
        return 0 if memory.data_ptr() in seen or seen.add(memory.data_ptr()) else memory.nbytes()
    return sum(held_bytes(each, seen) for each in thing) if isinstance(thing, list | tuple) else 0


def test_nbytes_counts_every_tensor_that_the_store_holds():
    for options in ({}, {"topk": 3}):
        store = PredictionStore(10_000, 10, **options)
        store.checkout(torch.arange(10_000))
        held = sum(held_bytes(thing, seen) for seen in [set()] for thing in vars(store).values())
        assert store.nbytes <= held <= store.nbytes + 64  # the stray sample, the misplaced mass


class Operations(TorchDispatchMode):
    """Counts what is dispatched inside it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_the_loss_of_a_step_is_at_most_30_operations_and_finds_its_rows_once(monkeypatch):
    pskd = PSKD(0.8).setup(num_samples=40, num_classes=10, num_epochs=2, device="cpu")
    pskd.begin_epoch(1, torch.arange(40))
    logits, batch = torch.randn(8, 10, requires_grad=True), Batch(None, torch.arange(8), torch.arange(8))
    calls = []
    monkeypatch.setattr(
        pskd.store, "find", lambda index: calls.append(index) or PredictionStore.find(pskd.store, index)
    )
    with Operations() as operations:
        pskd.loss(lambda _: logits, batch)
    assert operations.count <= 30 and len(calls) == 1


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_topk_remembers_the_largest_probabilities_and_spreads_the_rest_evenly(data):
    k = data.draw(st.sampled_from([3, 10, 33_000]))
    topk = data.draw(st.integers(1, min(k - 1, 5)))
    dtype = data.draw(st.sampled_from(["float16", "float32", "float64"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows = (5 * torch.randn(4, k, generator=generator, dtype=torch.float64)).softmax(1)
    store = PredictionStore(6, k, dtype=dtype, topk=topk)
    store.checkout(torch.arange(5))
    index = torch.tensor([4, 1, 0, 2])
    for one in index.split(data.draw(st.integers(1, 4))):
        store.write(one, rows[[index.tolist().index(i) for i in one]])
    expected = torch.stack([nearest_row(row, topk, getattr(torch, dtype)) for row in rows])
    found = store.read(index, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.sum(1) == pytest.approx(torch.ones(4), abs=2e-3)
    off = 0.5 * (expected - rows).abs().sum(1).mean()
    assert store.topk_error() == pytest.approx(float(off), abs=1e-6)
    never_seen = store.read(torch.tensor([3]), torch.tensor([2]))
    assert never_seen.argmax() == 2 and never_seen.sum() == 1
    assert store.gather()[[3, 5]].isnan().all()


def test_topk_says_what_it_takes_and_what_it_costs_and_full_says_no_error():
    labels = torch.arange(40) % 10
    model = torch.nn.Linear(10, 10)
    said = {}
    for options in ({}, {"store_topk": 2}):
        pskd = PSKD(0.8, **options).setup(num_samples=40, num_classes=10, num_epochs=2, device="cpu")
        start = pskd.describe()
        pskd.begin_epoch(0, torch.arange(40))
        pskd.loss(model, Batch(torch.eye(10)[labels], labels, torch.arange(40)))
        pskd.end_epoch()
        said[start] = pskd.describe()
    assert said.pop("prediction store: 40 × 10 float16, 840 bytes a rank on cpu") == (
        "prediction store: 40 × 10 float16, 840 bytes a rank on cpu"
    )
    ((start, end),) = said.items()
    assert start == "prediction store: 40 × 10 float16, the 2 largest of each row, 360 bytes a rank on cpu"
    assert re.fullmatch(r"prediction store: [0-9.e-]+ % of a row's mass is misplaced on average", end)


def test_more_classes_are_not_kept_than_there_are():
    with pytest.raises(InputError, match="pskd.store_topk 10 must be from 1 to 9, below the 10 classes"):
        PredictionStore(5, 10, topk=10)


def test_auto_puts_the_store_on_the_gpu_only_if_half_of_what_is_free_holds_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 5000))
    found = [choose_device(*given).type for given in (("auto", "cuda:0", 500), ("auto", "cuda:0", 501))]
    assert found == ["cuda", "cpu"]
    assert choose_device("cpu", "cuda:0", 1).type == choose_device("auto", "cpu", 10**15).type == "cpu"
