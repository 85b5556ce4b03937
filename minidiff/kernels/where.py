"""Where kernels run that read each number of a tensor once: what every one of them refuses, and the device it is launched on."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from minidiff.kernels import tiles


def no_kernel_for(x: Tensor) -> str | None:
    """Why no kernel takes a tensor of this dtype on this device, as the end of a sentence; None if they do."""
    if tiles.triton is None:
        return "Triton is not installed"
    if x.device.type != tiles.DEVICE:
        return f"the tensor is on {x.device}; kernels run on {tiles.DEVICE}"
    if x.device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_properties(x.device).major < 8):
        return f"{torch.cuda.get_device_name(x.device)} is not an NVIDIA GPU of compute capability 8.0 or above"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {x.dtype}; kernels take float16, bfloat16 and float32"
    return None


def device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
