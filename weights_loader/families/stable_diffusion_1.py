"""Stable Diffusion 1.1 to 1.5, and its inpainting models: CLIP ViT-L/14's text encoder, 860 M parameters in the U-Net.

The public models predict eps, models that others trained from them eps or v.
"""

from minidiff.config import SD1
from weights_loader.dialects import CLIP_LDM_ALIASES, text_clip
from weights_loader.families import shared
from weights_loader.families.base import Family
from weights_loader.name_table import PartNames

CLIP_PREFIX = shared.TEXT_ROOT + "transformer.text_model."

STABLE_DIFFUSION_1 = Family(
    name="Stable Diffusion 1.x",
    config=SD1,
    names={
        "ldm": {
            "text_encoder": PartNames(text_clip, CLIP_PREFIX, root=shared.TEXT_ROOT, aliases=CLIP_LDM_ALIASES),
            "unet": shared.UNET_LDM,
            "vae": shared.VAE_LDM,
        },
        "diffusers": shared.DIFFUSERS,
    },
    marker=r"^cond_stage_model\.(transformer\.)?(text_model\.)?embeddings\.token_embedding\.weight$",
    variants=shared.VARIANTS,
    other_variants=shared.OTHER_VARIANTS,
    ignored=shared.IGNORED,
    extra=shared.EXTRA,
    refused=shared.REFUSED,
    parts_alone=shared.PARTS_ALONE,
    pipelines=shared.PIPELINES,
    settings=shared.SETTINGS,
)
