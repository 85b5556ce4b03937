"""What the kernels share: tiles of a head that is no power of two wide, matrix products, what no kernel takes, how PyTorch calls them.

Triton's blocks have sides that are powers of two, and its matrix products want at least 16 in each direction. Stable Diffusion 1.x
has heads 40, 80 and 160 wide; padded to 64, 128 and 256, a third of the work would be multiplication by zero. So a head stands in two
blocks side by side, and a product over its width is the sum of two:

    40 = 32 + 8 (padded to 16)    80 = 64 + 16    160 = 128 + 32    q k^T = q_1 k_1^T + q_2 k_2^T

Without Triton (macOS, Windows) this file and the kernels' are still imported; `no_kernel_for` then says so for every tensor.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels are then defined as the plain functions they are written as, and never run
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

# Triton's interpreter runs kernels on the CPU, for the tests. It is on if TRITON_INTERPRET=1 stood before Triton was imported.
INTERPRETED = tl.constexpr(triton is not None and bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)  # e^x = 2^(x log2 e): the hardware's own exponential has base 2
DEVICE = "cpu" if triton is not None and INTERPRETED.value else "cuda"  # where kernels run
WIDEST_HEAD = 160

Function = TypeVar("Function", bound=Callable)

_cards: dict[torch.device, "Card"] = {}  # asked once: kernels are launched a hundred times a step
_library = torch.library.Library("minidiff", "FRAGMENT")  # noqa: TOR901  of our operations, which live as long as it does


def constant_when_compiled(function: Function) -> Function:
    """Do all that torch.compiler.assume_constant_result does, without the second that it takes to import torch._dynamo."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def jit(kernel: Callable) -> Callable:
    """triton.jit of the function as it stands in the file, also where a test has wrapped it to check the shapes."""
    return kernel if triton is None else triton.jit(inspect.unwrap(kernel))


def head_tiles(d: int) -> tuple[int, int]:
    """Split a head width into two powers of two, each at least 16, with the smallest sum that holds it: 40 -> (32, 16), 64 -> (64, 0).

    d: a multiple of 8 up to 160. The first holds the first columns; the rest's tile is 0 where there is no rest.
    """
    assert 0 < d <= WIDEST_HEAD and d % 8 == 0, d
    above = max(16, 1 << (d - 1).bit_length())  # the power of two that holds all
    below = above // 2
    rest = max(16, 1 << max(d - below - 1, 0).bit_length())
    return (below, rest) if below >= 16 and below + rest < above else (above, 0)


@jit
def dot(a, b, c):
    """c + a b, or a b if c is None. float32 stays float32, where Triton would take TF32, with 10 bits of mantissa, for speed."""
    if INTERPRETED:  # it keeps bfloat16 as integers; products of 16-bit numbers are exact in float32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@jit
def load_head(x, rows, end, stride, d: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, EVEN: tl.constexpr):
    """Load the rows of one head as its two tiles; 0 in rows from `end` on (EVEN: there are none) and in columns from d on."""
    x += rows[:, None] * stride
    inside = tl.full([1, 1], True, tl.int1) if EVEN else (rows < end)[:, None]
    columns = tl.arange(0, D_1)[None, :]
    x_1 = tl.load(x + columns, mask=inside & (columns < d), other=0.0)
    x_2 = x_1  # never used if there is no second tile
    if D_2 > 0:
        columns = D_1 + tl.arange(0, D_2)[None, :]
        x_2 = tl.load(x + columns, mask=inside & (columns < d), other=0.0)
    return x_1, x_2


@jit
def store_head(x, x_1, x_2, rows, end, stride, d: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr):
    x += rows[:, None] * stride
    inside = (rows < end)[:, None]
    columns = tl.arange(0, D_1)[None, :]
    tl.store(x + columns, x_1.to(x.dtype.element_ty), mask=inside & (columns < d))
    if D_2 > 0:
        columns = D_1 + tl.arange(0, D_2)[None, :]
        tl.store(x + columns, x_2.to(x.dtype.element_ty), mask=inside & (columns < d))


@jit
def zeros_head(rows: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr):
    rest: tl.constexpr = D_2 if D_2 > 0 else 16  # as many as a block may be narrow; never used if there is no second tile
    return tl.zeros([rows, D_1], tl.float32), tl.zeros([rows, rest], tl.float32)


@jit
def dot_heads(a_1, a_2, b_1, b_2, D_2: tl.constexpr):
    """Multiply a b^T over the head's width: [rows of a, rows of b]."""
    c = dot(a_1, tl.trans(b_1), None)
    if D_2 > 0:
        c = dot(a_2, tl.trans(b_2), c)
    return c


@jit
def dot_add(weights, x_1, x_2, sum_1, sum_2, D_2: tl.constexpr):
    """sum + weights x, for both tiles of x."""
    sum_1 = dot(weights, x_1, sum_1)
    if D_2 > 0:
        sum_2 = dot(weights, x_2, sum_2)
    return sum_1, sum_2


