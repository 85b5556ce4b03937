"""Several processes that train one model, each on its part of a step's batch (torch.distributed).

    torchrun --nproc-per-node=2 -m minidiff train ...

Every process holds all weights; gradients are averaged in the last backward pass of a step, so all take the same step. Rank 0 alone writes
and prints. With a single process everything here does nothing. Left out: sharded weights and optimizers.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


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
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo has no class of its own; NCCL's is a DistError
            raise
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


def mean(value: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all processes; in a single process the tensor itself."""
    if world_size() == 1:
        return value
    value = value / world_size()
    with all_alive():
        dist.all_reduce(value)
    return value


class TrainedWeights(nn.Module):
    """What DistributedDataParallel (DDP) wraps: the weights that are trained and nothing else, wherever in the model or its adapters.

    DDP needs only the graph of a loss, so it is called with the loss, and what computes that is neither wrapped nor renamed.
    """

    def __init__(self, params: Iterable[nn.Parameter]):
        super().__init__()
        self.params = nn.ParameterList(params)

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return loss


def data_parallel(params: Iterable[nn.Parameter]) -> DistributedDataParallel | None:
    """Give all processes the weights of rank 0, and return what averages their gradients (see `backward`); None in a single process.

    DDP collects gradients in buckets of 25 MB and sends each one while the backward pass goes on (Li et al. 2020, "PyTorch Distributed:
    experiences on accelerating data parallel training"). Raises RuntimeError if the processes train weights of different shapes.
    """
    if world_size() == 1:
        return None
    # A loss need not reach every weight, nor the same ones in each step and process: so DDP looks through its graph, and static_graph,
    # which would also send after every micro-batch of the first step, is off. As views of the buckets, gradients have no second copy.
    with all_alive():
        return DistributedDataParallel(TrainedWeights(params), find_unused_parameters=True, gradient_as_bucket_view=True)


def backward(loss: torch.Tensor, ddp: DistributedDataParallel | None, last: bool) -> None:
    """Add the gradient of a micro-batch's loss to .grad; with the last one of a step, replace each .grad by its mean over all processes.

    A weight that one process did not use has a gradient of 0 there; one that none used keeps none.
    """
    if ddp is None:
        loss.backward()
        return
    with all_alive(), nullcontext() if last else ddp.no_sync():
        ddp(loss).backward()
