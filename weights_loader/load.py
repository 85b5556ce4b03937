"""A checkpoint to a StableDiffusion: the road from a file's bytes to modules that run.

path -> tensors, by part        one LDM-named file, or a diffusers folder (contents.py)
     -> config                  the caller's, the file's own, or the family's that the shapes show (families/)
     -> empty modules           on the meta device: names and shapes, no memory (empty_parts.py)
     -> account of every name   or one error, before anything is built (match.py, report.py)
     -> weights assigned        views of the mapped file, converted only if another dtype or device is asked for
     -> eps or v                if nothing has said it yet, the model is asked (prediction.py)
     -> small files             learned words, Custom Diffusion and LoRA, attached beside the weights (attach.py)
"""

import re
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
from weights_loader.families import family_config
from weights_loader.folder import folder_config
from weights_loader.match import check_extent, match
from weights_loader.metadata import KEY, config_from_json
from weights_loader.prediction import (
    apply_statements,
    ask_prediction,
    with_prediction,
    with_zero_snr,
)
from weights_loader.report import Report
from weights_loader.stated import MARKERS, refuse_edm
from weights_loader.unused_text import to_ldm_names

CALLER, SCHEDULER = "the caller", "scheduler_config.json"
MOST_TIMESTEPS = 100_000  # that a .yaml may ask for; every Stable Diffusion has 1,000
SILENT = (CALLER, SCHEDULER, KEY)  # what decides without a note: nobody would expect otherwise


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is loaded: the arguments of `load` that concern the model itself, explained there."""

    dtype: torch.dtype | str | None = None
    device: torch.device | str = "cpu"
    ema: bool = False
    vae: str | Path | None = None
    config: ModelConfig | None = None
    prediction: str | None = None
    ignore: str | None = None

    @property
    def ignore_pattern(self) -> re.Pattern[str] | None:
        """Return the compiled `ignore`."""
        return None if self.ignore is None else re.compile(self.ignore)

    def __post_init__(self):
        try:
            re.compile(self.ignore or "")
        except re.error as error:
            raise ValueError(f"ignore {self.ignore!r} is no regular expression: {error}") from None
        if self.prediction not in (None, "eps", "v"):
            raise ValueError(f"prediction {self.prediction!r} unknown; choose eps or v")
        if isinstance(self.dtype, str) and self.dtype != "file":
            raise ValueError(f"dtype {self.dtype!r} unknown; give a torch.dtype, or 'file' for the file's own")


@dataclass(frozen=True)
class Loaded:
    """A model, and how it came to be. decided: what says that it predicts eps or v."""

    sd: StableDiffusion
    contents: Contents
    report: Report
    decided: str


def load(
    path_or_name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    ema: bool = False,
    vae: str | Path | None = None,
    config: ModelConfig | None = None,
    prediction: str | None = None,
    ignore: str | None = None,
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
        ignore: a regular expression; tensors that are not known and whose names it is found in are left out.
        lora: small files to attach, such as ("a.safetensors", ("b.safetensors", 0.7)); see `attach`.
        embeddings: the same for learned words.
        custom_diffusion: the same for Custom Diffusion.

    Raises FileNotFoundError for what is not there, and ValueError, naming the likely cause, for everything that is not a whole model: a
    model is never loaded in part.
    """
    sd = load_with_report(path_or_name, LoadOptions(dtype, device, ema, vae, config, prediction, ignore)).sd
    attach(sd, lora=lora, embeddings=embeddings, custom_diffusion=custom_diffusion)
    return sd


