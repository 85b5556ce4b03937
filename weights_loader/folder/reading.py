"""Read the JSON files of a diffusers folder into a ModelConfig.

    model_index.json        which pipeline, and the class of each part
    unet/ vae/              config.json beside the weights
    text_encoder/           config.json of transformers
    tokenizer/              vocab.json, merges.txt, and what pads a prompt: tokenizer.py
    scheduler/              the noise schedule and what the U-Net predicts

diffusers' classes have more settings than Stable Diffusion uses. One that is set to something else than its family's is refused by name:
settings.py.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from minidiff.blocks import SIZE_WAVES
from minidiff.config import SIZE_NUMBERS, ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minidiff.schedule import SPACINGS
from weights_loader.brief import MOST, brief
from weights_loader.families import Family, family_of_config, family_of_pipeline
from weights_loader.folder.settings import FLAG, read_json, read_settings
from weights_loader.folder.tokenizer import tokenizer_config

Settings = Mapping[str, object]

INDEX = "model_index.json"  # makes a folder a diffusers model

ZEROS = "force_zeros_for_empty_prompt"  # in it, of a pipeline with two text encoders; diffusers' default is true

PREDICTIONS: dict[str, Literal["eps", "v"]] = {"epsilon": "eps", "v_prediction": "v"}


def folder_config(folder: Path) -> tuple[ModelConfig, bool]:
    """Return the config of a diffusers folder, and whether the folder says what the U-Net predicts.

    guidance_scale and the cleaning of text have no place in such a folder: they are the family's.
    Raises FileNotFoundError for a file that is not there, ValueError for a pipeline or a setting that is not supported.
    """
    family = folder_family(folder)
    only, known = family.settings, family.config
    text_encoder, end = _text_config(folder / "text_encoder" / "config.json", only["text_encoder"], known.text_encoder)
    unet, latent_size = _unet_config(folder / "unet" / "config.json", only["unet"])
    vae = vae_config(folder / "vae" / "config.json", only["vae"])
    schedule, says_prediction = _schedule_config(folder / "scheduler" / "scheduler_config.json", only["scheduler"])
    tokenizer = tokenizer_config(folder / "tokenizer", text_encoder, end)
    config = ModelConfig(
        tokenizer, text_encoder, unet, vae, schedule, image_size=latent_size * vae.factor, guidance_scale=known.guidance_scale
    )
    if known.text_encoder_2 is not None:
        text_encoder_2, end = _text_config(folder / "text_encoder_2" / "config.json", only["text_encoder_2"], known.text_encoder_2)
        tokenizer_2 = tokenizer_config(folder / "tokenizer_2", text_encoder_2, end)
        tokenizer_2 = replace(tokenizer_2, cleaning=known.tokenizer_2.cleaning)
        config = replace(config, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, zero_negative=_zero_negative(folder / INDEX))
    cleaning = family_of_config(config).config.tokenizer.cleaning
    return replace(config, tokenizer=replace(tokenizer, cleaning=cleaning)), says_prediction


def _zero_negative(index: Path) -> bool:
    """Return what an absent negative prompt means to a pipeline with two text encoders: zeros, or the empty prompt."""
    value = read_json(index).get(ZEROS, True)
    if not FLAG.holds(value):
        raise ValueError(f"{index}: {ZEROS} is {reprlib.repr(value)}; expected {FLAG.words}")
    return value


def folder_family(folder: Path) -> Family:
    """Return the family that the pipeline of a diffusers folder belongs to. Raises as `folder_config`."""
    pipeline = read_json(folder / INDEX).get("_class_name")
    pipeline = pipeline if isinstance(pipeline, str) and len(pipeline) < MOST else brief(pipeline)
    try:
        return family_of_pipeline(pipeline)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _unet_config(path: Path, only: Settings) -> tuple[UNetConfig, int]:
    """Return the U-Net's config, and the height and width of the latent that it was made for."""
    values = read_settings(path, "unet", only)
    widths = tuple(values["block_out_channels"])
    down = values["down_block_types"]
    mirrored = [name.replace("Down", "Up") for name in reversed(down)]
    up = values["up_block_types"] or mirrored
    if not set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or up != mirrored:
        raise ValueError(f"{path}: blocks {down} and {up}; expected CrossAttnDownBlock2D or DownBlock2D, and their mirror image going up")
    # diffusers' attention_head_dim is the number of heads, not their width: a mistake in a name that is now kept for good.
    heads = values["num_attention_heads"] or values["attention_head_dim"]
    size = values["sample_size"] or 64
    size = size if isinstance(size, int) else size[0]
    depths = values["transformer_layers_per_block"]
    depths = depths if isinstance(depths, list) else [depths] * len(down)
    if len(depths) != len(down):
        raise ValueError(f"{path}: transformer_layers_per_block {depths}; expected a number of blocks for each of {len(down)} levels")
    told = values["projection_class_embeddings_input_dim"]  # pooled vector and size numbers
    if widths == UNetConfig().widths:
        size = max(size, 64)  # diffusers before 0.9 wrote 32 for models of 64 cells
    return UNetConfig(
        in_channels=values["in_channels"],
        out_channels=values["out_channels"],
        widths=widths,
        blocks_per_level=values["layers_per_block"],
        attention=tuple(depth * (name == "CrossAttnDownBlock2D") for name, depth in zip(down, depths)),
        heads=(heads,) * len(widths) if isinstance(heads, int) else tuple(heads),
        context_width=values["cross_attention_dim"],
        linear_projection=values["use_linear_projection"],
        pooled_width=None if told is None else told - SIZE_NUMBERS * SIZE_WAVES,
        groups=values["norm_num_groups"],
    ), size


