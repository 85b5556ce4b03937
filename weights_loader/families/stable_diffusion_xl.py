"""Stable Diffusion XL base, its fine-tunes, and SDXL-Turbo: CLIP ViT-L/14 and OpenCLIP ViT-bigG, 2.6 billion parameters in the U-Net.

Files of fine-tunes that predict v say so by an empty tensor named v_pred, with ztsnr beside it for zero terminal SNR. Nothing in a file
tells Turbo, Lightning and their merges from the base: give the steps, the spacing and the guidance scale yourself.
"""

from dataclasses import replace

from minidiff.config import SDXL
from weights_loader.dialects import CLIP_LDM_ALIASES, TEXT_DIFFUSERS_ALIASES, text_clip, text_clip_projection, text_open_clip
from weights_loader.families import shared
from weights_loader.families.stable_diffusion_1 import STABLE_DIFFUSION_1
from weights_loader.name_table import PartNames
from weights_loader.stated import MARKERS

FIRST, SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."
OF_THE_CONFIG = ("transformer_layers_per_block", "projection_class_embeddings_input_dim")
ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}

STABLE_DIFFUSION_XL = replace(
    STABLE_DIFFUSION_1,
    name="Stable Diffusion XL",
    config=SDXL,
    names={
        "ldm": {
            "text_encoder": PartNames(
                text_clip,
                FIRST + "transformer.text_model.",
                root=FIRST,
                aliases=tuple(
                    (pattern.replace(r"cond_stage_model\.", r"conditioner\.embedders\.0\."), name.replace(shared.TEXT_ROOT, FIRST))
                    for pattern, name in CLIP_LDM_ALIASES
                ),
            ),
            "text_encoder_2": PartNames(text_open_clip, SECOND + "model.", root=SECOND),
            "unet": shared.UNET_LDM,
            "vae": shared.VAE_LDM,
        },
        "diffusers": {
            "text_encoder": shared.DIFFUSERS["text_encoder"],
            "text_encoder_2": PartNames(text_clip_projection, aliases=TEXT_DIFFUSERS_ALIASES),
            "unet": shared.DIFFUSERS["unet"],
            "vae": shared.DIFFUSERS["vae"],
        },
    },
    marker=r"^conditioner\.embedders\.(0\.transformer\.|1\.model\.)",
    other_variants={8: "InstructPix2Pix"},
    extra=(r"^conditioner\.embedders\.1\.model\.logit_scale$", MARKERS),
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusionXLImg2ImgPipeline"),
    settings={
        **{part: shared.SETTINGS[part] for part in ("vae", "text_encoder", "scheduler")},
        "text_encoder_2": shared.SETTINGS["text_encoder"],
        "unet": {key: value for key, value in shared.SETTINGS["unet"].items() if key not in OF_THE_CONFIG} | ADDED,
    },
    kohya_layout="ldm",
    distilled="a distilled Stable Diffusion XL, such as SSD-1B or Segmind Vega",
    only=r"(^|\.)(label_emb\.0\.|add_embedding\.linear_)|^lora_te2_|^text_encoder_2\.|transformer_blocks[._][1-9]",
)