def load_with_report(path_or_name: str | Path, options: LoadOptions = LoadOptions()) -> Loaded:
    """Load as `load` does, and return the account of the file's tensors with the model."""
    contents = _open(find(path_or_name), options)
    config, decided = _choose_config(contents, options)
    check_extent(contents, config)
    parts = empty_parts(config)
    report, states = match(contents, parts.named(), config, options.ignore_pattern)
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
    if decided is None:
        config, decided = ask_prediction(config, parts.unet, text)
        config = with_zero_snr(config, config.schedule.zero_terminal_snr)
        if said := [one.where for one in contents.stated if one.prediction]:
            decided += f"; the file contradicts itself: {', '.join(said)}"
    if decided not in SILENT:
        zero = " with zero terminal SNR" * config.schedule.zero_terminal_snr
        notes += (f"predicts {config.schedule.prediction}{zero}: decided by {decided}; prediction= (--prediction) overrides it",)
    # Markers of another prediction than the one that was decided would mislead whoever reads the file after it is saved.
    extra = [name for name in report.extra if config.schedule.prediction == "v" or not re.search(MARKERS, name)]
    kept = to_ldm_names({name: tensors[name] for name in extra}, config)
    return Loaded(StableDiffusion(config, text, parts.unet, parts.vae, kept, notes), contents, report, decided)


def _open(path: Path, options: LoadOptions) -> Contents:
    contents = open_checkpoint(path)
    if options.ema:
        contents = take_averages(contents)
    if options.vae is not None:
        contents = take_vae(contents, Path(options.vae))
    check_parts(contents)
    return contents


def _choose_config(contents: Contents, options: LoadOptions) -> tuple[ModelConfig, str | None]:
    """Return the config, and what says the prediction in it; None if the model has to be asked."""
    try:
        config, decided = _stated_config(contents, options)
        if contents.vae_config is not None:
            config = replace(config, vae=contents.vae_config)
    except ValueError as error:
        raise ValueError(error if str(error).startswith(str(contents.path)) else f"{contents.path}: {error}") from error
    if options.prediction is not None:
        config = with_prediction(config, "v" if options.prediction == "v" else "eps")
        return with_zero_snr(config, config.schedule.zero_terminal_snr and options.prediction == "v"), CALLER
    return config, decided


def _stated_config(contents: Contents, options: LoadOptions) -> tuple[ModelConfig, str | None]:
    stated = contents.stated
    if options.prediction is None:
        refuse_edm(contents.rest)
    else:
        stated = tuple(replace(one, prediction=options.prediction) for one in stated)
    if options.config is not None:
        return options.config, CALLER
    if contents.layout == "diffusers":
        config, decided = folder_config(contents.path)
        config = _fill_from_metadata(config, contents.metadata)
        return (config, SCHEDULER) if decided else apply_statements(config, stated)
    if KEY in contents.metadata:
        return config_from_json(contents.metadata[KEY]), KEY
    config = _with_scale(_with_yaml(family_config(contents.shapes), contents.yaml), contents.rest.get("scale_factor"))
    return apply_statements(config, stated)


def _with_yaml(config: ModelConfig, numbers: Mapping[str, float]) -> ModelConfig:
    """Return the config with the noise schedule and the factor of the latents that the .yaml next to the file states."""
    factor = numbers.get("scaling_factor", config.vae.scaling_factor)
    if not factor > 0:
        raise ValueError(f"scale_factor: {factor:g} in the .yaml of its name: expected a number above 0")
    schedule = {name: numbers[name] for name in ("beta_start", "beta_end") if name in numbers}
    timesteps = int(numbers.get("timesteps", config.schedule.timesteps))
    if not 2 <= timesteps <= MOST_TIMESTEPS:
        raise ValueError(f"timesteps: {timesteps} in the .yaml of its name: expected 2 to {MOST_TIMESTEPS}")
    schedule = replace(config.schedule, timesteps=timesteps, **schedule)
    return replace(config, schedule=schedule, vae=replace(config.vae, scaling_factor=factor))


def _with_scale(config: ModelConfig, factor: Tensor | None) -> ModelConfig:
    """Return the config with the factor of the latents that a file of the original's training states, if it is another one."""
    if factor is None or factor.numel() != 1 or abs(float(factor) / config.vae.scaling_factor - 1) < 2**-8:  # the precision of bfloat16
        return config
    return replace(config, vae=replace(config.vae, scaling_factor=float(factor)))


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
