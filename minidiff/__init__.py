"""Stable Diffusion, every part written out. minidiff/README.md says in which order to read it.

The names below are imported when they are first used, so that `import minidiff` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minidiff.config import ModelConfig
    from minidiff.guidance import guide
    from minidiff.kernels.dispatch import attention_backend
    from minidiff.pipeline import StableDiffusion
    from minidiff.samplers import sample
    from minidiff.schedule import NoiseSchedule
    from minidiff.text_encoder import TextEncoder
    from minidiff.tokenizer import Tokenizer
    from minidiff.unet import UNet
    from minidiff.vae import VAE

__version__ = "0.1.0"
__all__ = [
    "ModelConfig",
    "NoiseSchedule",
    "StableDiffusion",
    "TextEncoder",
    "Tokenizer",
    "UNet",
    "VAE",
    "attention_backend",
    "guide",
    "sample",
]

_HOME = {
    "ModelConfig": "config",
    "NoiseSchedule": "schedule",
    "StableDiffusion": "pipeline",
    "TextEncoder": "text_encoder",
    "Tokenizer": "tokenizer",
    "UNet": "unet",
    "VAE": "vae",
    "attention_backend": "kernels.dispatch",
    "guide": "guidance",
    "sample": "samplers",
}


def __getattr__(name: str) -> object:
    """Import a public name from the file that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'minidiff' has no attribute {name!r}")
    return getattr(import_module(f"minidiff.{_HOME[name]}"), name)
