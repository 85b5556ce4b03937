"""The choice of an attention backend, by name or by device and shape, and the fused ones behind one function.

    select_backend   "naive", "pytorch", "self", "cross" or "cpu", for given tensors
    fused_attention  attention by one of the last four

    select_kernel    whether GroupNorm + SiLU or GEGLU is computed by our kernel

What "auto" takes on a GPU is in a table of measurements, choices.json (see choices.py), and nothing is timed while a model runs: one seed
gives one picture. Our GPU kernels run where they take the tensors and Triton works, which is tried once per device; the CPU's on
processors where it was measured to be faster than PyTorch's.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from minidiff.kernels import choices, cpu_attention, cross_attention, self_attention
from minidiff.kernels.tiles import constant_when_compiled

ATTENTION = ("auto", "naive", "pytorch", "triton")

_active = "auto"  # in the whole process: autograd works in threads of its own, and torch.compile guards on it

GPU = "cuda"  # where "auto" considers our kernels

_triton_works: dict[torch.device, bool] = {}  # whether our kernels run there


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Select the attention backend by name within the block; "triton" also selects our GroupNorm + SiLU and GEGLU (see blocks.py).

    auto: what choices.json says for the GPU and the shape; naive: the plain steps; pytorch: PyTorch's fused kernels; triton: those of
    kernels/, and a ValueError where none takes the tensors. Results are the same but for rounding. A backward pass that computes parts
    again (checkpointing) belongs into the block too. Raises ValueError for another name.
    """
    global _active  # noqa: PLW0603  one choice for the whole process is what is meant
    if name not in ATTENTION:
        raise ValueError(f"attention {name!r} unknown; choose {', '.join(ATTENTION)}")
    before, _active = _active, name
    try:
        yield
    finally:
        _active = before


def active_backend() -> str:
    """Return the active attention backend, "auto" by default."""
    return _active


def select_backend(
    q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int, causal: bool = False
) -> str:
    """Return how `attention` is to compute this: "naive", "pytorch", or by our "self", "cross" or "cpu".

    Args:
        q, k, v, heads, causal: as in `attention`; of the tensors only shape, strides, dtype and device count.

    Raises ValueError where our kernels were asked for by name and none takes these tensors, with the reason.
    """
    if _active in ("naive", "pytorch"):
        return _active
    if _active == "triton" or q.device.type == GPU and _chosen_for_attention(q, k, heads) == "triton" and triton_works(q.device):
        if not causal and q.shape[1] != k.shape[1] and cross_attention.unsupported(q, k, v, heads, causal) is None:
            return "cross"
        reason = self_attention.unsupported(q, k, v, heads, causal)
        if reason is None:
            return "self"
        if _active == "triton":
            raise ValueError(f"attention 'triton' does not take this: {reason}; choose attention 'auto' or 'pytorch'")
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[1] <= 256:
        return "naive"  # PyTorch's kernel for this case is slow (2.11 to 2.15): 2 to 7 times, forward and backward, at 16 to 256 keys
    return "cpu" if cpu_attention.unsupported(q, k, causal) is None else "pytorch"


def fused_attention(
    backend: str, q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int, causal: bool = False
) -> Float[Tensor, "B N D"]:
    """Compute softmax(q k^T / sqrt(d)) v by a fused kernel: PyTorch's, or one of ours.

    Args:
        backend: what `select_backend` returned, except "naive".
        q, k, v, heads, causal: as in `attention`.
    """
    if backend == "self":
        return self_attention.run_self_attention(q, k, v, heads, causal)
    if backend == "cross":
        return cross_attention.run_cross_attention(q, k, v, heads)
    if backend == "cpu":
        return cpu_attention.tiled_attention(q, k, v, heads)
    q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal), "B h N d -> B N (h d)")


def select_kernel(operation: str, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether our kernel is to compute an operation on x: for "triton", and for "auto" where choices.json says so.

    Args:
        operation: "group_norm_silu" or "geglu".
        x: Its input; device and dtype count.
        shape: As choices.py has it for the operation.
    """
    if _active == "auto" and x.device.type == GPU:
        return choices.find(operation, x, shape).backend == "triton" and triton_works(x.device)
    return _active == "triton"


def _chosen_for_attention(q: Tensor, k: Tensor, heads: int) -> str:
    kind = "self" if q.shape[1] == k.shape[1] else "cross"
    return choices.find(kind, q, (q.shape[1], k.shape[1], heads, q.shape[2] // heads)).backend


@constant_when_compiled
def triton_works(device: torch.device) -> bool:
    """Return whether Triton works on this GPU, tried once: it also needs a C compiler and Python's headers, which may be missing."""
    if device not in _triton_works:
        # Asked first where tensors have no contents, as to estimate memory (FakeTensorMode), any kernel would seem to run.
        with _disable_current_modes():
            _triton_works[device] = _runs(device)
    return _triton_works[device]


def _runs(device: torch.device) -> bool:
    try:
        x = torch.zeros(1, 16, 16, device=device)
        if self_attention.unsupported(x, x, x, 1, False) is None:
            self_attention.fused_self_attention(x, x, x, 1)
            return True
    except Exception as error:  # whatever it is, PyTorch's kernels do not have it
        warnings.warn(f"Triton does not work here, PyTorch's attention is used instead: {error}", stacklevel=3)
    return False
