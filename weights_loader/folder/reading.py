"""Read the JSON files of a diffusers folder into a ModelConfig.

    model_index.json        which pipeline, and the class of each part
    unet/ vae/              config.json beside the weights
    text_encoder/           config.json of transformers
    tokenizer/              vocab.json, merges.txt, and what pads a prompt
    scheduler/              the noise schedule and what the U-Net predicts

diffusers' classes have more settings than Stable Diffusion uses. One that is set to something else than its family's is refused by name.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from minidiff.blocks import SIZE_WAVES
from minidiff.config import SD1, SIZE_NUMBERS, ModelConfig, ScheduleConfig, TextEncoderConfig, TokenizerConfig, UNetConfig, VAEConfig
from weights_loader.families import Family, family_of_config, family_of_pipeline

Settings = Mapping[str, object]

INDEX = "model_index.json"  # makes a folder a diffusers model

PREDICTIONS: dict[str, Literal["eps", "v"]] = {"epsilon": "eps", "v_prediction": "v"}

# The digest of CLIP's own merges, one per line: the tokenizer knows them without a copy in every config.
CLIP_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


def folder_config(folder: Path) -> tuple[ModelConfig, bool]:
    """Return the config of a diffusers folder, and whether the folder says what the U-Net predicts.

    guidance_scale and the cleaning of text have no place in such a folder: they are the family's.
    Raises FileNotFoundError for a file that is not there, ValueError for a pipeline or a setting that is not supported.
    """
    family = folder_family(folder)
    only, known = family.settings, family.config
    text_encoder = _text_config(folder / "text_encoder" / "config.json", only["text_encoder"], known.text_encoder)
    unet, latent_size = _unet_config(folder / "unet" / "config.json", only["unet"])
    vae = _vae_config(folder / "vae" / "config.json", only["vae"])
    schedule, says_prediction = _schedule_config(folder / "scheduler" / "scheduler_config.json", only["scheduler"])
    tokenizer = _tokenizer_config(folder / "tokenizer", text_encoder.context_length)
    config = ModelConfig(
        tokenizer, text_encoder, unet, vae, schedule, image_size=latent_size * vae.factor, guidance_scale=known.guidance_scale
    )
    if known.text_encoder_2 is not None:
        text_encoder_2 = _text_config(folder / "text_encoder_2" / "config.json", only["text_encoder_2"], known.text_encoder_2)
        tokenizer_2 = _tokenizer_config(folder / "tokenizer_2", text_encoder_2.context_length)
        tokenizer_2 = replace(tokenizer_2, cleaning=known.tokenizer_2.cleaning)
        config = replace(config, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2)
    cleaning = family_of_config(config).config.tokenizer.cleaning
    return replace(config, tokenizer=replace(tokenizer, cleaning=cleaning)), says_prediction


def folder_family(folder: Path) -> Family:
    """Return the family that the pipeline of a diffusers folder belongs to. Raises as `folder_config`."""
    pipeline = read_json(folder / INDEX).get("_class_name")
    try:
        return family_of_pipeline(pipeline)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises FileNotFoundError or ValueError, naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, and a diffusers folder needs it; interrupted download?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error}); interrupted download?") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a JSON {type(values).__name__}; expected an object of settings")
    return values


def _settings(path: Path, needed: tuple[str, ...], only: Settings) -> dict:
    """Read a config.json. Check the settings that have to be there and those with only one supported value."""
    values = read_json(path)
    for name in needed:
        if values.get(name) is None:
            raise ValueError(f"{path}: no setting {name!r}, which has no default")
    for name, choice in only.items():
        if values.get(name, choice) != choice:
            raise ValueError(f"{path}: {name} is {values[name]!r}, which is not supported; Stable Diffusion 1.x and 2.x have {choice!r}")
    return values


def _unet_config(path: Path, only: Settings) -> tuple[UNetConfig, int]:
    """Return the U-Net's config, and the height and width of the latent that it was made for."""
    needed = ("in_channels", "block_out_channels", "down_block_types", "cross_attention_dim", "attention_head_dim")
    values = _settings(path, needed, only)
    widths = tuple(values["block_out_channels"])
    down = values["down_block_types"]
    mirrored = [name.replace("Down", "Up") for name in reversed(down)]
    up = values.get("up_block_types", mirrored)
    if not set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or up != mirrored:
        raise ValueError(f"{path}: blocks {down} and {up}; expected CrossAttnDownBlock2D or DownBlock2D, and their mirror image going up")
    # diffusers' attention_head_dim is the number of heads, not their width: a mistake in a name that is now kept for good.
    heads = values.get("num_attention_heads") or values["attention_head_dim"]
    depths = values.get("transformer_layers_per_block", 1)
    depths = depths if isinstance(depths, list) else [depths] * len(widths)
    if len(depths) != len(down) or not all(isinstance(depth, int) and depth > 0 for depth in depths):
        raise ValueError(f"{path}: transformer_layers_per_block {depths}; expected a number of blocks for each of {len(down)} levels")
    pooled = values.get("projection_class_embeddings_input_dim") if "addition_embed_type" in only and only["addition_embed_type"] else None
    size = values.get("sample_size") or 64
    if widths == UNetConfig().widths:
        size = max(size, 64)  # diffusers before 0.9 wrote 32 for models of 64 cells
    return UNetConfig(
        in_channels=values["in_channels"],
        out_channels=values.get("out_channels", 4),
        widths=widths,
        blocks_per_level=values.get("layers_per_block", 2),
        attention=tuple(int(depth) * (name == "CrossAttnDownBlock2D") for name, depth in zip(down, depths, strict=True)),
        heads=(heads,) * len(widths) if isinstance(heads, int) else tuple(heads),
        context_width=values["cross_attention_dim"],
        linear_projection=values.get("use_linear_projection", False),
        pooled_width=None if pooled is None else pooled - SIZE_NUMBERS * SIZE_WAVES,
        groups=values.get("norm_num_groups", 32),
    ), size if isinstance(size, int) else size[0]


