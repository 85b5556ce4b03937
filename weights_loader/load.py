"""A checkpoint to a StableDiffusion: the road from a file's bytes to modules that run.

path -> tensors, by part        one LDM-named file, or a diffusers folder (contents.py)
     -> config                  the caller's, the file's own, or the family's that the shapes show
     -> empty modules           on the meta device: names and shapes, no memory
     -> account of every name   or one error, before anything is built
     -> weights assigned        views of the mapped file, converted only if another dtype or device is asked for
     -> eps or v                if nothing has said it yet, the model is asked
     -> small files             learned words, Custom Diffusion and LoRA, attached beside the weights (attach.py)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minidiff.config import ModelConfig
from minidiff.pipeline import StableDiffusion
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer
from minidiff.unet import UNet
from minidiff.vae import VAE
from weights_loader import detect, dialects, folder, metadata
from weights_loader.adapters.attach import File, attach
from weights_loader.contents import Contents, check_parts, find, open_checkpoint, take_averages, take_vae
from weights_loader.dialects import Part
from weights_loader.report import Report


@dataclass(frozen=True)
class Loaded:
    """A model, and how it came to be."""

    sd: StableDiffusion
    contents: Contents
    report: Report


class NoInit(TorchFunctionMode):
    """Modules made inside it do not fill their weights.

    On the meta device there is nothing to fill, and drawing an embedding's normals for nothing makes torch import its compiler:
    2 s and 150 MB.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


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
    """Load a Stable Diffusion: a .safetensors or .ckpt file in LDM names, a diffusers folder, or "tiny", which ships with minidiff.

    "half" ships too: a narrower model whose training was stopped early, for the lesson that trains on.
    dtype: of the weights; "file" is the one that holds every weight of the file exactly; None is float32 on the CPU, and elsewhere the
        U-Net's. A weight that has it already stays a window onto the file, everything else is converted tensor by tensor: nothing is in
        memory twice.
    ema: take the moving average of the U-Net's weights, which some .ckpt files hold beside the last ones.
    vae: a file or folder whose VAE is used instead of the model's.
    config: the numbers of a model that is of no known family and does not name them itself.
    prediction: what the U-Net predicts, if the file is wrong about it.
    lora, embeddings, custom_diffusion: small files to attach, such as lora=("a.safetensors", ("b.safetensors", 0.7)); see `attach`.

    The modules are in eval mode and need no gradient: most callers draw pictures, and a trainer says itself what it trains.
    Raises FileNotFoundError for what is not there, and ValueError, naming the likely cause, for everything that is not a whole model: a
    model is never loaded in part.
    """
    sd = load_with_report(path_or_name, dtype=dtype, device=device, ema=ema, vae=vae, config=config, prediction=prediction).sd
    attach(sd, lora=lora, embeddings=embeddings, custom_diffusion=custom_diffusion)
    return sd


def load_with_report(
    path_or_name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    ema: bool = False,
    vae: str | Path | None = None,
    config: ModelConfig | None = None,
    prediction: str | None = None,
) -> Loaded:
    """As `load`, with the account of the file's tensors."""
    if prediction not in (None, "eps", "v"):
        raise ValueError(f"prediction {prediction!r} unknown; choose eps or v")
    if isinstance(dtype, str) and dtype != "file":
        raise ValueError(f"dtype {dtype!r} unknown; give a torch.dtype, or 'file' for the file's own")
    device = torch.device(device)
    contents = open_checkpoint(find(path_or_name))
    if ema:
        contents = take_averages(contents)
    if vae is not None:
        contents = take_vae(contents, Path(vae))
    check_parts(contents)
    config, undecided = _choose_config(contents, config, prediction)

    with torch.device("meta"), NoInit():
        parts = {"text_encoder": TextEncoder(config.text_encoder), "unet": UNet(config.unet), "vae": VAE(config.vae)}
    report, states = _match(contents, parts, config)
    dtype = _choose_dtype(dtype, device, states)
    for name, part in parts.items():
        part.load_state_dict({ours: tensor.to(device, dtype) for ours, tensor in states[name].items()}, assign=True)
        part.eval().requires_grad_(False)

    tokenizer = Tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.text_encoder.vocab_size:
        raise ValueError(
            f"{contents.path}: the tokenizer knows {tokenizer.vocab_size} tokens, the text encoder {config.text_encoder.vocab_size}; "
            "the two do not belong together"
        )
    notes = contents.notes
    if undecided:
        config, note = _ask_prediction(config, parts["unet"], parts["text_encoder"], tokenizer)
        notes += (note,)
    everything = contents.rest | {name: tensor for part in contents.parts.values() for name, tensor in part.items()}
    carried = {name: everything[name] for name in report.carried}
    sd = StableDiffusion(config, parts["text_encoder"], parts["unet"], parts["vae"], tokenizer, carried, notes)
    return Loaded(sd, contents, report)


# ---------------------------------------------------------------------------------------------------------- deciding


