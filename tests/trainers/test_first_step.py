"""The estimate of memory and the first step of every training on a GPU that need not be there: on CUDA tensors without contents.

All of the loop runs but for PyTorch's backward pass: its engine asks the driver for the device of every tensor. In its place each trained
weight is given a gradient of zeros.
"""

import dataclasses
import traceback
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minidiff.blocks import ResBlock
from minidiff.bundled.recipe import Recipe
from minidiff.bundled.tasks import AutoencoderTask, DiffusionTask, Latents, Scenes
from minidiff.bundled.train_judge import JudgeTask
from minidiff.kernels import dispatch, tiles
from minidiff.kernels.dispatch import attention_backend
from minidiff.scenes.art import SIZE
from minidiff.trainers.engine import loop, memory
from minidiff.trainers.engine.loop import Training, compute_loss, trainable_weights
from minidiff.trainers.engine.memory import estimate_memory
from minidiff.trainers.methods import controlnet
from minidiff.trainers.methods.controlnet import ControlNetOptions
from minidiff.trainers.methods.options import Concept
from tests.bundled.test_train_judge import SMALL as SMALL_JUDGE
from tests.small_concepts import picture_folder, quick, small_concept, small_methods
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
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    return mode


class Watch(TorchDispatchMode):
    """Counts operations, and notes where the CPU would wait for the GPU.

    It waits for copies between the two that are not asynchronous, for indices on the CPU, and for values that are read.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.waits = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, aten = func(*args, **kwargs), torch.ops.aten
        self.calls[str(func)] += 1
        if func is aten._to_copy.default:
            waits = args[0].device != result.device and not kwargs.get("non_blocking")
        elif func is aten.copy_.default:
            waits = args[0].device != args[1].device and not (args[2:] or (kwargs.get("non_blocking"),))[0]
        elif func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            waits = any(i is not None and i.device != args[0].device for i in args[1])
        else:
            waits = func is aten._local_scalar_dense.default and args[0].device.type == "cuda"
        if waits:
            self.waits.append(f"{func} of {tuple(args[0].shape)} at " + "".join(traceback.format_list(ours(traceback.extract_stack()))))
        return result


def ours(stack):
    """The last places in a stack that are in minidiff."""
    return [frame for frame in stack if "/minidiff/" in frame.filename][-3:]


def walk_first_step(task, settings, monkeypatch):
    """Its memory is estimated and its first step taken, with zeros for gradients. The CPU never waits for the GPU. Returns the estimate."""
    weights, shapes = trainable_weights(task.modules).values(), []

    def backward(loss):
        shapes.append((type(loss), loss.device.type, loss.shape))
        for p in weights:
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with torch.no_grad():
        estimate = estimate_memory(task, settings, CUDA)
        monkeypatch.setattr(nn.Module, "to", laid_out)
        training = Training(task, settings, CUDA)
        with Watch() as watch:
            step = next(training.run())
    assert not watch.waits, "\n".join(watch.waits)
    assert estimate.trained == estimate.gradients == sum(4 * p.numel() for p in weights) and estimate.activations > 0
    assert shapes == [(FakeTensor, "cuda", ())] * 2 and step.done == 1 and step.loss.device.type == "cuda"
    return estimate


def laid_out(module, *, memory_format):
    """What Module.to does to a module of tensors without contents, which PyTorch cannot replace."""
    for p in module.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=memory_format)


def moved_to_cuda(phase):
    """The phase, begun on the CPU, with its model on the GPU. A module gets new parameters there, which adapters and groups must learn of."""
    adapters, net = getattr(phase, "adapters", ()), getattr(phase, "net", None)  # a ControlNet's training has no adapters
    modules = (*phase.sd.parts.values(), *adapters, *([net] if net else []))
    before = [p for module in modules for p in module.parameters()]
    for adapter in reversed(adapters):
        adapter.detach()
    for module in modules:
        module.to(CUDA)
    with mock.patch.object(nn.Module, "to", lambda module, *_: module):  # they are there, and a second time PyTorch cannot move them
        for adapter in adapters:
            adapter.attach(phase.sd)
    now = dict(zip(before, (p for module in modules for p in module.parameters()), strict=True))
    phase.groups = [dataclasses.replace(group, params=tuple(now[p] for p in group.params)) for group in phase.groups]
    if getattr(phase, "contexts", None):
        phase.contexts = {caption: context.to(CUDA, torch.float32) for caption, context in phase.contexts.items()}
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


@pytest.mark.parametrize("of", ["scenes", "pictures"])
def test_a_controlnet_takes_its_first_step_on_cuda(gpu, tmp_path, monkeypatch, of):
    concepts = [Concept(images=picture_folder(tmp_path / "a", size=SIZE), prompt="a cat")] if of == "pictures" else []
    options = ControlNetOptions(settings=quick(), hint="canny" if of == "pictures" else "outline", scenes=3)
    (phase,) = controlnet.build(small_model(training_config()), concepts, options).phases
    with phase, gpu:
        walk_first_step(moved_to_cuda(phase), dataclasses.replace(phase.settings, precision="bfloat16"), monkeypatch)


def autoencoder():
    pictures, tokens = (
        torch.zeros(8, 64, 64, 3, dtype=torch.uint8).numpy(),
        torch.ones(8, CONFIG.tokenizer.context_length, dtype=torch.int64),
    )
    return AutoencoderTask(CONFIG, RECIPE, Scenes(pictures, tokens, torch.rand(8, 1, 8, 8)), CPU)


def diffusion():
    tokens = torch.ones(8, CONFIG.tokenizer.context_length, dtype=torch.int64)
    return DiffusionTask(CONFIG, RECIPE, Latents(torch.randn(8, CONFIG.vae.latent_channels, 16, 16), tokens, torch.rand(8, 1, 16, 16)), CPU)


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


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_in_16_bits_a_gpu_trains_channels_last_so_that_our_kernel_takes_all_norms_before_convolutions(
    gpu, tmp_path, monkeypatch, precision
):
    function, options, token = small_methods()["lora"]
    (phase,) = function(small_model(), [small_concept(tmp_path, token=token)], options).phases
    with phase, gpu, attention_backend("triton"):
        task = moved_to_cuda(phase)
        monkeypatch.setattr(nn.Module, "to", laid_out)
        Training(task, dataclasses.replace(task.settings, precision=precision), CUDA)
        # float16 for both: without a GPU PyTorch takes its slow convolution for bfloat16, which answers in rows
        with Watch() as watch:
            compute_loss(task, 0, range(2), dataclasses.replace(task.settings, precision="float16"), CUDA)
        convolutions = [part.weight for part in task.sd.unet.modules() if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3)]
        norms = sum(isinstance(part, ResBlock) for part in task.sd.unet.modules()) * 2 + 1
    half = precision == "bfloat16"
    assert [weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions] == [half] * len(convolutions)
    assert watch.calls["minidiff.group_norm_silu.default"] == (norms if half else 0)
