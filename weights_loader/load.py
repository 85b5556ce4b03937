"""A checkpoint to a StableDiffusion: the road from a file's bytes to modules that run.

path -> tensors, by part        one LDM-named file, or a diffusers folder (contents.py)
     -> config                  the caller's, the file's own, or the family's that the shapes show (families/)
     -> empty modules           on the meta device: names and shapes, no memory (empty_parts.py)
     -> account of every name   or one error, before anything is built (match.py, report.py)
     -> weights assigned        views of the mapped file, converted only if another dtype or device is asked for
     -> eps or v                if nothing has said it yet, the model is asked (prediction.py)
     -> small files             learned words, Custom Diffusion and LoRA, attached beside the weights (attach.py)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from minidiff.config import ModelConfig
from minidiff.pipeline import StableDiffusion
from minidiff.two_encoders import text_side
from weights_loader.adapters.attach import File, attach
from weights_loader.contents import Contents, check_parts, find, open_checkpoint, take_averages, take_vae
from weights_loader.empty_parts import empty_parts
from weights_loader.families import family_config, family_of_config
from weights_loader.folder import folder_config
from weights_loader.match import match
from weights_loader.metadata import KEY, config_from_json, prediction_from_metadata
from weights_loader.prediction import ask_prediction, with_prediction
from weights_loader.report import Report


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is loaded: the arguments of `load` that concern the model itself, explained there."""

    dtype: torch.dtype | str | None = None
    device: torch.device | str = "cpu"
    ema: bool = False
    vae: str | Path | None = None
    config: ModelConfig | None = None
    prediction: str | None = None

    def __post_init__(self):
        if self.prediction not in (None, "eps", "v"):
            raise ValueError(f"prediction {self.prediction!r} unknown; choose eps or v")
        if isinstance(self.dtype, str) and self.dtype != "file":
            raise ValueError(f"dtype {self.dtype!r} unknown; give a torch.dtype, or 'file' for the file's own")


@dataclass(frozen=True)
class Loaded:
    """A model, and how it came to be."""

    sd: StableDiffusion
    contents: Contents
    report: Report


def load(
    path_or_name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    ema: bool = False,
    vae: str | Path | None = None,
    config: ModelConfig | None = None,
    prediction: str | None = None,
    lora: File | Sequence[File | tuple[File, float]] = (),
    embeddings: File | Sequence[File | tuple[File, str]] = (),
    custom_diffusion: File | Sequence[File | tuple[File, tuple[str, ...]]] = (),
) -> StableDiffusion:
    """Load a Stable Diffusion. Its modules are in eval mode and need no gradient: a trainer says itself what it trains.

    Args:
        path_or_name: a .safetensors or .ckpt file in LDM names, a diffusers folder, or a model that ships with minidiff: "tiny", or "half",
            a narrower one whose training was stopped early, for the lesson that trains on.
        dtype: of the weights; "file" is the one that holds every weight of the file exactly; None is float32 on the CPU, and elsewhere the
            U-Net's. A weight that has it already stays a window onto the file, everything else is converted tensor by tensor: nothing is
            in memory twice.
        device: where the weights go.
        ema: take the moving average of the U-Net's weights, which some .ckpt files hold beside the last ones.
        vae: a file or folder whose VAE is used instead of the model's.
        config: the numbers of a model that is of no known family and does not name them itself.
        prediction: what the U-Net predicts, "eps" or "v", if the file is wrong about it.
        lora: small files to attach, such as ("a.safetensors", ("b.safetensors", 0.7)); see `attach`.
        embeddings: the same for learned words.
        custom_diffusion: the same for Custom Diffusion.

    Raises FileNotFoundError for what is not there, and ValueError, naming the likely cause, for everything that is not a whole model: a
    model is never loaded in part.
    """
    sd = load_with_report(path_or_name, LoadOptions(dtype, device, ema, vae, config, prediction)).sd
    attach(sd, lora=lora, embeddings=embeddings, custom_diffusion=custom_diffusion)
    return sd


