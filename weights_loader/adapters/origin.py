"""What a small file says of itself in its metadata: what it is called, which words ask for it, and the model that it was learned on.

    modelspec.   Stability AI's ModelSpec, which the web interfaces show: title, trigger_phrase, architecture, resolution, prediction_type
    ss_          kohya's scripts, by which the web interfaces sort: ss_output_name, ss_sd_model_name, ss_resolution, ss_steps, ...
    minidiff.base    two hashes of the model, so that a file attached to another one is noticed

weights_loader/write.py adds modelspec.hash_sha256. Left out: modelspec.date, for the same training gives the same bytes; ss_sd_model_hash,
a hash of a file that a conversion changes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minidiff.files import digest, tensor_bytes
from minidiff.pipeline import StableDiffusion
from weights_loader.brief import MOST
from weights_loader.write import MODEL_SPEC

BASE_KEY = "minidiff.base"
BASE_NAME = "ss_sd_model_name"
SAMPLE = 16  # numbers of each weight that the hash is made of: milliseconds, where all of them would take seconds
# By the width of the context; of Stable Diffusion 2, ModelSpec has another name for the models that predict v.
ARCHITECTURES = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2-512", 2048: "stable-diffusion-xl-v1-base"}
VERSION_2_V = "stable-diffusion-v2-768-v"
PREDICTIONS = {"eps": "epsilon", "v": "v"}


def base_hashes(sd: StableDiffusion) -> tuple[str, str]:
    """Return two hashes of a model's U-Net and text encoder: of their numbers rounded to float16, and to bfloat16.

    A model that is loaded in half precision has the one or the other hash in common with itself in float32.
    """
    modules = [module for name, module in sd.parts.items() if name != "vae"]
    numbers = torch.cat([p.detach().flatten()[:SAMPLE].float() for module in modules for p in module.parameters()]).cpu()
    half, brain = (digest([tensor_bytes(numbers.to(dtype))])[:16] for dtype in (torch.float16, torch.bfloat16))
    return half, brain


def describe_origin(kind: str, path: Path, sd: StableDiffusion, settings: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the metadata of a small file.

    Args:
        kind: as ModelSpec calls it: "lora", "textual-inversion"
        path: of the file; its name is the title where no word asks for it
        sd: the model that it was learned on
        settings: what it was made with: "model", "concepts" and "settings" are read, as far as they are there
    """
    settings, size = settings or {}, sd.config.image_size
    width, prediction = sd.config.unet.context_width, sd.config.schedule.prediction
    architecture = VERSION_2_V if (width, prediction) == (1024, "v") else ARCHITECTURES.get(width, "minidiff")
    concepts, loop = settings.get("concepts"), settings.get("settings")
    dicts = [one for one in (concepts if isinstance(concepts, list) else []) if isinstance(one, dict)]
    words = [" ".join(word for word in (one.get("token"), one.get("class_word")) if word) for one in dicts]
    trigger, loop = ", ".join(word for word in words if word), loop if isinstance(loop, dict) else {}
    found = {
        MODEL_SPEC: "1.0.0",
        "modelspec.architecture": f"{architecture}/{kind}",
        "modelspec.implementation": "minidiff",
        "modelspec.title": trigger or path.stem,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": PREDICTIONS[prediction],
        "modelspec.trigger_phrase": trigger,
        "ss_output_name": path.stem,
        "ss_resolution": f"({size}, {size})",
        BASE_NAME: str(settings.get("model", "")),
        "ss_v2": str(width == 1024),
        **{f"ss_{name}": str(loop[name]) for name in ("steps", "learning_rate", "seed") if name in loop},
        BASE_KEY: " ".join(base_hashes(sd)),
    }
    return {key: value for key, value in found.items() if value}


def base_note(path: str | Path, metadata: Mapping[str, str], sd: StableDiffusion) -> str | None:
    """Return a sentence if a small file was learned on another model than this one; None if not, or if the file does not say."""
    learned = metadata.get(BASE_KEY, "").split()
    if not learned or set(learned) & set(base_hashes(sd)):
        return None
    name = f" ({metadata[BASE_NAME][:MOST]})" if metadata.get(BASE_NAME) else ""
    return f"{path} was learned on another model{name} than this one: expect a weaker or a different effect"
