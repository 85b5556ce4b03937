"""How fast the work could be done at best on this device: its measured rates, and the operations and bytes of the work.

    floor = the largest of   multiplications and additions / rate of a large matrix product
                             bytes that must be read or written once / rate of a copy
                             exponentials of a softmax / 16 a clock and multiprocessor (NVIDIA's CUDA C++ Programming Guide, table
                                                         "Throughput of native arithmetic instructions", compute capability 7.5 to 12.0)

Operations are counted by running the modules on tensors without contents, with the plain attention, whose products PyTorch's counter
sees. Convolutions count as matrix products. Norms, activations and launches are free, so no program reaches a floor.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from time import perf_counter

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minidiff.bench.attention_cases import AttentionCase
from minidiff.config import ModelConfig
from minidiff.kernels.dispatch import attention_backend
from minidiff.unet import UNet
from minidiff.vae import VAE

EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor
ROUNDS = 5  # of which the fastest counts
BACKWARD_PRODUCTS = 3.5  # matrix products of attention forward and backward, for each of the forward pass's: 7 to 2


def measure_ceilings(device: torch.device, dtype: torch.dtype, side: int, copied: int, clock: float | None) -> dict[str, float | None]:
    """Measure the rates of a matrix product and of a copy on this device.

    Args:
        device: Where they run.
        dtype: Of the matrices.
        side: Of the square matrices, of random numbers: zeros draw less power and run faster.
        copied: Bytes of the tensor that is copied.
        clock: Highest clock of the GPU in MHz; None where there is none, or it is not known.

    Return operations a second ("products"), bytes read and written a second ("bytes") and "exponentials" a second, None for unknown.
    """
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    exponentials = None
    if clock is not None and device.type == "cuda":
        exponentials = EXPONENTIALS_PER_CLOCK * torch.cuda.get_device_properties(device).multi_processor_count * clock * 1e6
    return {
        "products": 2 * side**3 / fastest(lambda: a @ b, device),
        "bytes": 2 * copied / fastest(lambda: target.copy_(source), device),
        "exponentials": exponentials,
    }


def fastest(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of ROUNDS runs, after one that does not count."""
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    times = []
    for _ in range(ROUNDS + 1):
        start = perf_counter()
        run()
        wait()
        times.append(perf_counter() - start)
    return min(times[1:])


def floor_seconds(ceilings: Mapping[str, object], operations: float, moved: float = 0.0, exponentials: float = 0.0) -> tuple[float, str]:
    """Return the floor in seconds, and which of the ceilings it is.

    Args:
        ceilings: Of `measure_ceilings`, perhaps among others.
        operations: Multiplications and additions.
        moved: Bytes.
        exponentials: Their number.
    """
    work = {"products": operations, "bytes": moved, "exponentials": exponentials}
    floors = {name: amount / rate for name, amount in work.items() if isinstance(rate := ceilings[name], float)}
    bound = max(floors, key=lambda name: floors[name])
    return floors[bound], bound


def count_attention(case: AttentionCase, direction: str) -> tuple[float, float, float]:
    """Return operations, bytes and exponentials of an attention layer. direction: "forward", or "both" for the gradients as well.

    A causal layer needs half of its logits. Forward reads q, k, v and writes the output; backward reads these four and the output's
    gradient, writes three, and computes the exponentials again.
    """
    both = direction == "both"
    logits = case.batch * case.heads * case.tokens * case.keys * (0.5 if case.causal else 1.0)
    query, key = (case.batch * length * case.heads * case.head_dim for length in (case.tokens, case.keys))
    moved = (2 * query + 2 * key) + both * (3 * query + 2 * key + query + 2 * key)
    products = 4 * logits * case.head_dim * (BACKWARD_PRODUCTS if both else 1.0)
    return products, moved * getattr(torch, case.dtype).itemsize, logits * (2 if both else 1)


def count_unet(config: ModelConfig, size: int, rows: int, backward: bool = False, weights: bool = False) -> float:
    """Return the operations of the U-Net on `rows` latents of pictures of size x size pixels.

    Args:
        config: Of the model.
        size: Pixels a side.
        rows: Latents, 2 for a picture with guidance.
        backward: With the gradients of its input and context, which those of small adapters on frozen weights pass through; the adapters'
            own products, below a hundredth, are left out.
        weights: With the gradients of all weights too.
    """
    cells = size // config.vae.factor
    with torch.device("meta"):
        unet = UNet(config.unet).requires_grad_(weights)
        x_t = torch.empty(rows, config.unet.in_channels, cells, cells, requires_grad=backward)
        context = torch.empty(rows, config.text_encoder.context_length, config.unet.context_width, requires_grad=backward)
        t = torch.zeros(rows, dtype=torch.int64)
    return _count(lambda: unet(x_t, t, context), backward)


def count_decoder(config: ModelConfig, size: int) -> float:
    """Return the operations of decoding one picture of size x size pixels."""
    cells = size // config.vae.factor
    with torch.device("meta"):
        vae, z = VAE(config.vae), torch.empty(1, config.vae.latent_channels, cells, cells)
    return _count(lambda: vae.decode(z), False)


def _count(run: Callable[[], Tensor], backward: bool) -> float:
    with FlopCounterMode(display=False) as counter, attention_backend("naive"), torch.set_grad_enabled(backward):
        out = run()
        if backward:
            out.sum().backward()
    return float(counter.get_total_flops())
