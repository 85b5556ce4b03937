"""Files in, minidiff modules out, and back.

    sd = weights_loader.load("model.safetensors")            # or .ckpt, a diffusers folder, "tiny"
    weights_loader.save(sd, "folder", layout="diffusers")
    print(weights_loader.inspect("model.ckpt"))
    weights_loader.convert("model.ckpt", "model.safetensors")
"""

from weights_loader.load import load
from weights_loader.save import convert, save
from weights_loader.summary import Summary, inspect

__all__ = ["Summary", "convert", "inspect", "load", "save"]
