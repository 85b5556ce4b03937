"""The JSON files of a diffusers folder, read into a ModelConfig and written from one.

    model_index.json        which pipeline, and the class of each part
    unet/ vae/              config.json beside the weights
    text_encoder/           config.json of transformers
    tokenizer/              vocab.json, merges.txt, and what pads a prompt
    scheduler/              the noise schedule and what the U-Net predicts

diffusers' classes have more settings than Stable Diffusion uses. One that is set to something else than here is refused by name.
"""

import hashlib
import json
from pathlib import Path

from minidiff.config import SD1, ModelConfig, ScheduleConfig, TextEncoderConfig, TokenizerConfig, UNetConfig, VAEConfig
from minidiff.tokenizer import Tokenizer

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline")

# What a setting must be, or be absent: the only choice that Stable Diffusion makes.
UNET_SETTINGS = {
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,  # cosines first
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
}
VAE_SETTINGS = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
TEXT_SETTINGS = {"layer_norm_eps": 1e-5}
SCHEDULER_SETTINGS = {"beta_schedule": "scaled_linear", "trained_betas": None}  # what the original calls linear
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
PREDICTION_NAMES = {ours: theirs for theirs, ours in PREDICTIONS.items()}

# Of the text of CLIP's own merges, one a line: the tokenizer knows them without a copy in every config.
CLIP_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


def folder_config(folder: Path) -> tuple[ModelConfig, bool]:
    """The config of a diffusers folder, and whether it says what the U-Net predicts.

    guidance_scale and the cleaning of text have no place in such a folder: they are the family's.
    Raises FileNotFoundError for a file that is not there, ValueError for a pipeline or a setting that is not supported.
    """
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline not in PIPELINES:
        raise ValueError(f"{folder}: a {pipeline}, not supported; supported are {', '.join(PIPELINES)}")
    text_encoder = _text_config(folder / "text_encoder" / "config.json")
    unet, image_cells = _unet_config(folder / "unet" / "config.json")
    vae = vae_config(folder / "vae" / "config.json")
    schedule, says_prediction = _schedule_config(folder / "scheduler" / "scheduler_config.json")
    tokenizer = _tokenizer_config(folder / "tokenizer", text_encoder)
    config = ModelConfig(tokenizer, text_encoder, unet, vae, schedule, image_size=image_cells * vae.factor)
    return config, says_prediction


def read_json(path: Path) -> dict:
    """Raises FileNotFoundError or ValueError, naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, and a diffusers folder needs it; interrupted download?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error}); interrupted download?") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a JSON {type(values).__name__}; expected an object of settings")
    return values


def _settings(path: Path, needed: tuple[str, ...], only: dict[str, object]) -> dict:
    """The settings of a config.json, after a look at those that have to be there and those with only one choice."""
    values = read_json(path)
    for name in needed:
        if values.get(name) is None:
            raise ValueError(f"{path}: no setting {name!r}, which has no default")
    for name, choice in only.items():
        if values.get(name, choice) != choice:
            raise ValueError(f"{path}: {name} is {values[name]!r}, which is not supported; Stable Diffusion 1.x and 2.x have {choice!r}")
    return values


def _unet_config(path: Path) -> tuple[UNetConfig, int]:
    """The U-Net's config, and the size in latent cells that it was made for."""
    needed = ("in_channels", "block_out_channels", "down_block_types", "cross_attention_dim", "attention_head_dim")
    values = _settings(path, needed, UNET_SETTINGS)
    widths = tuple(values["block_out_channels"])
    down = values["down_block_types"]
    mirrored = [name.replace("Down", "Up") for name in reversed(down)]
    up = values.get("up_block_types", mirrored)
    if not set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or up != mirrored:
        raise ValueError(f"{path}: blocks {down} and {up}; expected CrossAttnDownBlock2D or DownBlock2D, and their mirror image going up")
    # diffusers' attention_head_dim is the number of heads, not their width: a mistake in a name that is now kept for good.
    heads = values.get("num_attention_heads") or values["attention_head_dim"]
    size = values.get("sample_size") or 64
    if widths == UNetConfig().widths:
        size = max(size, 64)  # diffusers before 0.9 wrote 32 for models of 64 cells
    return UNetConfig(
        in_channels=values["in_channels"],
        out_channels=values.get("out_channels", 4),
        widths=widths,
        blocks_per_level=values.get("layers_per_block", 2),
        attention=tuple(name == "CrossAttnDownBlock2D" for name in down),
        heads=(heads,) * len(widths) if isinstance(heads, int) else tuple(heads),
        context_width=values["cross_attention_dim"],
        linear_projection=values.get("use_linear_projection", False),
        groups=values.get("norm_num_groups", 32),
    ), size if isinstance(size, int) else size[0]


