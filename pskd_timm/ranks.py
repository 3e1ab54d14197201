"""The processes of a run, seen through torch's default process group; one process where there is none."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import InputError, RankError
from .files import warn

# How torch and gloo word the loss of a peer; NCCL's errors have a class of their own.
LOSS_WORDS = ("gloo", "closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "nccl")


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def warn_on_main(text: str):
    """A line on stderr from the main rank alone, for what every rank sees."""
    if rank_and_world_size()[0] == 0:
        warn(text)


def exchange_device() -> torch.device:
    """Where tensors must lie that ranks exchange: in CUDA memory for NCCL, else in the CPU's."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def gather_rows(mine: Tensor, parts: list[slice]) -> Tensor:
    """All ranks' contiguous `parts` of a table, in rank order, as one tensor on every rank (all ranks call it together)."""
    if len(parts) == 1:
        return mine
    rows = torch.empty(parts[-1].stop, *mine.shape[1:], dtype=mine.dtype, device=exchange_device())
    for rank, part in enumerate(parts):
        if rank == dist.get_rank():
            rows[part] = mine.to(rows.device)
        dist.broadcast(rows[part], rank)
    return rows.to(mine.device)


def all_gather_objects(mine) -> list:
    """Every rank's `mine`, in rank order, on every rank (all ranks call it together); for small objects."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [mine]
    found = [None] * world_size
    dist.all_gather_object(found, mine)
    return found


def on_main(work: Callable):
    """What `work()` returns on the main rank, or its InputError, on every rank (all ranks call it together)."""
    outcome = None
    if rank_and_world_size()[0] == 0:
        try:
            outcome = work()
        except InputError as error:
            outcome = error
    outcome = all_gather_objects(outcome)[0]
    if isinstance(outcome, InputError):
        outcome.on_every_rank = True
        raise outcome
    return outcome


@contextmanager
def named_errors() -> Iterator[None]:
    """An InputError that this rank alone meets, in its share of the data, becomes a RankError, which names the rank."""
    try:
        yield
    except InputError as error:
        rank, world_size = rank_and_world_size()
        if world_size == 1 or error.on_every_rank:
            raise
        raise RankError(f"rank {rank}: {error}") from None


def largest(values: list[float]) -> list[float]:
    """The largest of each of `values` over all ranks (all ranks call it together)."""
    if rank_and_world_size()[1] == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=exchange_device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def total(mine: Tensor) -> Tensor:
    """The sum of every rank's `mine`, on every rank (all ranks call it together)."""
    if rank_and_world_size()[1] == 1:
        return mine.clone()
    summed = mine.to(exchange_device(), copy=True)
    dist.all_reduce(summed)
    return summed.to(mine.device)


def tells_of_a_lost_rank(error: RuntimeError) -> bool:
    """Whether an error means that another rank is gone or silent, and not that this one did something wrong."""
    if rank_and_world_size()[1] == 1:
        return False
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in LOSS_WORDS)


def copy_buffers_from_main(model: nn.Module):
    """Give every rank the main rank's buffers (batch norm's running statistics), which are the ones that are saved.

    In training mode they influence nothing, so once before an evaluation is enough and no step pays for it.
    """
    copy_from_main(model.buffers())


def copy_from_main(tensors: Iterable[Tensor]):
    """Give every rank the main rank's values of `tensors`, in place (all ranks call it together)."""
    if rank_and_world_size()[1] > 1:
        for tensor in tensors:
            sent = tensor.detach().contiguous()  # as weights in channels_last are not
            dist.broadcast(sent, 0)
            tensor.copy_(sent)
