"""Copies to a GPU: pinned, where there is something to pin, and without waiting; the same tensor elsewhere."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minidiff.transfer import to_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch):
    """What is asked of tensors, in its order; nothing moves, as there may be no GPU."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: asked.append((*where, how)) or tensor)
    return asked


def test_a_tensor_goes_to_a_gpu_from_pinned_memory_and_nobody_waits(asked):
    tensor = torch.ones(2)
    assert to_device(CUDA, tensor) is tensor
    assert asked == ["pinned", (CUDA, {"non_blocking": True})]


def test_what_has_no_contents_is_not_pinned(asked):
    real = torch.ones(2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_device(CUDA, torch.ones(2)), to_device(CUDA, real)
    assert asked == [(CUDA, {"non_blocking": True})] * 2


@pytest.mark.parametrize("device", [CPU, torch.device("mps")])
def test_elsewhere_the_copy_is_the_usual_one(asked, device):
    to_device(device, torch.ones(2))
    assert asked == [(device, {})]  # without waiting, Apple's GPU may read what is there no more


def test_what_is_on_the_device_already_stays_the_same_tensor():
    tensor = torch.ones(2)
    assert to_device(CPU, tensor) is tensor


@pytest.mark.gpu
def test_on_a_gpu_the_numbers_arrive():
    torch.cuda._sleep(10**8)  # some 50 ms of work before the copy
    tensor = torch.arange(1000.0)
    moved = to_device(CUDA, tensor)
    del tensor
    assert torch.equal(moved.cpu(), torch.arange(1000.0))
