"""Checkpointing changes memory and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minidiff.trainers.engine.gradient_checkpointing import with_checkpointing
from tests.small_models import small_model

SD = small_model()


def run(part, x, on):
    """The output, the gradients of every weight, and the bytes kept for the way back."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    module = {"unet": SD.unet, "text_encoder": SD.text_encoder, "vae": SD.vae}[part]
    module.zero_grad()
    with with_checkpointing([module], on):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = module.decode(x[0]) if part == "vae" else module(*x)
        output.square().mean().backward()
    return output, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, sum(kept.values())


def inputs(part):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    return {
        "unet": (latents, torch.tensor([10, 900]), torch.randn(2, 5, 16, generator=generator)),
        "text_encoder": (torch.tensor([[1, 2, 3, 4] * 8]),),
        "vae": (latents,),
    }[part]


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("half", [False, True])
def test_the_numbers_are_the_same_and_less_is_kept(part, half):
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        (plain, gradients, much), (output, again, less) = (run(part, inputs(part), on) for on in (False, True))
    assert torch.equal(plain, output) and gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[name]), name
    assert less < 0.6 * much


def test_hooks_on_layers_inside_take_part():
    """As adapters are attached."""
    layer, scale = SD.unet.down[0].transformers[0].blocks[0].cross_attention.to_k, torch.tensor(0.5, requires_grad=True)
    hook = layer.register_forward_hook(lambda module, x, y: y + scale * x[0].mean())
    try:
        gradients = []
        for on in (False, True):
            run("unet", inputs("unet"), on)
            gradients.append(scale.grad)
            scale.grad = None
    finally:
        hook.remove()
    assert torch.equal(*gradients) and gradients[0] != 0


def test_dropout_drops_the_same_on_the_way_back():
    layer = SD.unet.middle.transformer.blocks[0].feed_forward.proj_in
    hook = layer.register_forward_hook(lambda module, x, y: torch.nn.functional.dropout(y, 0.5))
    gradients = []
    try:
        for on in (False, True):
            torch.manual_seed(3)
            gradients.append(run("unet", inputs("unet"), on)[1])
    finally:
        hook.remove()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_modules_are_as_before_also_after_an_error():
    with pytest.raises(RuntimeError), with_checkpointing([SD.unet, SD.unet, SD.unet.middle]):
        assert "forward" in vars(SD.unet.middle.block_1)
        raise RuntimeError
    assert not any("forward" in vars(part) for part in SD.unet.modules())
    with with_checkpointing([SD.unet], enabled=False):
        assert not any("forward" in vars(part) for part in SD.unet.modules())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory as Linux tells it")
def test_thrifty_malloc_gives_memory_back_at_once():
    """Blocks of 2 MB, every second one freed: without it glibc keeps the holes, once it has seen so large a block freed.

    In a process of its own: in this one blocks may be made in holes that other tests have left.
    """
    script = """
from pathlib import Path
import torch
from minidiff.trainers.engine.gradient_checkpointing import thrifty_malloc

def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

with thrifty_malloc():
    blocks = [torch.ones(500_000) for _ in range(40)]
    held = pages()
    del blocks[::2]
    print(held - pages())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[3], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 0.9 * 20 * 2_000_000 / 4096
