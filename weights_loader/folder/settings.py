"""The settings in a diffusers folder: which are read, of what type they are, and what a missing one means to diffusers.

    READ        what reading.py makes a config of
    SAMPLING    how a scheduler walks back, which is chosen anew for every picture
    HARMLESS    what leaves the result as it is

All others have to be what the family says (families/shared.py), or absent, null, false or empty: a setting that nobody here knows may
change what the model computes.
"""

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from minidiff.files import parse_json

MOST_BYTES = 64_000_000  # of a JSON file; a whole vocabulary has 4 MB
LARGEST = 2**20  # of a whole number: no width, depth or vocabulary comes near it
NEEDED = object()  # in place of a default: the classes have one, which no Stable Diffusion uses


@dataclass(frozen=True)
class Kind:
    """A type of settings: in words, and whether a value is one."""

    words: str
    holds: Callable[[object], bool]


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 < value <= LARGEST


def _all(value: object, holds: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 64 and all(holds(one) for one in value)


WHOLE = Kind(f"a whole number from 1 to {LARGEST}", _is_whole)
WHOLES = Kind("a list of whole numbers", lambda value: _all(value, _is_whole))
WHOLE_OR_MORE = Kind("a whole number, or a list of them", lambda value: _is_whole(value) or _all(value, _is_whole))
MAYBE_WHOLE = Kind("a whole number, a list of them, or null", lambda value: value is None or WHOLE_OR_MORE.holds(value))
NUMBER = Kind("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value))  # type: ignore[arg-type]
FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of text", lambda value: _all(value, lambda one: isinstance(one, str)))
MAYBE_TEXTS = Kind("a list of text, or null", lambda value: value is None or TEXTS.holds(value))

READ: Mapping[str, Mapping[str, tuple[Kind, object]]] = {
    "unet": {
        "sample_size": (MAYBE_WHOLE, None),
        "in_channels": (WHOLE, 4),
        "out_channels": (WHOLE, 4),
        "down_block_types": (TEXTS, NEEDED),
        "up_block_types": (MAYBE_TEXTS, None),
        "block_out_channels": (WHOLES, NEEDED),
        "layers_per_block": (WHOLE, 2),
        "norm_num_groups": (WHOLE, 32),
        "cross_attention_dim": (WHOLE, NEEDED),
        "attention_head_dim": (WHOLE_OR_MORE, 8),
        "num_attention_heads": (MAYBE_WHOLE, None),
        "use_linear_projection": (FLAG, False),
        "transformer_layers_per_block": (WHOLE_OR_MORE, 1),
        "projection_class_embeddings_input_dim": (Kind("a whole number, or null", lambda value: value is None or _is_whole(value)), None),
    },
    "vae": {
        "block_out_channels": (WHOLES, NEEDED),
        "layers_per_block": (WHOLE, 1),
        "latent_channels": (WHOLE, 4),
        "norm_num_groups": (WHOLE, 32),
        "scaling_factor": (NUMBER, 0.18215),  # missing in folders from before it was a setting
    },
    "text_encoder": {
        "vocab_size": (WHOLE, 49408),
        "hidden_size": (WHOLE, NEEDED),
        "intermediate_size": (WHOLE, 2048),
        "num_hidden_layers": (WHOLE, NEEDED),
        "num_attention_heads": (WHOLE, NEEDED),
        "max_position_embeddings": (WHOLE, 77),
        "hidden_act": (TEXT, "quick_gelu"),
        "projection_dim": (WHOLE, 512),
        "eos_token_id": (Kind("a whole number", lambda value: value is None or type(value) is int), None),
    },
    "scheduler": {
        "_class_name": (TEXT, "PNDMScheduler"),
        "num_train_timesteps": (WHOLE, 1000),
        "beta_start": (NUMBER, NEEDED),  # these differ from class to class: SCHEDULERS
        "beta_end": (NUMBER, NEEDED),
        "beta_schedule": (TEXT, NEEDED),
        "timestep_spacing": (TEXT, NEEDED),
        "prediction_type": (Kind("text", lambda value: value is None or isinstance(value, str)), None),
        "rescale_betas_zero_snr": (FLAG, False),
    },
}

_LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_LATER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_LEADING, _LINSPACE = {"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"}
# diffusers' schedulers of Stable Diffusion's process, and what each takes for a missing setting.
SCHEDULERS: Mapping[str, Mapping[str, object]] = {
    **dict.fromkeys(("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM", "RePaint"), _LINEAR | _LEADING),
    **dict.fromkeys(("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "DEISMultistep", "SASolver"), _LINEAR | _LINSPACE),
    **dict.fromkeys(("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep", "UniPCMultistep"), _LINEAR | _LINSPACE),
    **dict.fromkeys(("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"), _LATER | _LINSPACE),
    **dict.fromkeys(("LCM", "TCD"), _LATENT | _LEADING),
}

SAMPLING = re.compile(
    "clip_sample|clip_sample_range|sample_max_value|set_alpha_to_one|steps_offset|skip_prk_steps|thresholding|dynamic_thresholding_ratio"
    "|variance_type|solver_order|solver_type|algorithm_type|lower_order_final|euler_at_final|use_(karras|exponential|beta|lu)_(sigmas|lambdas)"
    "|lambda_min_clipped|final_sigmas_type|interpolation_type|predict_x0|disable_corrector|solver_p|predictor_order|corrector_order|eta"
    "|original_inference_steps|timestep_scaling|sigma_min|sigma_max|flow_shift|noise_sampler_seed|time_shift_type|tau_func"
)
HARMLESS: Mapping[str, re.Pattern[str]] = {
    # upcast_attention: a matter of precision, and attention is computed in float32 here where that matters.
    "unet": re.compile("dropout|upcast_attention|addition_embed_type_num_heads"),
    "vae": re.compile("sample_size|force_upcast"),
    # What transformers writes into every config, and how a model was initialised and trained.
    "text_encoder": re.compile(
        "architectures|attention_dropout|dropout|initializer_(factor|range)|(bos|pad)_token_id|(torch_)?dtype"
        "|transformers_version|return_dict|id2label|label2id|max_length|min_length|num_beams|num_return_sequences|temperature|top_[kp]"
        "|typical_p|repetition_penalty|length_penalty|num_beam_groups|use_bfloat16|use_cache|tie_word_embeddings"
    ),
    "scheduler": SAMPLING,
}


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises FileNotFoundError or ValueError, naming the file."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, more than any such file has")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, and a diffusers folder needs it; interrupted download?") from None
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}); interrupted download?") from None
    values = parse_json(text, str(path), "; interrupted download?")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a JSON {type(values).__name__}; expected an object of settings")
    return values


def read_settings(path: Path, part: str, only: Mapping[str, object]) -> dict:
    """Read the settings of a part that a config is made of, missing ones as diffusers and transformers take them.

    Args:
        path: of the JSON file.
        part: "unet", "vae", "text_encoder" or "scheduler".
        only: of settings that are not read, the only value that is supported; in a list, each entry's.

    Raises ValueError, with the name, for a value of another type, and for a setting that is not supported.
    """
    values = read_json(path)
    read, defaults = READ[part], dict[str, object]()
    if part == "scheduler":
        name = values.get("_class_name", read["_class_name"][1])
        defaults = SCHEDULERS.get(str(name).removesuffix("Scheduler"))
        if defaults is None:
            raise ValueError(f"{path}: {reprlib.repr(name)} is no scheduler of Stable Diffusion's process, such as DDIMScheduler")
    result = {}
    for name, (kind, default) in read.items():
        value = values.get(name, defaults.get(name, default))
        if value is NEEDED:
            raise ValueError(f"{path}: no setting {name!r}, which has no default")
        if not kind.holds(value):
            raise ValueError(f"{path}: {name} is {reprlib.repr(value)}; expected {kind.words}")
        result[name] = value
    for name, value in {**only, **values, **result}.items():
        if name in only:
            given = value if isinstance(value, list) and value else [value]
            if any(one != only[name] or isinstance(one, bool) != isinstance(only[name], bool) for one in given):
                default = "" if name in values else " (diffusers' default)"
                raise ValueError(f"{path}: {name} is {reprlib.repr(value)}{default}, which is not supported; expected {only[name]!r}")
        elif name not in read and value and not name.startswith("_") and not HARMLESS[part].fullmatch(name):
            raise ValueError(f"{path}: {name} is {reprlib.repr(value)}, a setting that is not known here, so not supported")
    return result
