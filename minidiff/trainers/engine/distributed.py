"""Several processes that train one model, each on its part of a step's batch (torch.distributed).

    torchrun --nproc-per-node=2 -m minidiff train ...

Every process holds all weights; gradients are averaged before each step, so all take the same step. Rank 0 alone writes and prints.
With a single process everything here does nothing. Left out: sharded weights and optimizers.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import nn


def init_distributed(device: torch.device) -> torch.device:
    """Join the processes that torchrun started, if it did (it says so in environment variables), and return the device of this one.

    On GPUs (NCCL) each process has the GPU of its number; on CPUs (gloo) all share the device. For the command line to call.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def destroy_distributed() -> None:
    """Leave the process group. Does nothing in a single process."""
    if world_size() > 1:
        with suppress(RuntimeError):  # another process has ended: there is nothing left to leave
            dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes have come here, as after rank 0 has written a file."""
    if world_size() > 1:
        with all_alive():
            dist.barrier()


@contextmanager
def all_alive() -> Iterator[None]:
    """Raise ConnectionError in one line where the exchange within the block fails, as when another process has ended."""
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's, many lines long
        raise ConnectionError(
            f"process {rank()} of {world_size()} has lost another one, which has ended; start all again to go on from the last state"
        ) from error


def all_equal(value: int, device: torch.device) -> bool:
    """Say whether all processes have the same number."""
    if world_size() == 1:
        return True
    ends = torch.tensor([value, -value], device=device)
    with all_alive():
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    return ends[0].item() == -ends[1].item()


def average_gradients(params: Sequence[nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
    """Replace each gradient by its mean over all processes; return the mean of the losses.

    A weight that one process did not use has a gradient of 0 there; one that none used keeps none.
    """
    if world_size() == 1:
        return loss
    met = torch.tensor([p.grad is not None for p in params], dtype=torch.int32, device=loss.device)
    with all_alive():
        dist.all_reduce(met, dist.ReduceOp.MAX)
    loss = loss.clone()
    moving = [p for p, one in zip(params, met.tolist()) if one]
    for p in moving:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    tensors = [loss, *(p.grad for p in moving)]
    with all_alive():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
    for tensor in tensors:
        tensor /= world_size()
    return loss
