"""Modules without weights: names and shapes, no memory. Loading fills them with the tensors of a file."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from minidiff.config import ModelConfig
from minidiff.text_encoder import TextEncoder
from minidiff.two_encoders import text_configs
from minidiff.unet import UNet
from minidiff.vae import VAE


class NoInit(TorchFunctionMode):
    """Modules made inside it do not fill their weights.

    On the meta device there is nothing to fill, and drawing an embedding's normals for nothing makes torch import its compiler:
    2 s and 150 MB.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Parts:
    """The modules of a model."""

    encoders: dict[str, TextEncoder]
    unet: UNet
    vae: VAE

    def named(self) -> dict[str, nn.Module]:
        """Return the modules by their names in `StableDiffusion.parts`."""
        return {**self.encoders, "unet": self.unet, "vae": self.vae}


def empty_parts(config: ModelConfig) -> Parts:
    """Return the modules of a model on the meta device."""
    with torch.device("meta"), NoInit():
        encoders = {name: TextEncoder(numbers) for name, (_, numbers) in text_configs(config).items()}
        return Parts(encoders, UNet(config.unet), VAE(config.vae))
