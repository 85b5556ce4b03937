"""Files in, minidiff modules out, and back.

sd = weights_loader.load("model.safetensors")            # or .ckpt, a diffusers folder, "tiny"
weights_loader.save(sd, "folder", layout="diffusers")
print(weights_loader.inspect("model.ckpt"))
weights_loader.convert("model.ckpt", "model.safetensors")

sd = weights_loader.load("tiny", embeddings=("cat.safetensors",), lora=(("style.safetensors", 0.7),))
weights_loader.write_lora("style.safetensors", lora, sd)
weights_loader.rewrite("style.safetensors", "for-diffusers.safetensors", "diffusers")
"""

from weights_loader.adapters.attach import attach, base_notes
from weights_loader.adapters.custom_diffusion import read_custom_diffusion, write_custom_diffusion
from weights_loader.adapters.embedding import read_embedding, write_embedding
from weights_loader.adapters.lora import check_names as check_lora_names
from weights_loader.adapters.lora import read_lora, write_lora
from weights_loader.adapters.rewrite import rewrite, small_kind
from weights_loader.adapters.summary import SmallSummary
from weights_loader.controlnet import read_controlnet, write_controlnet
from weights_loader.judge import load_judge, save_judge
from weights_loader.load import load
from weights_loader.save import convert, save, save_parts
from weights_loader.summary import Summary, inspect

__all__ = [
    "SmallSummary",
    "Summary",
    "attach",
    "base_notes",
    "check_lora_names",
    "convert",
    "inspect",
    "load",
    "load_judge",
    "read_controlnet",
    "read_custom_diffusion",
    "read_embedding",
    "read_lora",
    "rewrite",
    "save",
    "save_judge",
    "save_parts",
    "small_kind",
    "write_controlnet",
    "write_custom_diffusion",
    "write_embedding",
    "write_lora",
]
