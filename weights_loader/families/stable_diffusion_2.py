"""Stable Diffusion 2.0 and 2.1, and its inpainting models: OpenCLIP ViT-H's text encoder, and the U-Net of 1.x with other heads.

The models for 768 pixels predict v, those for 512 pixels eps, and no file says which.
"""

from dataclasses import replace

from minidiff.config import SD2
from weights_loader.dialects import text_open_clip
from weights_loader.families import shared
from weights_loader.families.stable_diffusion_1 import STABLE_DIFFUSION_1
from weights_loader.name_table import PartNames

OPEN_CLIP_PREFIX = shared.TEXT_ROOT + "model."
# SD-Turbo, a 2.1 for 1 to 4 steps, was saved by the code of SDXL.
TURBO_ALIASES = ((r"^conditioner\.embedders\.0\.model\.", OPEN_CLIP_PREFIX),)

STABLE_DIFFUSION_2 = replace(
    STABLE_DIFFUSION_1,
    name="Stable Diffusion 2.x",
    config=SD2,
    names={
        "ldm": {
            "text_encoder": PartNames(text_open_clip, OPEN_CLIP_PREFIX, root=shared.TEXT_ROOT, aliases=TURBO_ALIASES),
            "unet": shared.UNET_LDM,
            "vae": shared.VAE_LDM,
        },
        "diffusers": shared.DIFFUSERS,
    },
    marker=r"^(cond_stage_model|conditioner\.embedders\.0)\.model\.token_embedding\.weight$",
    image_sizes={"eps": 512, "v": 768},
    unused_text_layers=1,
)
