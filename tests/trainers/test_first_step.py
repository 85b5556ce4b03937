"""The estimate of memory and the first step of every training on a GPU that need not be there: on CUDA tensors without contents.

All of the loop runs but for PyTorch's backward pass: its engine asks the driver for the device of every tensor. In its place each trained
weight is given a gradient of zeros.
"""

import dataclasses
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from minidiff.bundled.recipe import Recipe
from minidiff.bundled.tasks import AutoencoderTask, DiffusionTask, Latents
from minidiff.bundled.train_judge import JudgeTask
from minidiff.kernels import dispatch, tiles
from minidiff.trainers.engine import loop, memory
from minidiff.trainers.engine.loop import Training, to_device, trainable_weights
from minidiff.trainers.engine.memory import estimate_memory
from tests.bundled.test_train_judge import SMALL as SMALL_JUDGE
from tests.small_concepts import small_concept, small_methods
from tests.small_models import small_model, training_config, xl_config
from tests.small_task import CPU, small_settings

CUDA = torch.device("cuda", 0)
CONFIG, RECIPE = training_config(), Recipe(scenes=8)


def can_be_walked() -> bool:
    """Older versions of PyTorch (2.8) ask the driver for the device even to slice a tensor without contents."""
    try:
        with FakeTensorMode():
            torch.empty(2, device=CUDA)[:1]
    except RuntimeError:
        return False
    return True


@pytest.fixture
def gpu(monkeypatch):
    """An H200, as a mode: within it tensors can be made on CUDA. Our kernels run there as far as they are asked."""
    if not can_be_walked():  # asked here and not while tests are collected: see the mark "forks"
        pytest.skip("this version of PyTorch needs a GPU for CUDA tensors without contents")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    monkeypatch.setattr(memory, "FakeTensorMode", lambda **_: mode)  # tensors of two modes do not mix
    monkeypatch.setattr(loop.LossWatch, "add", lambda *_: None)  # there is no number to look at
    monkeypatch.setattr(tiles, "DEVICE", "cuda")
    monkeypatch.setattr(dispatch, "triton_works", lambda device: True)
    card = tiles.Card("NVIDIA H200", (9, 0), 227 * 1024)
    monkeypatch.setattr(tiles, "_cards", {torch.device("cuda"): card, torch.device("cuda", 0): card})
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # or autocast takes itself back
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    return mode


def walk_first_step(task, settings, monkeypatch):
    """Its memory is estimated and its first step taken, with zeros for gradients."""
    weights, shapes = trainable_weights(task.modules).values(), []

    def backward(loss):
        shapes.append((type(loss), loss.device.type, loss.shape))
        for p in weights:
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with torch.no_grad():
        estimate = estimate_memory(task, settings, CUDA)
        step = next(Training(task, settings, CUDA).run())
    assert estimate.trained == estimate.gradients == sum(4 * p.numel() for p in weights) and estimate.activations > 0
    assert shapes == [(FakeTensor, "cuda", ())] * 2 and step.done == 1 and step.loss.device.type == "cuda"
    return estimate


def moved_to_cuda(phase):
    """The phase, begun on the CPU, with its model on the GPU. A module gets new parameters there, which adapters and groups must learn of."""
    modules = (*phase.sd.parts.values(), *phase.adapters)
    before = [p for module in modules for p in module.parameters()]
    for adapter in reversed(phase.adapters):
        adapter.detach()
    for module in modules:
        module.to(CUDA)
    with mock.patch.object(nn.Module, "to", lambda module, *_: module):  # they are there, and a second time PyTorch cannot move them
        for adapter in phase.adapters:
            adapter.attach(phase.sd)
    now = dict(zip(before, (p for module in modules for p in module.parameters()), strict=True))
    phase.groups = [dataclasses.replace(group, params=tuple(now[p] for p in group.params)) for group in phase.groups]
    phase.contexts = phase.contexts and {caption: context.to(CUDA, torch.float32) for caption, context in phase.contexts.items()}
    return phase


@pytest.mark.parametrize("config", [None, xl_config()], ids=["one encoder", "two encoders"])
@pytest.mark.parametrize(("name", "number"), [*((name, 0) for name in small_methods()), ("pivotal", 1)])
def test_personalising_takes_its_first_step_on_cuda_and_the_estimate_counts_all_weights_there(
    gpu, tmp_path, monkeypatch, name, number, config
):
    function, options, token = small_methods()[name]
    phases = function(small_model(config), [small_concept(tmp_path, token=token)], options).phases
    with phases[number] as phase, gpu:
        settings = dataclasses.replace(phase.settings, precision="bfloat16")
        estimate = walk_first_step(moved_to_cuda(phase), settings, monkeypatch)
        there = {p for module in (*phase.sd.parts.values(), *phase.adapters) for p in module.parameters()}
    assert {p.device.type for p in there} == {"cuda"} and estimate.frozen + estimate.trained == sum(4 * p.numel() for p in there)


def autoencoder():
    return AutoencoderTask(CONFIG, RECIPE, torch.zeros(8, 64, 64, 3, dtype=torch.uint8).numpy(), CPU)


def diffusion():
    tokens = torch.ones(8, CONFIG.tokenizer.context_length, dtype=torch.int64)
    return DiffusionTask(CONFIG, RECIPE, Latents(torch.randn(8, 4, 16, 16), tokens, torch.rand(8, 1, 16, 16)), CPU)


@pytest.mark.parametrize("make", [autoencoder, diffusion, lambda: JudgeTask(SMALL_JUDGE, 0, CPU)], ids=["VAE", "diffusion", "judge"])
def test_training_from_nothing_takes_its_first_step_on_cuda(gpu, monkeypatch, make):
    task = make()
    with gpu:
        for module in task.modules.values():
            module.to(CUDA)
        for name, value in vars(task).items():
            if isinstance(value, torch.Tensor):
                setattr(task, name, value.to(CUDA))
        task.device = CUDA
        walk_first_step(task, small_settings(batch=2, precision="bfloat16"), monkeypatch)


def test_what_has_no_contents_is_not_pinned_and_what_has_is(monkeypatch):
    pinned, real = [], torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor)  # there may be no GPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_device(CUDA, torch.ones(2)), to_device(CUDA, real)
    to_device(CPU, real)
    assert not pinned
    assert to_device(CUDA, real) is real and len(pinned) == 1