def _choose_config(contents: Contents, config: ModelConfig | None, prediction: str | None) -> tuple[ModelConfig, bool]:
    """The config, and whether the prediction in it is still a guess."""
    decided = True
    if config is None and contents.layout == "diffusers":
        config, decided = folder.folder_config(contents.path)
        config = _fill_from_metadata(config, contents.metadata)
        decided = decided or config.text_encoder.activation == "quick_gelu"
    elif config is None:
        try:
            config, decided = _file_config(contents)
        except ValueError as error:
            raise ValueError(f"{contents.path}: {error}") from error
    if prediction is not None:
        return _with_prediction(config, prediction), False
    return config, not decided


def _file_config(contents: Contents) -> tuple[ModelConfig, bool]:
    """The config of an LDM file, and whether its prediction is certain: by the file's metadata, or by its family."""
    if metadata.KEY in contents.metadata:
        return metadata.config_from_json(contents.metadata[metadata.KEY]), True
    config = detect.family_config(contents.shapes)
    stated = metadata.prediction_from_metadata(contents.metadata)
    # The public models of 1.x all predict eps, of 2.x some eps and some v.
    return _with_prediction(config, stated or config.schedule.prediction), stated is not None or config.schedule.prediction == "eps"


def _fill_from_metadata(config: ModelConfig, found: dict[str, str]) -> ModelConfig:
    """What diffusers' JSON files have no place for, from the metadata of a folder of ours."""
    if metadata.KEY not in found:
        return config
    ours = metadata.config_from_json(found[metadata.KEY])
    return replace(config, guidance_scale=ours.guidance_scale, tokenizer=replace(config.tokenizer, cleaning=ours.tokenizer.cleaning))


def _with_prediction(config: ModelConfig, prediction: str) -> ModelConfig:
    if prediction == config.schedule.prediction:
        return config
    config = replace(config, schedule=replace(config.schedule, prediction=prediction))
    # Of SD 2.x, the models for 768 pixels predict v and those for 512 eps.
    if detect.family(detect.config_sizes(config)) == "Stable Diffusion 2.x":
        config = replace(config, image_size=768 if prediction == "v" else 512)
    return config


def _ask_prediction(config: ModelConfig, unet: UNet, text_encoder: TextEncoder, tokenizer: Tokenizer) -> tuple[ModelConfig, str]:
    correlation = detect.noise_correlation(unet, text_encoder, tokenizer, config.schedule.timesteps)
    if not math.isfinite(correlation):
        raise ValueError(
            "the U-Net's answer is not finite: broken weights, or too large for their dtype; prediction= (--prediction) skips the test"
        )
    prediction = "eps" if correlation > detect.EPS_CORRELATION else "v"
    note = (
        f"predicts {prediction}: decided by a numerical test (at the highest noise its answer correlates {correlation:.2f} with its input; "
        "an eps-model is near 1, a v-model near 0); prediction= (--prediction) overrides it"
    )
    return _with_prediction(config, prediction), note


def _choose_dtype(dtype: torch.dtype | str | None, device: torch.device, states: dict[str, dict[str, Tensor]]) -> torch.dtype:
    if dtype == "file":
        tensors = [tensor for state in states.values() for tensor in state.values()]
    elif dtype is None and device.type != "cpu":
        tensors = states["unet"].values()
    else:
        return dtype or torch.float32
    # 8-bit floats are for storing only.
    dtypes = {tensor.dtype if tensor.dtype.itemsize > 1 else torch.float16 for tensor in tensors if tensor.dtype.is_floating_point}
    if not dtypes:
        raise ValueError("the weights are whole numbers: a quantised model, which is not supported")
    return reduce(torch.promote_types, dtypes)


# ---------------------------------------------------------------------------------------------------------- matching


def _match(contents: Contents, parts: dict[str, Part], config: ModelConfig) -> tuple[Report, dict[str, dict[str, Tensor]]]:
    """The account of all tensors, and each part's state dict in our names; or one error."""
    report, places = Report(config.text_encoder.layers), {}
    for name, part in parts.items():
        places[name] = report.add_part(part, contents.layouts[name], contents.parts[name])
    report.add_rest(list(contents.rest))
    problem = report.problem()
    if problem:
        cause = _likely_cause(contents, report, config)
        raise ValueError(f"{contents.path}: not the weights of {detect.family_name(config)}: {problem}\n  likely cause: {cause}")
    states = {}
    for name, part in parts.items():
        tensors, parameters = contents.parts[name], part.state_dict()
        states[name] = {ours: dialects.from_file(tensors[place.name], place, parameters[ours]) for ours, place in places[name].items()}
    return report, states


def _likely_cause(contents: Contents, report: Report, config: ModelConfig) -> str:
    problems = len(report.missing) + len(report.unexpected) + len(report.wrong_shape)
    if contents.layout == "ldm" and problems > len(report.missing):
        numbers = detect.sizes(contents.shapes)
        found = detect.family(numbers)
        if found and found != detect.family(detect.config_sizes(config)):
            return f"the file is a {found}, and another config was asked for; leave config= out"
        if different := detect.differences(numbers, config):
            listed = "; ".join(f"{name} {values}" for name, values in different.items())
            return f"a model of another size ({listed}); pass its own config="
    if len(report.missing) == problems:
        return "weights were left out when the file was saved, or it is one shard of several"
    if len(report.unexpected) == problems:
        return "something else was saved beside the model; remove those tensors"
    return "another kind of model, or a config that is not this file's"
