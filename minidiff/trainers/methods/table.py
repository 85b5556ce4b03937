"""The table of training methods: each is a file, and a line here."""

from typing import Any

from minidiff.config import check_choice
from minidiff.trainers.methods import controlnet, custom_diffusion, dreambooth, fine_tune, lora, pivotal, textual_inversion
from minidiff.trainers.methods.method import Method

METHODS: dict[str, Method[Any]] = {
    "lora": lora.METHOD,
    "dreambooth": dreambooth.METHOD,
    "textual-inversion": textual_inversion.METHOD,
    "pivotal-tuning": pivotal.METHOD,
    "custom-diffusion": custom_diffusion.METHOD,
    "fine-tune": fine_tune.METHOD,
    "controlnet": controlnet.METHOD,
}


def preset(method: str, family: str) -> Any:
    """Return the options of a method (their class depends on it) that fit a family of models: "sd1", "sd2", "sdxl" or "bundled".

    "dreambooth-lora" is DreamBooth's with a LoRA. Raises ValueError for an unknown method or family.
    """
    presets: dict[str, dict[str, Any]] = {name: {**one.presets} for name, one in METHODS.items()}
    presets |= {f"{name}-lora": {**one.low_rank_presets} for name, one in METHODS.items() if one.low_rank_presets}
    check_choice("method", method, presets)
    check_choice("family", family, presets[method])
    return presets[method][family]
