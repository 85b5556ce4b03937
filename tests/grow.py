"""Trains a few steps in a process of its own and prints two numbers: the bytes that were foretold, and by how many the process grew."""

import resource
import sys
from dataclasses import replace

import torch
from torch import nn

from minidiff.bundled.recipe import Recipe
from minidiff.bundled.tasks import DiffusionTask, Latents, bundled_config
from minidiff.config import SD1, ModelConfig
from minidiff.schedule import NoiseSchedule
from minidiff.trainers.engine.diffusion_loss import diffusion_loss, sample_noise
from minidiff.trainers.engine.loop import rng_for, train
from minidiff.trainers.engine.memory import estimate_memory
from minidiff.trainers.engine.optimizer import adamw
from minidiff.trainers.engine.settings import Settings
from minidiff.unet import UNet

CPU = torch.device("cpu")


class LowRankTask:
    """Low-rank layers of rank 4 on the attention of a U-Net of made-up weights; the context is made up too."""

    def __init__(self, config: ModelConfig):
        self.config, self.unet = config, UNet(config.unet).requires_grad_(False)
        self.schedule, self.context = NoiseSchedule(config.schedule), torch.randn(1, 77, config.unet.context_width)
        adapters = nn.ModuleList()
        for name, layer in self.unet.named_modules():
            if name.endswith(("to_q", "to_k", "to_v", "to_out")):
                low = nn.Sequential(nn.Linear(layer.in_features, 4, bias=False), nn.Linear(4, layer.out_features, bias=False))
                layer.register_forward_hook(lambda module, x, y, low=low: y + low(x[0]))
                adapters.append(low)
        self.modules, self.networks = {"lora": adapters}, (self.unet,)

    def optimizers(self, settings):
        return (adamw(self.modules["lora"].parameters(), settings),)

    def loss(self, step, samples):
        cells = self.config.image_size // self.config.vae.factor
        draws = sample_noise([rng_for(0, step, sample) for sample in samples], (4, cells, cells), 1000, CPU)
        context = self.context.expand(len(samples), -1, -1)
        return diffusion_loss(self.unet, self.schedule, torch.zeros_like(draws.eps), context, draws).mean()


def bundled_task() -> DiffusionTask:
    config = bundled_config()
    tokens = torch.ones(8, config.tokenizer.context_length, dtype=torch.int64)
    return DiffusionTask(
        config, Recipe(), Latents(torch.randn(8, config.vae.latent_channels, 16, 16), tokens, torch.rand(8, 1, 16, 16)), CPU
    )


def current() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Of this program alone: getrusage's counts what the process was before it became this program, a fork of a large one."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))


model = sys.argv[1]
settings = Settings(steps=2, batch=32, learning_rate=1e-4, ema_decay=0.99, checkpointing=model.endswith("checkpointed"))
if model.startswith("sd1"):
    settings, task = replace(settings, batch=1, ema_decay=None), LowRankTask(SD1)
else:
    task = bundled_task()
estimate = estimate_memory(task, settings, CPU)
before = current()
for _ in train(task, settings, CPU):
    pass
print(estimate.above, peak() - before)
