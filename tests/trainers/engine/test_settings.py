"""Settings and recipes: what cannot be followed is refused, by name."""

import dataclasses
import subprocess
import sys

import pytest

from minidiff.bundled.recipe import RECIPES, Recipe
from minidiff.bundled.tasks import bundled_config
from minidiff.trainers.engine.optimizer import learning_rate
from minidiff.trainers.engine.settings import Settings
from tests.small_task import small_settings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 0.0}, "learning_rate 0.0: nothing is learned at it"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"steps": 0}, "steps 0: training needs at least 1"),
        ({"batch": 0}, "batch 0"),
        ({"gradient_accumulation": 0}, "gradient_accumulation 0"),
        ({"save_every": 0}, "save_every 0"),
        ({"warmup_steps": -1}, "warmup_steps -1: it cannot be below 0"),
        ({"seed": -1}, "seed -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm 0.0"),
        ({"ema_decay": 1.0}, "ema_decay 1.0 is outside 0..1"),
        ({"compile": True, "checkpointing": True}, "choose one"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        small_settings(**change)


@pytest.mark.parametrize(
    ("name", "choices"), [("schedule", "constant, linear, cosine, linear_after_hold"), ("precision", "auto, float32, bfloat16, float16")]
)
def test_an_unknown_choice_is_refused_with_the_choices(name, choices):
    settings = small_settings()
    object.__setattr__(settings, name, "odd")  # where annotations are not checked, as they are in these tests
    with pytest.raises(ValueError, match=f"{name} 'odd' unknown; choose {choices}"):
        Settings.__post_init__(settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scenes": 0}, "scenes 0: a recipe needs at least 1"),
        ({"steps": -1}, "steps -1"),
        ({"vae_batch": 0}, "batch 0"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"kl_weight": -1.0}, "kl_weight -1.0"),
        ({"caption_dropout": 1.5}, "caption_dropout 1.5 is outside 0..1"),
        ({"min_snr": 0.0}, "min_snr 0.0: gamma must be a finite number above 0"),
        ({"ema_decay": -0.1}, "ema_decay -0.1"),
        ({"widths": (32, 64)}, r"widths \(32, 64\): the U-Net has three levels"),
        ({"widths": (32, 48, 96)}, "each a multiple of 32"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**change)


def test_a_recipe_has_the_settings_of_both_stages():
    recipe = Recipe(seed=3, vae_steps=5, vae_batch=6, vae_learning_rate=0.7, steps=8, batch=9, learning_rate=0.1, ema_decay=0.5)
    vae, diffusion = recipe.autoencoder(), recipe.diffusion()
    assert (vae.steps, vae.batch, vae.learning_rate, vae.seed, vae.ema_decay) == (5, 6, 0.7, 3, 0.5)
    assert (diffusion.steps, diffusion.batch, diffusion.learning_rate, diffusion.seed, diffusion.ema_decay) == (8, 9, 0.1, 3, 0.5)


def test_the_half_trained_model_is_narrower_and_its_rate_does_not_fall():
    half = RECIPES["half"]
    config = bundled_config(half.widths)
    assert config.unet.widths == (32, 64, 96) and [w // h for w, h in zip(config.unet.widths, config.unet.heads)] == [32, 32, 32]
    assert dataclasses.replace(config, unet=bundled_config().unet) == bundled_config()
    rates = [learning_rate(step, half.diffusion()) for step in range(half.steps)]
    assert rates[60:] == [half.learning_rate] * (half.steps - 60)
    assert half.autoencoder().schedule == "linear_after_hold"
    assert bundled_config((64, 128, 160)) == bundled_config() and RECIPES["bundled"] == Recipe()


def test_the_numbers_alone_need_no_torch():
    subprocess.run([sys.executable, "-c", "import minidiff.trainers.engine.settings, sys; assert 'torch' not in sys.modules"], check=True)
