"""Small checkpoints of every family, in every container that public ones come in."""

import dataclasses
import gzip
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minidiff.config import ModelConfig, TokenizerConfig
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.scenes import bpe_merges
from tests.small_models import small_config, small_model, xl_config
from weights_loader import families
from weights_loader.families import Family, part_names
from weights_loader.families.stable_diffusion_1 import STABLE_DIFFUSION_1
from weights_loader.families.stable_diffusion_2 import STABLE_DIFFUSION_2
from weights_loader.name_table import file_shapes, to_file
from weights_loader.save import tensors_of
from weights_loader.write import write_safetensors

DATA = Path(__file__).parent / "data"


def public_keys(version: int | str) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a whole SD 1.x, 2.x or XL file in LDM names, made from the original model classes."""
    path = DATA / (f"sdxl{version[2:]}-keys.json.gz" if isinstance(version, str) else f"sd-v{version}-keys.json.gz")
    return {name: tuple(shape) for name, shape in json.loads(gzip.open(path).read()).items()}


def family_configs() -> dict[str, ModelConfig]:
    """Every family, a few thousand times smaller. SD 2's text encoder leaves out the last of 3 blocks."""
    sd1 = small_config("eps")
    sd1 = dataclasses.replace(sd1, schedule=dataclasses.replace(sd1.schedule, spacing="leading"), image_size=64)
    sd2 = dataclasses.replace(
        sd1,
        tokenizer=TokenizerConfig(merges=bpe_merges(), cleaning="open_clip", padding="zero", context_length=sd1.tokenizer.context_length),
        text_encoder=dataclasses.replace(sd1.text_encoder, activation="gelu"),
        unet=dataclasses.replace(sd1.unet, linear_projection=True),
        schedule=dataclasses.replace(sd1.schedule, prediction="v"),
    )
    inpainting = [dataclasses.replace(base, unet=dataclasses.replace(base.unet, in_channels=9)) for base in (sd1, sd2)]
    xl = xl_config()
    return {
        "SD 1": sd1,
        "SD 2": sd2,
        "SD 1 inpainting": inpainting[0],
        "SD 2 inpainting": inpainting[1],
        "bundled": small_config("v"),
        "SDXL": xl,
        "SDXL inpainting": dataclasses.replace(xl, unet=dataclasses.replace(xl.unet, in_channels=9)),
    }


def family_model(name: str) -> StableDiffusion:
    """Random weights; of SD 2 also what its files hold without use."""
    sd = small_model(family_configs()[name])
    if sd.config.text_encoder.activation == "gelu":
        for key, tensor in part_to_file(sd, "text_encoder", "ldm").items():
            if ".resblocks.1." in key:
                sd.extra_tensors[key.replace(".resblocks.1.", ".resblocks.2.")] = tensor + 1
        sd.extra_tensors["cond_stage_model.model.text_projection"] = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
        sd.extra_tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    if sd.config.text_encoder_2 is not None:
        sd.extra_tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    return sd


def with_unknown_tensor(path: Path) -> Path:
    """Write a copy of a .safetensors file, strange.safetensors, with a tensor in it that nobody knows: zorp.weight."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {"zorp.weight": torch.zeros(3)}, path.with_name("strange.safetensors"), metadata)
    return path.with_name("strange.safetensors")


def part_to_file(sd: StableDiffusion, part: str, layout: str) -> dict[str, torch.Tensor]:
    """The tensors of one part, as files of a layout hold them."""
    return to_file(sd.parts[part], part_names(sd.config, part, layout))


def ldm_tensors(sd: StableDiffusion) -> dict[str, torch.Tensor]:
    """As a public file holds them."""
    return {name: tensor.detach() for name, tensor in (tensors_of(sd, "ldm") | sd.extra_tensors).items()}


def ldm_shapes(sd: StableDiffusion) -> dict[str, tuple[int, ...]]:
    """The shapes of what nothing is left out of."""
    parts = (file_shapes(part, part_names(sd.config, name, "ldm")) for name, part in sd.parts.items())
    return {name: shape for part in parts for name, shape in part.items()}


def plug_in(monkeypatch, *plugged: Family):
    """Put families into the table, each in the place of the one with its name, or before all others."""
    names = {family.name for family in plugged if not family.any_size}
    others = [family for family in families.FAMILIES if family.name not in names]
    monkeypatch.setattr(families, "FAMILIES", (*plugged, *others))


def plug_in_small_families(monkeypatch) -> dict[str, ModelConfig]:
    """Put small models in the places of the public ones, so that they are recognised without a config."""
    configs = family_configs()
    # The small ones are as wide as each other; the real ones are not.
    wider = dataclasses.replace(configs["SD 2"], text_encoder=dataclasses.replace(configs["SD 2"].text_encoder, width=32, heads=4))
    wider = dataclasses.replace(wider, unet=dataclasses.replace(wider.unet, context_width=32))
    plug_in(
        monkeypatch,
        dataclasses.replace(STABLE_DIFFUSION_1, config=configs["SD 1"]),
        dataclasses.replace(STABLE_DIFFUSION_2, config=wider),
    )
    return {"SD 1": configs["SD 1"], "SD 2": wider}


def extras(config: ModelConfig) -> dict[str, torch.Tensor]:
    """What files hold beside the weights."""
    return {
        "betas": torch.zeros(1000),
        "alphas_cumprod": torch.zeros(1000),
        "sqrt_one_minus_alphas_cumprod": torch.zeros(1000),
        "sqrt_recipm1_alphas_cumprod": torch.zeros(1000),
        "posterior_mean_coef2": torch.zeros(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(config.text_encoder.context_length)[None],
    }


CONTAINERS = {
    "safetensors": lambda tensors, path: write_safetensors(path, tensors),
    "zip": torch.save,
    "zip, wrapped": lambda tensors, path: torch.save({"epoch": 3, "global_step": 10, "state_dict": tensors}, path),
    "legacy, wrapped": lambda tensors, path: torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False),
}


def assert_same_model(a: StableDiffusion, b: StableDiffusion):
    """Bit for bit, and nothing carried is lost."""
    for name in a.parts:
        states = a.parts[name].state_dict(), b.parts[name].state_dict()
        assert states[0].keys() == states[1].keys()
        for key in states[0]:
            assert states[0][key].dtype == states[1][key].dtype and torch.equal(states[0][key], states[1][key]), f"{name}: {key}"
    assert a.extra_tensors.keys() == b.extra_tensors.keys()
    assert all(torch.equal(a.extra_tensors[key], b.extra_tensors[key]) for key in a.extra_tensors)
    assert a.config == b.config