def vae_config(path: Path, only: Settings) -> VAEConfig:
    """Return the VAE's config."""
    values = read_settings(path, "vae", only)
    return VAEConfig(
        widths=tuple(values["block_out_channels"]),
        blocks_per_level=values["layers_per_block"],
        latent_channels=values["latent_channels"],
        groups=values["norm_num_groups"],
        scaling_factor=float(values["scaling_factor"]),
    )


def _text_config(path: Path, only: Settings, known: TextEncoderConfig) -> tuple[TextEncoderConfig, int | None]:
    """Return a text encoder's config, and the id of the end token if the file states it.

    What is taken of the encoder is no setting: the family's `known` one says it.
    """
    values = read_settings(path, "text_encoder", only)
    activation, width, between = values["hidden_act"], values["hidden_size"], values["intermediate_size"]
    if activation not in ("quick_gelu", "gelu") or between != 4 * width:
        raise ValueError(
            f"{path}: hidden_act {brief(activation)}, intermediate_size {between}; expected quick_gelu or gelu, and {4 * width}"
        )
    return TextEncoderConfig(
        vocab_size=values["vocab_size"],
        context_length=values["max_position_embeddings"],
        width=width,
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        activation=activation,
        penultimate=known.penultimate,
        projection=values["projection_dim"] if known.projection else None,
    ), values["eos_token_id"]


def _schedule_config(path: Path, only: Settings) -> tuple[ScheduleConfig, bool]:
    """Return the schedule, and whether the file says the prediction. The class tells defaults only: a sampler is chosen later."""
    values = read_settings(path, "scheduler", only)
    prediction = values["prediction_type"]
    if prediction is not None and prediction not in PREDICTIONS:
        raise ValueError(f"{path}: prediction_type {brief(prediction)} not supported; supported are {', '.join(PREDICTIONS)}")
    if values["timestep_spacing"] not in SPACINGS:
        raise ValueError(f"{path}: timestep_spacing {brief(values['timestep_spacing'])} not supported; supported are {', '.join(SPACINGS)}")
    return ScheduleConfig(
        timesteps=values["num_train_timesteps"],
        beta_start=float(values["beta_start"]),
        beta_end=float(values["beta_end"]),
        prediction="eps" if prediction is None else PREDICTIONS[prediction],
        zero_terminal_snr=values["rescale_betas_zero_snr"],
        spacing=values["timestep_spacing"],
    ), prediction is not None
