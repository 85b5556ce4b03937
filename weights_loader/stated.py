"""Read what files say of their U-Net, in every spelling in use: does it predict eps or v, and does its schedule end in pure noise?

    metadata         modelspec.prediction_type = v, ss_v_parameterization = True, ...
    marker tensors   v_pred, ztsnr
    a .yaml          parameterization: "v"; also numbers of the noise schedule, and the factor of the latents

prediction.py decides from these statements.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from weights_loader.brief import MOST

Prediction = Literal["eps", "v"]
WAY_OUT = "prediction= (--prediction) decides"

# Metadata of a safetensors file, by key: what each value means. Unknown values are errors, except for the architecture, which says more.
_NAMES: Mapping[str, Prediction] = {
    **dict.fromkeys(("eps", "epsilon"), "eps"),
    **dict.fromkeys(("v", "v_prediction", "v_pred", "vpred", "velocity"), "v"),
}
_FLAG: Mapping[str, Prediction] = {"true": "v", "1": "v", "yes": "v", "false": "eps", "0": "eps", "no": "eps"}
_PREDICTION_KEYS: Mapping[str, Mapping[str, Prediction]] = {
    "modelspec.prediction_type": _NAMES,  # Stability AI's ModelSpec: kohya's scripts and others
    "modelspec.predict_key": _NAMES,  # ComfyUI
    "prediction_type": _NAMES,
    "ss_v_parameterization": _FLAG,  # kohya's scripts
    "v_parameterization": _FLAG,
    "v_pred": _FLAG,
}
_ARCHITECTURES: Mapping[str, Prediction] = {"stable-diffusion-v2-768-v": "v", "stable-diffusion-v2-512": "eps"}
_ZERO_SNR_KEYS = ("ss_zero_terminal_snr", "zero_terminal_snr", "rescale_betas_zero_snr", "ztsnr", "zsnr")
# Tensors without content, which ComfyUI and others write and look for.
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
MARKERS = rf"^({V_MARKER}|{ZERO_SNR_MARKER}|edm_vpred\.sigma_(min|max))$"
# Files with one of these are told another time: 0.25 ln sigma, and noise levels of their own.
_EDM = re.compile(r"edm_(vpred\.sigma_(min|max)|mean|std)")


@dataclass(frozen=True)
class Statement:
    """What one place in a file says of its U-Net; None is what it leaves open. A prediction may be one that is not supported."""

    where: str
    prediction: str | None = None
    zero_terminal_snr: bool | None = None


def statements(names: Collection[str], metadata: Mapping[str, str], yaml: str = "") -> tuple[Statement, ...]:
    """Return all that a file says about its prediction.

    Args:
        names: of its tensors.
        metadata: of the safetensors file.
        yaml: the text of the original's config file of the same name, which the web interfaces read; "" without one.
    """
    found = []
    for key, meanings in _PREDICTION_KEYS.items():
        if value := _plain(metadata.get(key, "")):
            found.append(Statement(f"metadata {key} = {metadata[key][:MOST]}", meanings.get(value, value)))
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    if architecture in _ARCHITECTURES:
        found.append(Statement(f"metadata modelspec.architecture = {architecture}", _ARCHITECTURES[architecture]))
    for key in _ZERO_SNR_KEYS:
        if (value := _plain(metadata.get(key, ""))) in _FLAG:
            found.append(Statement(f"metadata {key} = {metadata[key][:MOST]}", zero_terminal_snr=_FLAG[value] == "v"))
    if V_MARKER in names:
        found.append(Statement(f"tensor {V_MARKER}", "v"))
    if ZERO_SNR_MARKER in names:
        found.append(Statement(f"tensor {ZERO_SNR_MARKER}", zero_terminal_snr=True))
    if stated := re.search(r"^\s*parameterization:\s*[\"']?(\w+)", yaml, re.MULTILINE):
        value = _plain(stated[1])
        found.append(Statement(f"parameterization: {stated[1][:MOST]} in the .yaml of its name", _NAMES.get(value, value)))
    return tuple(found)


YAML_NUMBERS = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "timesteps", "scale_factor": "scaling_factor"}


def yaml_numbers(yaml: str) -> dict[str, float]:
    """Return what a .yaml says of the noise schedule and the factor of the latents, by the names of ScheduleConfig and VAEConfig.

    The first line of each name counts: an upscaler's second schedule comes after it. Raises ValueError for what is no number.
    """
    found = {}
    for theirs, ours in YAML_NUMBERS.items():
        if stated := re.search(rf"^[ \t]*{theirs}:[ \t]*[\"']?([^\s#\"']+)", yaml, re.MULTILINE):
            try:
                found[ours] = float(stated[1])
            except ValueError:
                found[ours] = math.nan
            if not math.isfinite(found[ours]):
                raise ValueError(f"{theirs}: {stated[1][:MOST]} in the .yaml of its name: expected a number; mend or rename that file")
    return found


def _plain(value: str) -> str:
    value = value.strip().lower().replace("-", "_")
    return "" if value in ("none", "null") else value


def refuse_edm(names: Collection[str]) -> None:
    """Raise ValueError for a model of continuous noise levels, by its marker tensors."""
    if marker := next((name for name in names if _EDM.fullmatch(name)), None):
        like = "CosXL" if marker.startswith("edm_vpred") else "Playground 2.5"
        raise ValueError(
            f"a model of continuous noise levels (by the tensor {marker}), such as {like}: its U-Net is told 0.25 ln sigma in place of a "
            "timestep, not supported; prediction=v (--prediction v) reads it as a model of timesteps all the same"
        )