def load_with_report(path_or_name: str | Path, options: LoadOptions = LoadOptions()) -> Loaded:
    """Load as `load` does, and return the account of the file's tensors with the model."""
    contents = _open(find(path_or_name), options)
    config, decided = _choose_config(contents, options)
    parts = empty_parts(config)
    report, states = match(contents, parts.named(), config)
    device = torch.device(options.device)
    dtype = _choose_dtype(options.dtype, device, states)
    for name, part in parts.named().items():
        part.load_state_dict({ours: tensor.to(device, dtype) for ours, tensor in states[name].items()}, assign=True)
        part.eval().requires_grad_(False)

    text = text_side(config, parts.encoders)
    for name, tokenizer in text.tokenizers.items():
        known = text.encoders[name].config.vocab_size
        if tokenizer.vocab_size > known:
            raise ValueError(
                f"{contents.path}: the tokenizer knows {tokenizer.vocab_size} tokens, the {name.replace('_', ' ')} {known}; "
                "the two do not belong together"
            )
    notes, tensors = contents.notes, contents.tensors
    if not decided:
        config, note = ask_prediction(config, parts.unet, text)
        notes += (note,)
    sd = StableDiffusion(config, text, parts.unet, parts.vae, {name: tensors[name] for name in report.extra}, notes)
    return Loaded(sd, contents, report)


def _open(path: Path, options: LoadOptions) -> Contents:
    contents = open_checkpoint(path)
    if options.ema:
        contents = take_averages(contents)
    if options.vae is not None:
        contents = take_vae(contents, Path(options.vae))
    check_parts(contents)
    return contents


def _choose_config(contents: Contents, options: LoadOptions) -> tuple[ModelConfig, bool]:
    """Return the config, and whether the prediction in it is certain."""
    config, decided = options.config, True
    if config is None and contents.layout == "diffusers":
        config, decided = folder_config(contents.path)
        config = _fill_from_metadata(config, contents.metadata)
        decided = decided or len(family_of_config(config).predictions) == 1
    elif config is None:
        try:
            config, decided = _file_config(contents)
        except ValueError as error:
            raise ValueError(f"{contents.path}: {error}") from error
    if options.prediction is not None:
        return with_prediction(config, "v" if options.prediction == "v" else "eps"), True
    return config, decided


def _file_config(contents: Contents) -> tuple[ModelConfig, bool]:
    """Return the config of an LDM file, and whether its prediction is certain: by the file's metadata, or by its family."""
    if KEY in contents.metadata:
        return config_from_json(contents.metadata[KEY]), True
    config = family_config(contents.shapes)
    if stated := prediction_from_metadata(contents.metadata):
        return with_prediction(config, stated), True
    return config, len(family_of_config(config).predictions) == 1


def _fill_from_metadata(config: ModelConfig, found: Mapping[str, str]) -> ModelConfig:
    """Take what diffusers' JSON files have no place for from the metadata of a folder that minidiff wrote."""
    if KEY not in found:
        return config
    ours = config_from_json(found[KEY])
    return replace(config, guidance_scale=ours.guidance_scale, tokenizer=replace(config.tokenizer, cleaning=ours.tokenizer.cleaning))


def _choose_dtype(dtype: torch.dtype | str | None, device: torch.device, states: Mapping[str, Mapping[str, Tensor]]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None and device.type == "cpu":
        return torch.float32
    chosen = states.values() if dtype == "file" else [states["unet"]]
    tensors = [tensor for state in chosen for tensor in state.values()]
    # 8-bit floats are for storing only.
    dtypes = {tensor.dtype if tensor.dtype.itemsize > 1 else torch.float16 for tensor in tensors if tensor.dtype.is_floating_point}
    if not dtypes:
        raise ValueError("the weights are whole numbers: a quantised model, which is not supported")
    return reduce(torch.promote_types, dtypes)
