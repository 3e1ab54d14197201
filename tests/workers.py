"""What the processes of the distributed tests run: python tests/workers.py or accelerate launch tests/workers.py."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

torch.set_num_threads(1)


def nearest_row(row: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """What a store of the k largest may remember of the probabilities `row` [K]: those, and an even share of the rest."""
    probabilities = row.tolist()
    kept = sorted(range(len(row)), key=lambda c: -probabilities[c])[:k]
    wide = torch.promote_types(dtype, torch.float32)
    values = torch.tensor([probabilities[c] for c in kept], dtype=row.dtype).to(dtype).to(wide)
    found = torch.full((len(row),), max(0.0, 1.0 - values.sum().item()) / (len(row) - k), dtype=wide)
    found[kept] = values
    return found


def exchange(folder: Path):
    """A store over all ranks against a plain full table that every rank keeps, over random tables, orders and halves."""
    from pskd_timm import InputError, PredictionStore
    from pskd_timm import store as room
    from pskd_timm.order import even_slice

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checked = 0

    # Derandomised, every rank draws the same cases; not shrunk, a rank that fails leaves no other waiting for long.
    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=30,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        nonlocal checked
        n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(3, 8))
        topk = data.draw(st.sampled_from([None, None, 1, 2]))
        dtype = data.draw(st.sampled_from(room.DTYPES))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
        # Small rounds, so that an exchange takes several of them.
        room.EXCHANGE_BYTES = data.draw(st.integers(1, 400))
        labels = torch.randint(k, (n,), generator=generator)
        store = PredictionStore(n, k, dtype=dtype, labels=labels, topk=topk)
        exact = getattr(torch, dtype)
        table = F.one_hot(labels, k).to(torch.promote_types(exact, torch.float32))
        close = {"rtol": 0, "atol": 1e-6 if topk else 0}
        for _ in range(data.draw(st.integers(1, 3))):
            order = torch.randperm(n, generator=generator)[: data.draw(st.integers(0, n))]
            new = torch.rand(n, k, generator=generator, dtype=torch.float64).softmax(1)
            mine = order[even_slice(len(order), rank, world_size)]
            middle = data.draw(st.booleans())
            store.checkout(mine)
            lists = [*vars(store).values(), *store._lent]
            assert sum(t.nbytes for t in lists if isinstance(t, torch.Tensor) and t is not labels) <= store.nbytes + 200
            if len(mine):
                torch.testing.assert_close(store.read(mine, labels[mine]), table[mine], **close)
            for done, half in enumerate((mine[: len(mine) // 2], mine[len(mine) // 2 :])):
                if len(half):
                    store.write(half, new[half])
                if done == 0 and middle:
                    store.gather()  # a check-in in the middle of an epoch leaves the rows checked out
            store.checkin()
            for i in order.tolist():
                table[i] = nearest_row(new[i], topk, exact) if topk else new[i].to(exact)
            torch.testing.assert_close(store.gather(), table, **close)
            # One rank reads a row that it did not check out: all of them are told which.
            store.checkout(mine[:0])
            stray = int(torch.randint(n, (), generator=generator))
            if rank == stray % world_size:
                store.read(torch.tensor([stray]), labels[:1])
            try:
                store.checkin()
                raise AssertionError("a row that was not checked out was read")
            except InputError as error:
                assert f"sample {stray} " in str(error)
            store.checkin()
            torch.testing.assert_close(store.gather(), table, **close)
            checked += 1

    check()
    check_snapshot(rank)
    check_remembered(rank, world_size)
    (folder / f"exchange-{rank}").write_text(str(checked))
    dist.barrier()
    dist.destroy_process_group()


def check_snapshot(rank: int):
    """Each rank's running statistics are its own; the snapshot teacher has the main rank's on all of them."""
    from pskd_timm.methods.snapshot import Snapshot

    network = torch.nn.BatchNorm1d(3)
    network.running_mean.fill_(rank)
    teacher = Snapshot(network)
    teacher.take()
    teacher.take()
    assert teacher.frozen.running_mean.tolist() == [0.0] * 3 and network.running_mean.tolist() == [float(rank)] * 3


def check_remembered(rank: int, world_size: int):
    """OLS's sums are of all ranks, in a checkpoint too; DLB's last batch is saved in rank order and each gets its own again."""
    from pskd_timm import METHODS, Batch
    from pskd_timm.order import even_slice

    known = {"num_samples": 40, "num_classes": 5, "num_epochs": 3, "device": "cpu"}
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (40,), generator=torch.Generator().manual_seed(1))
    logits[torch.arange(40), labels] += 1.0
    ols, dlb = (METHODS[name]().setup(**known) for name in ("ols", "dlb"))
    for step in range(2):
        part = even_slice(20, rank, world_size)
        mine = slice(20 * step + part.start, 20 * step + part.stop)
        for method in (ols, dlb):
            method.loss(lambda x: x, Batch(logits[mine], labels[mine], torch.arange(40)[mine], -logits[mine]))
        if step == 0:  # saved and taken over in mid-epoch
            state, ols = ols.state_dict(), METHODS["ols"]().setup(**known)
            ols.load_state_dict(state)
    ols.end_epoch()
    right = logits.argmax(1) == labels
    for k in range(5):
        torch.testing.assert_close(ols.soft_labels[k], logits[right & (labels == k)].softmax(1).mean(0))
    tables = [torch.empty_like(ols.soft_labels) for _ in range(world_size)]
    dist.all_gather(tables, ols.soft_labels)
    assert all(torch.equal(table, tables[0]) for table in tables)
    state, again = dlb.state_dict(), METHODS["dlb"]().setup(**known)
    assert torch.equal(state["last_views"], -logits[20:]) and torch.equal(state["last_labels"], labels[20:])
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again.now[0], dlb.now[0], strict=True))


def gather_metrics(folder: Path):
    """CalibrationMetrics over ranks with shares of any size, the second time with nothing on one of them, against `score`."""
    from pskd_timm import score
    from pskd_timm.adaptors.metric import CalibrationMetrics

    dist.init_process_group("gloo")
    rank, metric = dist.get_rank(), CalibrationMetrics()
    for epoch, mine in enumerate((slice(0, 37) if rank else slice(37, 100), slice(0, 100) if rank else slice(0, 0))):
        generator = torch.Generator().manual_seed(epoch)
        probabilities = torch.randint(0, 4, (100, 6), generator=generator).float().softmax(1)  # many ties
        labels = torch.randint(6, (100,), generator=generator)
        for batch in range(mine.start, mine.stop, 16):
            part = slice(batch, min(batch + 16, mine.stop))
            metric.update(probabilities[part], labels[part])
        found, expected = metric.compute(), score(probabilities, labels)
        assert all(abs(found[name] - expected[name]) < 1e-9 for name in expected), (found, expected)
        metric.reset()
    (folder / f"metrics-{rank}").write_text("equal")
    dist.barrier()
    dist.destroy_process_group()


def train_sequences(folder: Path):
    """The second task of the tests."""
    import sequences  # noqa: F401 (which registers it)
    from pskd_timm import load_recipe, train

    train(load_recipe("digits", json.loads((folder / "settings.json").read_text())))


def train_all(folder: Path):
    """The paper's methods, PS-KD with both its teachers, OLS and DLB, on however many processes, without batch norm."""
    from pskd_timm import load_recipe, train
    from pskd_timm.methods import PAPER
    from runs import newest

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    settings = json.loads((folder / "settings.json").read_text())
    runs = [{"method": method, "output_dir": str(folder / f"on{world_size}")} for method in (*PAPER, "ols", "dlb")]
    # DLB's shares count alike where the last batch, of 12 here, is shared out in the same proportions as the one before.
    runs[-1]["data.limit_train"] = 108
    snapshot = {
        "method": "pskd",
        "pskd.teacher": "snapshot",
        "output_dir": str(folder / f"on{world_size}" / "snapshot"),
    }
    runs[0]["tracking.wandb"] = "offline"  # the end of its tracking is not the end of the processes
    for own in [*runs, snapshot]:
        result = train(load_recipe("digits", settings | own))
        assert newest(result.run_dir)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
