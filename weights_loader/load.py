"""A checkpoint to a StableDiffusion: the road from a file's bytes to modules that run.

    path -> tensors, by part        one LDM-named file, or a diffusers folder
         -> config                  the caller's, the file's own, or the family's that the shapes show
         -> empty modules           on the meta device: names and shapes, no memory
         -> account of every name   or one error, before anything is built
         -> weights assigned        views of the mapped file, converted only if another dtype or device is asked for
         -> eps or v                if nothing has said it yet, the model is asked
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
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
from weights_loader.dialects import Part
from weights_loader.read import Checkpoint, read
from weights_loader.report import Report

BUNDLED = {"tiny": Path(__file__).parent / "bundled" / "tiny.safetensors"}
CARRIED_FILE = "carried.safetensors"  # beside the parts of a diffusers folder of ours, in LDM names
PARTS = ("text_encoder", "unet", "vae")
LDM_PREFIXES = {"cond_stage_model.": "text_encoder", dialects.UNET_PREFIX: "unet", dialects.VAE_PREFIX: "vae"}


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds: the tensors of each part in the names of its layout, and those of no part."""

    path: Path
    layout: str
    parts: dict[str, dict[str, Tensor]] = field(repr=False)
    layouts: dict[str, str]  # of each part: a VAE taken from elsewhere may have another one
    rest: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str]
    notes: tuple[str, ...]

    @property
    def shapes(self) -> detect.Shapes:
        return {name: tuple(tensor.shape) for part in self.parts.values() for name, tensor in part.items()}


@dataclass(frozen=True)
class Loaded:
    """A model, and how it came to be."""

    sd: StableDiffusion
    contents: Contents
    report: Report


class NoInit(TorchFunctionMode):
    """Modules made inside it do not fill their weights.

    On the meta device there is nothing to fill, and drawing an embedding's normals for nothing makes torch import its compiler: 2 s and 150 MB.
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
) -> StableDiffusion:
    """Load a Stable Diffusion: a .safetensors or .ckpt file in LDM names, a diffusers folder, or "tiny", which ships with minidiff.

    dtype: of the weights; "file" is the U-Net's in the file; None is float32 on the CPU and "file" elsewhere. A weight that has it already
        stays a window onto the file, everything else is converted tensor by tensor: nothing is in memory twice.
    ema: take the moving average of the U-Net's weights, which some .ckpt files hold beside the last ones.
    vae: a file or folder whose VAE is used instead of the model's.
    config: the numbers of a model that is of no known family and does not name them itself.
    prediction: what the U-Net predicts, if the file is wrong about it.

    The modules are in eval mode and need no gradient: most callers draw pictures, and a trainer says itself what it trains.
    Raises FileNotFoundError for what is not there, and ValueError, naming the likely cause, for everything that is not a whole model: a
    model is never loaded in part.
    """
    return load_with_report(path_or_name, dtype=dtype, device=device, ema=ema, vae=vae, config=config, prediction=prediction).sd


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
        contents = _take_averages(contents)
    if vae is not None:
        contents = _take_vae(contents, Path(vae))
    _check_parts(contents)
    config, undecided = _choose_config(contents, config, prediction)

    with torch.device("meta"), NoInit():
        parts = {"text_encoder": TextEncoder(config.text_encoder), "unet": UNet(config.unet), "vae": VAE(config.vae)}
    report, states = _match(contents, parts, config)
    dtype = _choose_dtype(dtype, device, contents)
    for name, part in parts.items():
        part.load_state_dict({ours: tensor.to(device, dtype) for ours, tensor in states[name].items()}, assign=True)
        part.eval().requires_grad_(False)

    tokenizer = Tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.text_encoder.vocab_size:
        raise ValueError(f"{contents.path}: the tokenizer knows {tokenizer.vocab_size} tokens, the text encoder {config.text_encoder.vocab_size}; "
                         "the two do not belong together")  # fmt: skip
    notes = contents.notes
    if undecided:
        config, note = _ask_prediction(config, parts["unet"], parts["text_encoder"], tokenizer)
        notes += (note,)
    everything = contents.rest | {name: tensor for part in contents.parts.values() for name, tensor in part.items()}
    carried = {name: everything[name] for name in report.carried}
    sd = StableDiffusion(config, parts["text_encoder"], parts["unet"], parts["vae"], tokenizer, carried, notes)
    return Loaded(sd, contents, report)


# ----------------------------------------------------------------------------------------------------------- opening


def find(path_or_name: str | Path) -> Path:
    """The path, or that of a checkpoint that ships with minidiff."""
    path = BUNDLED.get(str(path_or_name), Path(path_or_name))
    if path.exists():
        return path
    if str(path_or_name) in BUNDLED:
        raise FileNotFoundError(f"'{path_or_name}': this installation has no {path}; install minidiff again")
    raise FileNotFoundError(f"{path}: no such file or folder, and no name of a bundled model; those are {', '.join(BUNDLED)}")


def open_checkpoint(path: Path) -> Contents:
    """Read a file or a diffusers folder, and sort its tensors by part. Raises ValueError for what is no Stable Diffusion by its names."""
    if path.is_dir() and (path / "model_index.json").is_file():
        return _open_folder(path)
    checkpoint = read(path)
    what = detect.foreign(list(checkpoint.tensors))
    if what:
        raise ValueError(f"{path}: {what}")
    parts = {name: {} for name in PARTS}
    rest = {}
    for name, tensor in _respelled(checkpoint, dialects.LDM_SPELLINGS).items():
        part = next((part for prefix, part in LDM_PREFIXES.items() if name.startswith(prefix)), None)
        (rest if part is None else parts[part])[name] = tensor
    return Contents(path, "ldm", parts, dict.fromkeys(PARTS, "ldm"), rest, checkpoint.metadata, checkpoint.notes)


def _open_folder(path: Path) -> Contents:
    text_encoder, unet, vae = (read(path / name) for name in PARTS)
    parts = {
        "text_encoder": _respelled(text_encoder, dialects.TEXT_ENCODER_SPELLINGS),
        "unet": unet.tensors,
        "vae": _respelled(vae, dialects.VAE_SPELLINGS),
    }
    rest = read(path / CARRIED_FILE).tensors if (path / CARRIED_FILE).is_file() else {}
    notes = text_encoder.notes + unet.notes + vae.notes
    return Contents(path, "diffusers", parts, dict.fromkeys(PARTS, "diffusers"), rest, unet.metadata, notes)


def _respelled(checkpoint: Checkpoint, spellings: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    result = {dialects.respell(name, spellings): tensor for name, tensor in checkpoint.tensors.items()}
    if len(result) < len(checkpoint.tensors):
        raise ValueError(f"{checkpoint.path}: {len(checkpoint.tensors) - len(result)} weights occur twice, in two spellings of their names")
    return result


def _take_averages(contents: Contents) -> Contents:
    """The U-Net's weights replaced by their moving averages."""
    names = {name: dialects.ema_name(name) for name in contents.parts["unet"]}
    absent = [name for name, ema in names.items() if ema not in contents.rest]
    if absent:
        raise ValueError(f"{contents.path}: ema=True, but {len(absent)} of the {len(names)} U-Net weights have no moving average in this file, "
                         f"first {absent[0]}; load it with ema=False")  # fmt: skip
    averages = {name: contents.rest[ema] for name, ema in names.items()}
    rest = {name: tensor for name, tensor in contents.rest.items() if name not in set(names.values())}
    note = "took the moving average of the U-Net's weights; the last weights are left out"
    return replace(contents, parts=contents.parts | {"unet": averages}, rest=rest, notes=(*contents.notes, note))