def _vae_config(path: Path, only: Settings) -> VAEConfig:
    """Return the VAE's config. scaling_factor is missing in folders from before it was a setting."""
    values = _settings(path, ("block_out_channels", "layers_per_block", "latent_channels"), only)
    return VAEConfig(
        widths=tuple(values["block_out_channels"]),
        blocks_per_level=values["layers_per_block"],
        latent_channels=values["latent_channels"],
        groups=values.get("norm_num_groups", 32),
        scaling_factor=values.get("scaling_factor", SD1.vae.scaling_factor),
    )


def _text_config(path: Path, only: Settings, known: TextEncoderConfig) -> TextEncoderConfig:
    """Return a text encoder's config. What is taken of the encoder is no setting: the family's `known` one says it."""
    values = _settings(path, ("hidden_size", "num_hidden_layers", "num_attention_heads"), only)
    activation, width = values.get("hidden_act", "quick_gelu"), values["hidden_size"]
    between = values.get("intermediate_size", 4 * width)
    if activation not in ("quick_gelu", "gelu") or between != 4 * width:
        raise ValueError(f"{path}: hidden_act {activation!r}, intermediate_size {between}; expected quick_gelu or gelu, and {4 * width}")
    return TextEncoderConfig(
        vocab_size=values.get("vocab_size", 49408),
        context_length=values.get("max_position_embeddings", 77),
        width=width,
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        activation=activation,
        penultimate=known.penultimate,
        projection=values.get("projection_dim", width) if known.projection else None,
    )


def _schedule_config(path: Path, only: Settings) -> tuple[ScheduleConfig, bool]:
    """Return the schedule, and whether the file says the prediction. The scheduler's class does not matter: the sampler is chosen later."""
    values = _settings(path, ("beta_start", "beta_end"), only)
    prediction = values.get("prediction_type")
    if prediction is not None and prediction not in PREDICTIONS:
        raise ValueError(f"{path}: prediction_type {prediction!r} not supported; supported are {', '.join(PREDICTIONS)}")
    return ScheduleConfig(
        timesteps=values.get("num_train_timesteps", 1000),
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
        prediction="eps" if prediction is None else PREDICTIONS[prediction],
        zero_terminal_snr=values.get("rescale_betas_zero_snr", False),
        spacing=values.get("timestep_spacing", "leading"),
    ), prediction is not None


def _tokenizer_config(folder: Path, context_length: int) -> TokenizerConfig:
    """Read vocab.json and merges.txt, or the tokenizer.json that transformers 5 writes in their place."""
    settings = read_json(folder / "tokenizer_config.json")
    if (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = tuple(line for line in lines if line and not line.startswith("#version"))
    else:
        model = read_json(folder / "tokenizer.json").get("model", {})
        merges = tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", ()))
    pad = settings.get("pad_token")
    # As transformers: where the settings are of the old kind, the map has the last word. SD 2.x's own files differ in this.
    if (folder / "special_tokens_map.json").is_file() and (pad is None or "added_tokens_decoder" not in settings):
        pad = read_json(folder / "special_tokens_map.json").get("pad_token", pad)
    pad = pad["content"] if isinstance(pad, dict) else pad
    return TokenizerConfig(
        added=_added_words(folder, settings, first=512 + len(merges) + 2),
        merges=None if _sha256(merges) == CLIP_MERGES_SHA256 else merges,
        padding="zero" if pad == "!" else "end",  # "!" is token 0
        context_length=min(settings.get("model_max_length", 77), context_length),
    )


def _added_words(folder: Path, settings: dict, first: int) -> tuple[str, ...]:
    """Return the words behind the vocabulary of the merges, from any of the three files that name them. `first` is their first id."""
    ids = {int(i): token["content"] for i, token in settings.get("added_tokens_decoder", {}).items()}
    if (folder / "added_tokens.json").is_file():
        ids |= {i: word for word, i in read_json(folder / "added_tokens.json").items()}
    if (folder / "tokenizer.json").is_file():
        ids |= {token["id"]: token["content"] for token in read_json(folder / "tokenizer.json").get("added_tokens", [])}
    added = sorted((i, word) for i, word in ids.items() if i >= first)
    if [i for i, _ in added] != list(range(first, first + len(added))):
        raise ValueError(
            f"{folder}: added words have the ids {', '.join(f'{i} {word!r}' for i, word in added)}; expected {first}, {first + 1}, ..."
        )
    return tuple(word for _, word in added)


def _sha256(merges: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(merges).encode()).hexdigest()
