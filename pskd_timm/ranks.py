"""The processes of a run, seen through torch's default process group; one process where there is none."""

import torch.distributed as dist
from torch import Tensor, nn

from . import order


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(mine: Tensor, total: int) -> Tensor:
    """All ranks' contiguous shares of `total` rows as one tensor on every rank (all ranks call it together)."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return mine
    rows = mine.new_empty(total, *mine.shape[1:])
    for rank in range(world_size):
        part = rows[order.share(total, rank, world_size)]
        if rank == dist.get_rank():
            part.copy_(mine)
        dist.broadcast(part, rank)
    return rows


def copy_buffers_from_main(model: nn.Module):
    """Give every rank the main rank's buffers (batch norm's running statistics), which are the ones that are saved.

    In training mode they influence nothing, so once before an evaluation is enough and no step pays for it.
    """
    if rank_and_world_size()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
