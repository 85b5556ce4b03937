"""Copies from the CPU to a GPU that nobody waits for.

A copy from ordinary memory first waits for the GPU to finish all earlier work. From page-locked (pinned) memory the GPU fetches the numbers
in their turn, while the CPU goes on: so a training step is queued in full before the one before it has ended.
"""

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def to_device(device: torch.device, tensor: Tensor) -> Tensor:
    """Move a tensor to the device, from the CPU to a CUDA GPU through pinned memory and without waiting."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # Tensors without contents, as while memory is estimated, have nothing to pin, and PyTorch refuses to.
    if detect_fake_mode(tensor) is None:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
