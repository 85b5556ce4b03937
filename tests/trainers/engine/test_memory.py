"""The estimate of memory, against tensors that are really made, and against the process as the system sees it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from minidiff.bundled.recipe import Recipe
from minidiff.bundled.tasks import AutoencoderTask, DiffusionTask, Latents, Scenes
from minidiff.trainers.engine import loop
from minidiff.trainers.engine.gradient_checkpointing import with_checkpointing
from minidiff.trainers.engine.memory import RESERVE, LiveBytes, Memory, estimate_memory
from minidiff.trainers.engine.optimizer import Muon
from minidiff.vae import AttentionBlock
from tests.small_models import training_config
from tests.small_task import CPU, SmallTask, small_settings

CONFIG, RECIPE = training_config(), Recipe(scenes=8)


def task_of(stage):
    tokens, mask = torch.ones(8, CONFIG.tokenizer.context_length, dtype=torch.int64), torch.rand(8, 1, 16, 16)
    if stage == "autoencoder":
        return AutoencoderTask(CONFIG, RECIPE, Scenes(np.zeros((8, 128, 128, 3), np.uint8), tokens, mask), CPU)
    return DiffusionTask(CONFIG, RECIPE, Latents(torch.randn(8, 4, 16, 16), tokens, mask), CPU)


def test_live_bytes_of_a_chain_are_counted_by_hand():
    x = torch.ones(1000)
    with LiveBytes() as live:
        y = x * 2  # 4000 bytes
        view = y[:10].view(2, 5)  # none
        z = y.exp() + 1  # 8000 for a moment, then 4000
        assert (live.live, live.peak) == (8000, 12000)
        y.add_(1)
        del y
        assert live.live == 8000  # the view keeps it
        del view, z
        assert live.live == 0
        x.t()
    assert (live.live, live.peak) == (0, 12000)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
@pytest.mark.parametrize(("precision", "checkpointing"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_the_estimate_is_what_a_step_really_holds(stage, precision, checkpointing):
    task = task_of(stage)
    settings = small_settings(batch=2, precision=precision, checkpointing=checkpointing)
    estimate = estimate_memory(task, settings, CPU)
    with LiveBytes() as live, with_checkpointing(loop.networks_of(task), checkpointing):
        loop.compute_loss(task, 0, range(2), settings, CPU).backward()
    # Without real numbers small tensors are freed in another order: one of a picture's size in the VAE's loss, tables of the schedule in bfloat16.
    expected = RESERVE["cpu", checkpointing] * live.peak
    assert estimate.activations + estimate.gradients == pytest.approx(expected, rel=0.01)


def test_attention_keeps_as_much_of_a_picture_in_either_layout():
    """What PyTorch supposes of a tensor without contents and what it then makes may differ in layout; bytes may not (GroupNorm, PyTorch 2.14)."""
    kept = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 16, 8, 8).to(memory_format=layout)
        with LiveBytes() as live:
            y = AttentionBlock(16, groups=4)(x)
            kept.append(live.live)
        del y
    assert kept[0] == kept[1]


def test_the_parts_are_counted():
    task = SmallTask(width=1000)
    task.net[3].bias.requires_grad_(False)
    trained = 4 * (3 * 1000 + 1000 + 3 * 1000)
    task.optimizers = lambda settings: (Muon([task.net[0].weight], 1.0), torch.optim.AdamW([task.net[0].bias, task.net[3].weight]))
    estimate = estimate_memory(task, small_settings(), CPU)
    assert (estimate.frozen, estimate.trained, estimate.gradients, estimate.ema) == (12, trained, trained, trained)
    assert estimate.optimizer == 4 * (3 * 1000 + 2 * 1000 + 2 * 3 * 1000)
    assert estimate.above == estimate.gradients + estimate.optimizer + estimate.ema + estimate.activations
    assert estimate.total == estimate.frozen + estimate.trained + estimate.above
    assert estimate_memory(task, small_settings(ema_decay=None), CPU).ema == 0


def test_what_is_frozen_in_the_networks_counts_once():
    task = SmallTask()
    base = nn.Linear(100, 10).requires_grad_(False).bfloat16()
    task.networks = (base, nn.Sequential(base, task.net))
    assert estimate_memory(task, small_settings(), CPU).frozen == 2 * (100 * 10 + 10)


def test_what_is_resident_counts_without_being_run():
    task = SmallTask()
    alone = estimate_memory(task, small_settings(), CPU)
    idle = nn.Linear(100, 10).bfloat16().requires_grad_(False)
    task.resident = (idle, task.net)
    assert estimate_memory(task, small_settings(), CPU) == dataclasses.replace(alone, frozen=alone.frozen + 2 * (100 * 10 + 10))


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    task = task_of("diffusion")
    few, many = (estimate_memory(task, small_settings(batch=batch), CPU) for batch in (2, 8))
    assert 3 < (many.activations + many.gradients) / (few.activations + few.gradients) <= 4  # the peak comes before there are gradients
    assert estimate_memory(task, small_settings(batch=8, checkpointing=True), CPU).activations < 0.6 * many.activations
    assert estimate_memory(task, small_settings(batch=2, gradient_accumulation=4), CPU) == few  # one part at a time


def test_an_optimizer_s_turn_counts_where_it_takes_more_than_the_activations():
    task = SmallTask(width=100_000)
    assert estimate_memory(task, small_settings(batch=1), CPU).activations >= 2 * 4 * 300_000


def test_the_task_is_left_as_it_was():
    task, settings = task_of("diffusion"), small_settings(batch=2)
    before = {name: p.detach().clone() for name, p in task.unet.named_parameters()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    estimate_memory(task, settings, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in task.unet.named_parameters():
        assert type(p) is nn.Parameter and p.grad is None and torch.equal(p, before[name]), name
    loss = task.loss(0, range(2))
    assert type(loss) is torch.Tensor and loss.isfinite()


def test_a_task_that_fails_keeps_no_gradient_and_no_mode():
    task = SmallTask(at=lambda step, samples: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        estimate_memory(task, small_settings(), CPU)
    assert type(torch.ones(1) * 2) is torch.Tensor


def test_it_is_told_in_words():
    memory = Memory(frozen=3_000_000_000, trained=1_000_000, gradients=1_000_000, optimizer=2_000_000, ema=0, activations=2_000_000_000)
    assert str(memory) == "about 5.0 GB of memory: weights 3.0 GB, optimizer 3.0 MB, activations 2.0 GB"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bundled", "bundled checkpointed", "sd1 lora", "sd1 lora checkpointed"])
def test_the_process_grows_by_the_estimate(model):
    """Within 25 %, as the system counts the process's pages; slow: a step of Stable Diffusion in full size."""
    script = Path(__file__).parents[2] / "grow.py"
    environment = {
        **os.environ,
        "PYTHONPATH": str(script.parents[1]),
    }
    told = subprocess.run([sys.executable, script, model], check=True, capture_output=True, text=True, env=environment).stdout
    estimate, measured = map(int, told.split())
    assert estimate == pytest.approx(measured, rel=0.25)