def vae_config(path: Path) -> VAEConfig:
    """The VAE's config.json. scaling_factor is missing in folders from before it was a setting."""
    values = _settings(path, ("block_out_channels", "layers_per_block", "latent_channels"), VAE_SETTINGS)
    return VAEConfig(
        widths=tuple(values["block_out_channels"]),
        blocks_per_level=values["layers_per_block"],
        latent_channels=values["latent_channels"],
        groups=values.get("norm_num_groups", 32),
        scaling_factor=values.get("scaling_factor", SD1.vae.scaling_factor),
    )


def _text_config(path: Path) -> TextEncoderConfig:
    values = _settings(path, ("hidden_size", "num_hidden_layers", "num_attention_heads"), TEXT_SETTINGS)
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
    )


def _schedule_config(path: Path) -> tuple[ScheduleConfig, bool]:
    """The schedule, and whether the file says the prediction. The scheduler's class does not matter: the sampler is chosen later."""
    values = _settings(path, ("beta_start", "beta_end"), SCHEDULER_SETTINGS)
    prediction = values.get("prediction_type")
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(f"{path}: prediction_type {prediction!r} not supported; supported are {', '.join(PREDICTIONS)}")
    return ScheduleConfig(
        timesteps=values.get("num_train_timesteps", 1000),
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
        prediction=PREDICTIONS.get(prediction, "eps"),
        zero_terminal_snr=values.get("rescale_betas_zero_snr", False),
        spacing=values.get("timestep_spacing", "leading"),
    ), prediction is not None


def _tokenizer_config(folder: Path, text_encoder: TextEncoderConfig) -> TokenizerConfig:
    """vocab.json and merges.txt, or the tokenizer.json that transformers 5 writes in their place."""
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
        cleaning="open_clip" if text_encoder.activation == "gelu" else "clip",
        padding="zero" if pad == "!" else "end",  # "!" is token 0
        context_length=min(settings.get("model_max_length", 77), text_encoder.context_length),
    )


def _added_words(folder: Path, settings: dict, first: int) -> tuple[str, ...]:
    """The words behind the vocabulary of the merges, `first` being the first id there, from any of the three files that name them."""
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


# --------------------------------------------------------------------------------------------------------- writing


def write_folder_config(folder: Path, config: ModelConfig, tokenizer: Tokenizer):
    """All JSON files of a diffusers folder, as diffusers.StableDiffusionPipeline reads them. The folder is there and empty."""
    inpainting = config.unet.in_channels != config.vae.latent_channels
    for name, values in {
        "model_index.json": _model_index(PIPELINES[1] if inpainting else PIPELINES[0]),
        "unet/config.json": _unet_json(config),
        "vae/config.json": _vae_json(config),
        "text_encoder/config.json": _text_json(config, tokenizer),
        "scheduler/scheduler_config.json": _scheduler_json(config.schedule),
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, values)
    _write_tokenizer(folder / "tokenizer", tokenizer)


def write_json(path: Path, values: dict):
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_index(pipeline: str) -> dict:
    return {
        "_class_name": pipeline,
        "_diffusers_version": "0.35.0",  # the oldest that the tests' dependencies allow
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
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
        "attention_head_dim": unet.heads,  # their number, see _unet_config
        "use_linear_projection": unet.linear_projection,
        "norm_num_groups": unet.groups,
    } | UNET_SETTINGS


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
    } | VAE_SETTINGS


def _text_json(config: ModelConfig, tokenizer: Tokenizer) -> dict:
    text = config.text_encoder
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "hidden_act": text.activation,
        "projection_dim": text.width,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": 0 if config.tokenizer.padding == "zero" else tokenizer.end_id,
    } | TEXT_SETTINGS


def _scheduler_json(schedule: ScheduleConfig) -> dict:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": PREDICTION_NAMES[schedule.prediction],
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "timestep_spacing": schedule.spacing,
        "steps_offset": 1,  # the original's DDIM counts 1, 34, 67, ...
        "set_alpha_to_one": False,  # and ends at alpha_bar_0
        "clip_sample": False,  # latents are not bounded
    } | SCHEDULER_SETTINGS


def _write_tokenizer(folder: Path, tokenizer: Tokenizer):
    """CLIP's files. The padding token is written where transformers looks for it in every version."""
    folder.mkdir()
    start, end, pad = "<|startoftext|>", "<|endoftext|>", "!" if tokenizer.config.padding == "zero" else "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    bpe = tokenizer.bpe  # open_clip's, which names the two special tokens otherwise
    pieces = [piece for piece, i in bpe.encoder.items() if i not in (tokenizer.start_id, tokenizer.end_id)]
    write_json(folder / "vocab.json", {piece: i for i, piece in enumerate([*pieces, start, end])})
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in bpe.bpe_ranks)]) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.config.context_length, "do_lower_case": True}
    if tokenizer.config.added:
        kind = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
        settings["added_tokens_decoder"] = {
            str(bpe.vocab_size + i): {"content": word} | kind for i, word in enumerate(tokenizer.config.added)
        }
    write_json(folder / "tokenizer_config.json", special | settings)
