"""Twenty steps of training against diffusers and peft: same weights, same pictures, same draws, so the same losses.

Theirs: diffusers' U-Net and noise schedule, peft's LoRA, and PyTorch's own loss, clipping and optimizer in the order of diffusers' training
examples. From here come the random draws alone, and the latents and contexts, which tests of their own hold equal.
The last tests train made-up models of full size, one step each.
"""

import dataclasses

import diffusers
import numpy as np
import peft
import pytest
import torch
from PIL import Image

import weights_loader
from minidiff.config import SD1, SD2, ModelConfig
from minidiff.pipeline import StableDiffusion
from minidiff.text_encoder import TextEncoder
from minidiff.trainers.engine.diffusion_loss import sample_noise
from minidiff.trainers.engine.loop import rng_for, train
from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods import custom_diffusion, dreambooth, fine_tune, lora
from minidiff.trainers.methods.custom_diffusion import CustomDiffusionOptions
from minidiff.trainers.methods.dreambooth import DreamBoothOptions
from minidiff.trainers.methods.fine_tune import FineTuneOptions
from minidiff.trainers.methods.lora import LoRAOptions
from minidiff.trainers.methods.options import Concept, DataOptions, LowRankOptions
from minidiff.two_encoders import text_side
from minidiff.unet import UNet
from minidiff.vae import VAE
from tests.small_concepts import FOLDER, picture_folder
from tests.small_models import small_config, small_model
from tests.small_task import CPU
from weights_loader.adapters.lora import layer_locations
from weights_loader.adapters.peft import PEFT

SETTINGS = Settings(steps=20, batch=4, learning_rate=1e-2, warmup_steps=3, schedule="cosine")
FULL = Settings(steps=20, batch=4, learning_rate=1e-3)


def reference_unet(sd, folder):
    weights_loader.save(sd, folder, layout="diffusers")
    return diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").train()


