"""Write the JSON files of a diffusers folder from a ModelConfig: the inverse of reading.py."""

import json
from collections.abc import Mapping
from pathlib import Path

from minidiff.blocks import SIZE_WAVES
from minidiff.config import SIZE_NUMBERS, ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig
from minidiff.tokenizer import Tokenizer
from minidiff.two_encoders import text_configs
from weights_loader.families import family_of_config
from weights_loader.folder.reading import PREDICTIONS, ZEROS

PREDICTION_NAMES = {ours: theirs for theirs, ours in PREDICTIONS.items()}


def write_folder_config(folder: Path, config: ModelConfig, tokenizers: Mapping[str, Tokenizer]):
    """Write all JSON files of a diffusers folder, as diffusers.StableDiffusionPipeline reads them, into an empty folder."""
    family = family_of_config(config)
    inpainting = config.unet.in_channels != config.vae.latent_channels
    encoders = {name: numbers for name, (_, numbers) in text_configs(config).items()}
    for name, values in {
        "model_index.json": _model_index(family.pipelines[1 if inpainting else 0], config),
        "unet/config.json": {**family.settings["unet"], **_unet_json(config)},
        "vae/config.json": {**family.settings["vae"], **_vae_json(config)},
        **{f"{part}/config.json": {**family.settings[part], **_text_json(encoders[part], tokenizers[part])} for part in encoders},
        "scheduler/scheduler_config.json": _scheduler_json(config.schedule),
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, values)
    for part, tokenizer in tokenizers.items():
        _write_tokenizer(folder / part.replace("text_encoder", "tokenizer"), tokenizer)


def write_json(path: Path, values: dict):
    """Write a JSON file as diffusers does: indented, ending in a newline."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_index(pipeline: str, config: ModelConfig) -> dict:
    second = {
        ZEROS: config.zero_negative,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
    }
    checker = {"requires_safety_checker": False, "safety_checker": [None, None]}
    return {
        "_class_name": pipeline,
        "_diffusers_version": "0.35.0",  # diffusers only notes it; newer ones read the same settings
        "feature_extractor": [None, None],
        **(second if config.text_encoder_2 is not None else checker),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _unet_json(config: ModelConfig) -> dict:
    unet = config.unet
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in unet.attention]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.image_size // config.vae.factor,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": unet.widths,
        "layers_per_block": unet.blocks_per_level,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "cross_attention_dim": unet.context_width,
        "attention_head_dim": unet.heads,  # their number, see reading.py
        **added_json(unet),
        "use_linear_projection": unet.linear_projection,
        "norm_num_groups": unet.groups,
    }


def added_json(unet: UNetConfig) -> dict:
    """Return the settings that a U-Net, or a ControlNet, has if it is told a pooled vector and sizes."""
    if unet.pooled_width is None:
        return {}
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WAVES,
        "transformer_layers_per_block": [max(1, depth) for depth in unet.attention],  # diffusers' middle takes the last one too
        "projection_class_embeddings_input_dim": unet.pooled_width + SIZE_NUMBERS * SIZE_WAVES,
    }


def _vae_json(config: ModelConfig) -> dict:
    vae = config.vae
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": config.image_size,
        "block_out_channels": vae.widths,
        "layers_per_block": vae.blocks_per_level,
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.widths),
        "latent_channels": vae.latent_channels,
        "norm_num_groups": vae.groups,
        "scaling_factor": vae.scaling_factor,
    }


def _text_json(text: TextEncoderConfig, tokenizer: Tokenizer) -> dict:
    return {
        "architectures": ["CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "hidden_act": text.activation,
        "projection_dim": text.projection or text.width,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": 0 if tokenizer.config.padding == "zero" else tokenizer.end_id,
    }


def _scheduler_json(schedule: ScheduleConfig) -> dict:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",  # what the original calls linear
        "trained_betas": None,
        "prediction_type": PREDICTION_NAMES[schedule.prediction],
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "timestep_spacing": schedule.spacing,
        "steps_offset": 1,  # the original's DDIM counts 1, 34, 67, ...
        "set_alpha_to_one": False,  # and ends at alpha_bar_0
        "clip_sample": False,  # latents are not bounded
    }


def _write_tokenizer(folder: Path, tokenizer: Tokenizer):
    """Write CLIP's files. The padding token stands where transformers looks for it in every version."""
    folder.mkdir()
    start, end, pad = "<|startoftext|>", "<|endoftext|>", "!" if tokenizer.config.padding == "zero" else "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    bpe = tokenizer.bpe  # open_clip's, which names the two special tokens otherwise
    pieces = [piece for piece, i in bpe.encoder.items() if i not in (tokenizer.start_id, tokenizer.end_id)]
    write_json(folder / "vocab.json", {piece: i for i, piece in enumerate([*pieces, start, end])})
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in bpe.bpe_ranks)]) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    settings: dict[str, object] = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.config.context_length,
        "do_lower_case": True,
    }
    if tokenizer.config.added:
        kind = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
        settings["added_tokens_decoder"] = {
            str(bpe.vocab_size + i): {"content": word} | kind for i, word in enumerate(tokenizer.config.added)
        }
    write_json(folder / "tokenizer_config.json", special | settings)