@jit
def head_of(x, batch_stride, d: tl.constexpr):
    """Point at the first token of this program's head: the grid is (blocks, heads, batch)."""
    return x + tl.program_id(2).to(tl.int64) * batch_stride + tl.program_id(1) * d


@dataclass(frozen=True)
class Card:
    """What decides which kernels a GPU takes: name, compute capability, bytes of shared memory that one program may have."""

    name: str
    capability: tuple[int, int]
    shared_memory: int


@constant_when_compiled
def card_of(device: torch.device) -> Card:
    """Return what the driver says of a GPU."""
    if device not in _cards:
        told = torch.cuda.get_device_properties(device)
        _cards[device] = Card(told.name, (told.major, told.minor), told.shared_memory_per_block_optin)
    return _cards[device]


def capability_of(x: Tensor) -> tuple[int, int]:
    """Return the compute capability of a tensor's GPU, and (0, 0) in Triton's interpreter."""
    return card_of(x.device).capability if x.device.type == "cuda" else (0, 0)


def no_kernel_for(x: Tensor) -> str | None:
    """Why no kernel takes a tensor of this dtype on this device, as the end of a sentence; None if they do."""
    if triton is None:
        return "Triton is not installed"
    if x.device.type != DEVICE:
        return f"tensors on {x.device}; kernels run on {DEVICE}" + (", as Triton's interpreter is on" if DEVICE == "cpu" else "")
    if x.device.type == "cuda" and (torch.version.hip or card_of(x.device).capability < (8, 0)):
        return f"{card_of(x.device).name} is not an NVIDIA GPU of compute capability 8.0 or above"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {x.dtype}; kernels take float16, bfloat16 and float32"
    return None


def refusal(q: Tensor, k: Tensor, v: Tensor, heads: int) -> str | None:
    """Return why no attention kernel takes these tensors, as the end of a sentence; None if they are fine.

    Args:
        q, k, v: [B, N, h d], [B, L, h d] and [B, L, h d]; strides of batch and tokens are free, as in a view of a fused projection.
        heads: h.
    """
    if not (q.device == k.device == v.device and q.dtype == k.dtype == v.dtype):
        return f"q, k and v differ: {q.dtype} on {q.device}, {k.dtype} on {k.device}, {v.dtype} on {v.device}"
    if reason := no_kernel_for(q):
        return reason
    B, N, D = q.shape
    if D % heads or D // heads % 8 or D // heads > WIDEST_HEAD:
        return f"{heads} heads in a width of {D}; kernels take heads of a multiple of 8 up to {WIDEST_HEAD}"
    if k.shape != v.shape or k.shape[0] != B or k.shape[2] != D:
        return f"shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; kernels take [B, N, D], [B, L, D] and [B, L, D]"
    if 0 in (*q.shape, *k.shape):
        return "there is nothing to attend to: a side is 0"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return f"strides {q.stride()}, {k.stride()}, {v.stride()}; kernels take channels side by side (last stride 1)"
    if any(x.shape[1] * max(x.stride(1), D) >= 2**31 for x in (q, k, v)):  # D: what is written is contiguous, whatever is read
        return "one row of the batch has 2^31 elements or more; kernels count in 32 bits"
    if B > 65535 or heads > 65535:
        return f"batch {B} and {heads} heads; a kernel's grid ends at 65535 of either"
    return None


def device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def strides_of(*inputs: Tensor) -> list[int]:
    """Return the elements from one row of the batch to the next, and from one token to the next, of each."""
    return [stride for x in inputs for stride in x.stride()[:2]]


def head_constants(d: int) -> tuple[float, int, int, int]:
    """Return what an attention kernel is compiled for: the logits' scale in base 2, the width of a head, and its tiles."""
    return math.log2(math.e) / math.sqrt(d), d, *head_tiles(d)


def launch_options(warps: int, stages: int) -> dict[str, int | bool]:
    """Return Triton's options of a launch. Multiply and add are one instruction, as in S scale - m."""
    return dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def register_operation(name: str, forward: Callable, backward: Callable, *, shapes: Callable, backward_shapes: Callable) -> None:
    """Make kernels an operation of PyTorch's own: torch.ops.minidiff.NAME, one node to torch.compile and CUDA graphs.

    It has no gradient and checks nothing. An autograd.Function beside it joins it to its gradients, NAME_backward: by
    torch.library.custom_op and register_autograd a call would cost several times as much of Python's time, which small shapes do not have.

    Args:
        name: Of the operation.
        forward: Launches the kernels.
        backward: Likewise, for the gradients.
        shapes: Takes what `forward` does, and returns empty results.
        backward_shapes: Likewise for `backward`.
    """
    for operation, launch, empty in ((name, forward, shapes), (f"{name}_backward", backward, backward_shapes)):
        _library.define(operation + torch.library.infer_schema(inspect.unwrap(launch), mutates_args=()))
        _library.impl(operation, launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"minidiff::{operation}", empty, lib=_library)
