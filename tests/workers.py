"""What the processes of the distributed tests run: python tests/workers.py or accelerate launch tests/workers.py."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

torch.set_num_threads(1)


def exchange(folder: Path):
    """A store over all ranks against a plain full table that every rank keeps, over random tables, orders and halves."""
    from pskd_timm import InputError, PredictionStore
    from pskd_timm import store as room
    from pskd_timm.order import share

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checked = 0
    for case in range(30):
        generator = torch.Generator().manual_seed(case)
        n, k = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 40), (2, 7)))
        dtype = room.DTYPES[case % 3]
        # Small rounds, so that an exchange takes several of them.
        room.EXCHANGE_BYTES = int(torch.randint(1, 400, (), generator=generator))
        labels = torch.randint(k, (n,), generator=generator)
        store = PredictionStore(n, k, dtype=dtype, labels=labels)
        table = F.one_hot(labels, k).to(getattr(torch, dtype))
        for _ in range(3):
            order = torch.randperm(n, generator=generator)[: int(torch.randint(0, n + 1, (), generator=generator))]
            new = torch.rand(n, k, generator=generator, dtype=torch.float64)
            mine = order[share(len(order), rank, world_size)]
            store.checkout(mine)
            if len(mine):
                assert torch.equal(store.read(mine, labels[mine]), table[mine])
            for done, half in enumerate(mine.chunk(2)):
                if len(half):
                    store.write(half, new[half])
                if done == 0 and case % 2:
                    store.gather()  # a check-in in the middle of an epoch leaves the rows checked out
            if len(mine) < n:
                stray = next(i for i in range(n) if i not in mine.tolist())
                try:
                    store.read(torch.tensor([stray]), labels[:1])
                    raise AssertionError("a row that is not here was read")
                except InputError as error:
                    assert f"sample {stray} " in str(error)
            store.checkin()
            table[order] = new[order].to(table.dtype)
            assert torch.equal(store.gather(), table)
            checked += 1
    (folder / f"exchange-{rank}").write_text(str(checked))
    dist.barrier()
    dist.destroy_process_group()


def train_all(folder: Path):
    """All five methods on however many processes there are, on a network without batch norm; the store's end state too."""
    from pskd_timm import METHODS, load_recipe, train
    from pskd_timm.checkpoint import newest

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    for method in METHODS:
        recipe = load_recipe(
            "digits",
            json.loads((folder / "settings.json").read_text())
            | {"method": method, "output_dir": str(folder / f"on{world_size}")},
        )
        result = train(recipe)
        assert newest(result.run_dir)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
