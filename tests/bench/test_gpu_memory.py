"""The memory of commands on a GPU, counted without one: against tensors that are really made, CUDA's autocast, and sums by hand."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.bench import gpu_memory
from minidiff.bench.gpu_memory import Drawing, Shapes, count_decoder, count_drawing, count_from_scratch, count_training, cuda_norms
from minidiff.bundled.recipe import Recipe
from minidiff.conditioning import concatenate
from minidiff.kernels.dispatch import attention_backend
from minidiff.tiled_decode import decode_tiled
from minidiff.trainers.data.cache import Cache, Pictures
from minidiff.trainers.data.folder import read_folder
from minidiff.trainers.engine.gradient_checkpointing import with_checkpointing
from minidiff.trainers.engine.memory import LiveBytes, Memory
from minidiff.trainers.methods.options import LowRankOptions
from minidiff.trainers.methods.table import METHODS
from tests.small_concepts import picture_folder, quick
from tests.small_models import small_config, small_model, xl_config
from tests.trainers.test_first_step import can_be_walked

CONFIGS = {"SD": small_config(), "SDXL": xl_config()}


@pytest.fixture(params=CONFIGS)
def sd(request):
    return small_model(CONFIGS[request.param])


@torch.no_grad()
def really_held(run):
    with LiveBytes() as live, attention_backend("pytorch"):
        made = run()
    return live.peak, made


def test_drawing_is_counted_as_real_tensors_are(sd):
    text, told = really_held(lambda: concatenate(*sd.text.guided(["a cat"] * 3, None, (32, 32))))
    x_t, t = torch.zeros(3, 4, 8, 8), torch.zeros(3, dtype=torch.int64)
    unet, _ = really_held(lambda: sd.unet(x_t, t, told))
    decoder, _ = really_held(lambda: sd.vae.decode(x_t).float().clamp(-1, 1))
    sizes = [4 * sum(p.numel() for p in part.parameters()) for part in sd.parts.values()]
    counted = count_drawing(sd, batch=3, size=32)
    assert counted == Drawing(sum(sizes), max(sizes), text, unet, decoder)
    assert counted.total(offload=False) == sum(sizes) + unet + decoder  # the graph keeps the U-Net's activations
    assert counted.total(offload=True) == max(sizes) + max(text, unet, decoder)


def test_the_decoder_works_in_strips_where_a_gpu_would(monkeypatch):
    sd = small_model()
    whole = count_decoder(sd, 1, 128)
    monkeypatch.setattr(gpu_memory, "should_tile", lambda config, z: z.device.type == "meta")
    monkeypatch.setattr(gpu_memory, "ON_A_GPU", {"cells": 1024})
    z = torch.zeros(1, 4, 32, 32)
    strips, _ = really_held(lambda: decode_tiled(sd.vae, z, rows=8).float().clamp(-1, 1))
    assert count_decoder(sd, 1, 128) == strips < 0.8 * whole


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_forward_pass_keeps_is_what_it_keeps_in_cudas_autocast(dtype, checkpointing, monkeypatch):
    """On tensors of CUDA without contents, with PyTorch's plain attention: which fused one would run depends on the GPU."""
    if not can_be_walked():
        pytest.skip("this version of PyTorch needs a GPU for CUDA tensors without contents")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # or autocast takes itself back
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)

    def kept(device, prepare):
        unet = small_model().unet.to(dtype).requires_grad_(False)
        with FakeTensorMode(allow_non_fake_inputs=True), attention_backend("pytorch"), sdpa_kernel(SDPBackend.MATH), prepare([unet]):
            unet.to(device)
            x_t, context = (torch.zeros(2, *shape, device=device, dtype=dtype, requires_grad=True) for shape in ((4, 8, 8), (32, 16)))
            t = torch.zeros(2, dtype=torch.int64, device=device)
            with LiveBytes() as live, with_checkpointing([unet], checkpointing), torch.autocast(device, torch.bfloat16):
                output = unet(x_t, t, context)
                return live.live, output.dtype

    on_cuda = kept("cuda", lambda networks: nullcontext())
    assert kept("cpu", cuda_norms) == on_cuda
    assert kept("cpu", lambda networks: nullcontext())[0] < on_cuda[0]  # without it too little would be counted


def test_the_peak_of_training_is_the_sum_of_what_is_there_at_once(sd, monkeypatch):
    step = Memory(frozen=1, trained=2, gradients=30, optimizer=500, ema=7000, activations=10**7)
    monkeypatch.setattr(gpu_memory, "count_steps", lambda *_: step)
    options, sheet = replace(METHODS["lora"].presets["sd1"], settings=quick()), count_drawing(sd, batch=1)
    assert count_training(sd, METHODS["lora"], options) == step.total + sheet.unet
    step = replace(step, activations=1)  # then the sheet's decoder takes more than a step
    assert count_training(sd, METHODS["lora"], options) == 7533 + sheet.unet + sheet.decoder


def test_a_step_of_training_is_counted_and_nothing_learns(sd):
    before = {name: p.detach().clone() for name, p in sd.unet.named_parameters()}
    options = replace(METHODS["lora"].presets["sd1"], low_rank=LowRankOptions(rank=2))
    few, many = (count_training(sd, METHODS["lora"], replace(options, settings=quick(batch=batch))) for batch in (8, 16))
    thrifty = count_training(sd, METHODS["lora"], replace(options, settings=quick(batch=16, checkpointing=True)))
    fixed = 4 * sum(p.numel() for part in sd.parts.values() for p in part.parameters())  # also of what a step does not run
    assert 1.5 < (many - fixed) / (few - fixed) < 2 and thrifty - fixed < 0.6 * (many - fixed)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in sd.unet.named_parameters())


def test_latents_have_their_shapes_and_the_encoder_is_counted(tmp_path):
    sd, shapes = small_model(), Shapes()
    examples = read_folder(picture_folder(tmp_path / "cat", count=1), size=32, caption="a cat")
    made = [Pictures(sd, examples, cache, size=32) for cache in (Cache(), shapes)]
    real, zeros = (pictures._moments(0, False) for pictures in made)
    assert zeros.shape == real.shape and not zeros.any()
    pixels = torch.zeros(1, 3, 32, 32)
    encoder, _ = really_held(lambda: sd.vae.encode(pixels))
    assert encoder <= shapes.peak < 1.2 * encoder  # and what is made of its answer


def test_all_scenes_of_training_from_scratch_are_on_the_gpu():
    few, many = (count_from_scratch(Recipe(widths=(32, 32, 32), scenes=scenes, batch=2, vae_batch=2)) for scenes in (10**6, 2 * 10**6))
    config = gpu_memory.bundled_config()
    pixels, cells = config.image_size**2, (config.image_size // config.vae.factor) ** 2
    assert many - few == 10**6 * (3 * pixels + 4 * cells)  # bytes, and a float32 of how much each cell counts: more than their latents