def reference_losses(task, unet, params, rates):
    """The loop of diffusers' examples on the task's latents, contexts and draws."""
    config, losses = task.sd.config.schedule, []
    scheduler = diffusers.DDPMScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=config.zero_terminal_snr,
    )
    optimizer = torch.optim.AdamW(params, lr=1.0, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        (piece,) = task._draw([rng_for(0, step, sample) for sample in range(4)])
        batch = piece.batch
        draws = sample_noise(piece.rngs, batch.latents.shape[1:], config.timesteps, CPU)
        noisy = scheduler.add_noise(batch.latents, draws.eps, draws.t)
        context = task.sd.encode_prompts(batch.captions)
        prediction = unet(noisy, draws.t, encoder_hidden_states=context).sample
        target = draws.eps if config.prediction == "eps" else scheduler.get_velocity(batch.latents, draws.eps, draws.t)
        loss = torch.nn.functional.mse_loss(prediction, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_twenty_steps_of_lora_are_pefts(tmp_path, prediction):
    sd = small_model(small_config(prediction))
    options = LoRAOptions(settings=SETTINGS, low_rank=LowRankOptions(rank=3, alpha=6.0))
    method = lora.build(
        sd, [Concept(images=picture_folder(tmp_path / "pictures", captions=("a cat", "a red dog", "a car")), captions=True)], options
    )

    unet = reference_unet(sd, tmp_path / "model").requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    places, modules, params = layer_locations(sd, PEFT), dict(unet.named_modules()), []
    for name, low in method.lora.layers.items():
        theirs = modules[places[name].name.removeprefix("unet.")]
        for half, ours in ((theirs.lora_A["default"], low.down), (theirs.lora_B["default"], low.up)):
            assert half.weight.shape == ours.weight.shape
            half.weight.data.copy_(ours.weight)
            params.append(half.weight)
    assert sorted(map(id, params)) == sorted(id(p) for p in unet.parameters() if p.requires_grad)  # peft chose the same layers

    with method.phases[0] as task:
        steps = list(train(task, SETTINGS, CPU))
        theirs = reference_losses(task, unet, params, [step.lr for step in steps])
    assert [float(step.loss) for step in steps] == pytest.approx(theirs, rel=1e-4)  # float32, gathered over twenty steps


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_twenty_steps_of_full_fine_tuning_are_diffusers(tmp_path, prediction):
    sd = small_model(small_config(prediction))
    unet = reference_unet(sd, tmp_path / "model")
    concept = Concept(images=picture_folder(tmp_path / "pictures", captions=("a cat", "a red dog", "a car")), captions=True)
    before = sd.unet.conv_in.weight.detach().clone()
    with fine_tune.build(sd, [concept], FineTuneOptions(settings=FULL)).phases[0] as task:
        steps = list(train(task, FULL, CPU))
        theirs = reference_losses(task, unet, list(unet.parameters()), [step.lr for step in steps])
    assert not torch.equal(before, sd.unet.conv_in.weight)
    assert [float(step.loss) for step in steps] == pytest.approx(theirs, rel=1e-4)  # float32, gathered over twenty steps


# --- full size --------------------------------------------------------------------------------------------------------


def full_size(config: ModelConfig, dtype: torch.dtype) -> StableDiffusion:
    """Random weights, small enough that nothing overflows."""
    with torch.device("meta"):
        parts = text, unet, vae = TextEncoder(config.text_encoder).to(dtype), UNet(config.unet).to(dtype), VAE(config.vae)
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        part.to_empty(device="cpu").eval().requires_grad_(False)
        for name, p in part.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                p.normal_(0, 0.5 / np.sqrt(p[0].numel()), generator=generator)
    return StableDiffusion(config, text_side(config, {"text_encoder": text}), unet, vae)


def one_step(method) -> None:
    with method.phases[0] as task:
        before = [p.detach().clone() for group in task.groups for p in group.params[:4]]
        (step,) = train(task, task.settings, CPU)
        assert step.loss.isfinite() and 0.1 < float(step.loss) < 10
        assert all(not torch.equal(a, b) for a, b in zip(before, (p for group in task.groups for p in group.params[:4])))


ONE = Settings(steps=1, batch=1, learning_rate=1e-4, checkpointing=True)
SIZE = DataOptions(size=128)


def full_concept(folder, token) -> Concept:
    for name in ("own", "class"):
        (folder / name).mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)).save(folder / name / "0.png")
    return Concept(images=folder / "own", class_images=folder / "class", token=token, class_word="dog")


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD1, SD2], ids=["SD 1", "SD 2"])
def test_a_lora_step_at_full_size(tmp_path, config):
    sd = full_size(config, torch.bfloat16)
    method = lora.build(sd, [full_concept(tmp_path, "sks")], LoRAOptions(settings=ONE, data=SIZE))
    # diffusers' number for rank 4 on all attention of SD 1.x
    assert config is not SD1 or sum(p.numel() for p in method.lora.parameters()) == 797_184
    one_step(method)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD1, SD2], ids=["SD 1", "SD 2"])
def test_a_custom_diffusion_step_at_full_size(tmp_path, config):
    sd = full_size(config, torch.bfloat16)
    options = CustomDiffusionOptions(settings=ONE, data=SIZE, prior=FOLDER)
    method = custom_diffusion.build(sd, [full_concept(tmp_path, "<new1>")], options)
    trained = sum(p.numel() for p in method.custom_diffusion.parameters())
    width = config.unet.context_width
    assert trained == 19_169_280 * width // 768 + width  # keys and values are as wide as the context; one new word
    one_step(method)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD1, SD2], ids=["SD 1", "SD 2"])
def test_a_dreambooth_step_at_full_size(tmp_path, config):
    """Weights, gradients and AdamW's two averages of 860 million parameters in float32: 14 GB."""
    sd = full_size(config, torch.float32)
    settings = dataclasses.replace(ONE, learning_rate=1e-4, max_grad_norm=None)
    one_step(dreambooth.build(sd, [full_concept(tmp_path, "sks")], DreamBoothOptions(settings=settings, data=SIZE, prior=FOLDER)))