def _take_vae(contents: Contents, path: Path) -> Contents:
    """The VAE replaced by the one of another file: a VAE alone, with the prefix of a whole model or without, in either layout; or a model's."""
    path = path / "vae" if (path / "model_index.json").is_file() else path
    tensors = _respelled(read(path), dialects.VAE_SPELLINGS)
    averages = {name: tensor for name, tensor in tensors.items() if name.startswith("model_ema.")}
    layout = "ldm"
    if any(name.startswith(dialects.VAE_PREFIX) for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(dialects.VAE_PREFIX)}
    elif "encoder.mid.block_1.norm1.weight" in tensors:
        tensors = {dialects.VAE_PREFIX + name: tensor for name, tensor in tensors.items() if name not in averages}
    elif "encoder.mid_block.resnets.0.norm1.weight" in tensors:
        layout = "diffusers"
    else:
        what = detect.foreign(list(tensors)) or f"no VAE by the names of its tensors; the first is {next(iter(tensors))}"
        raise ValueError(f"{path}: given as vae=, but it is {what}")
    return replace(
        contents,
        parts=contents.parts | {"vae": tensors},
        layouts=contents.layouts | {"vae": layout},
        rest=contents.rest | averages,
        notes=(*contents.notes, f"VAE taken from {path}; the model's own is left out"),
    )


def _check_parts(contents: Contents):
    absent = [name.replace("_", " ") for name, tensors in contents.parts.items() if not tensors]
    if len(absent) == len(PARTS):
        first = next(iter(contents.rest))
        raise ValueError(f"{contents.path}: no Stable Diffusion: no name is that of a text encoder, U-Net or VAE; the first is {first}")
    if absent:
        advice = "; give one as vae=FILE" if absent == ["vae"] else "; a part of a model, or one that was saved in part"
        raise ValueError(f"{contents.path}: no {' and no '.join(absent)} in this file{advice}")


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
    prediction = "eps" if correlation > detect.EPS_CORRELATION else "v"
    note = (
        f"predicts {prediction}: decided by a numerical test (at the highest noise its answer correlates {correlation:.2f} with its input; "
        "an eps-model is near 1, a v-model near 0); prediction= overrides it"
    )
    return _with_prediction(config, prediction), note


def _choose_dtype(dtype: torch.dtype | str | None, device: torch.device, contents: Contents) -> torch.dtype:
    if dtype == "file" or (dtype is None and device.type != "cpu"):
        own = next(tensor.dtype for tensor in contents.parts["unet"].values() if tensor.dtype.is_floating_point)
        return own if own.itemsize > 1 else torch.float16  # 8-bit floats are for storing only
    return dtype or torch.float32


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
        meta = part.state_dict()
        states[name] = {ours: dialects.from_file(contents.parts[name][place.name], place, meta[ours]) for ours, place in places[name].items()}
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
