"""Tell by the names of its tensors what a file is that is not a whole model: a small file that changes one, another model, or a part.

What a family's own files look like, and what it refuses, is in families/; here are the files that belong to no family.
"""

import re

from weights_loader.families import family_of_names

# Small files that change a model: (kind, pattern of a tensor's name, what a file with such a name is). Names like these may stray into a
# model's file too, so they count only where there is no U-Net.
CHANGES = (
    (
        "lora",
        r"lora_(unet|te|down|up|mid|magnitude|embedding)|[._]lora(_linear_layer)?\.|\.lora_[ABE](\.|$)|\.hada_|\.lokr_|\.b?oft_|^oft_"
        r"|^(unet|text_encoder):\d+:|^lycoris_|^bundle_emb\.|\.(ia3_l|on_input|diff(_b)?|[wb]_norm|[ab][12]\.weight)$|vera_lambda|fourierft_",
        "a LoRA: changes to a model, not a model itself; give it as lora=FILE (--lora) beside one",
    ),
    (
        "custom_diffusion",
        r"custom_diffusion|^modifier_token",
        "a Custom Diffusion file: changes to a model, not a model; give it as custom_diffusion=FILE (--custom-diffusion) beside one",
    ),
    (
        "embedding",
        r"^string_to_param|^emb_params$|^clip_[lg]$|^<[^<>]+>$",
        "a Textual Inversion embedding: a learned word, not a model; give it as embeddings=FILE (--embedding) beside one",
    ),
)
WHAT = {kind: what for kind, _, what in CHANGES}
CROSS_ATTENTION = r"attn2\.|^modifier_token\.|^embed$"  # of a Custom Diffusion file in a whole model's names
# Tensors that every U-Net has, in either layout.
UNET_ITSELF = r"(^|\.)(input_blocks\.0\.0|time_embed\.0|conv_in|time_embedding\.linear_1)\.weight$"

FEW = 3  # tensors; any part of a model has more


def kind(names: list[str]) -> str | None:
    """Return which change to a model a file is: "lora", "embedding", "custom_diffusion", or None if it is none of them."""
    if any(re.search(UNET_ITSELF, name) for name in names):
        return None
    found = next((kind for kind, pattern, _ in CHANGES if any(re.search(pattern, name) for name in names)), None)
    if found is None and all(re.search(CROSS_ATTENTION, name) for name in names):
        return "custom_diffusion"
    return found


def foreign(names: list[str]) -> str | None:
    """Return what a file is, if its names show that it is not a whole model in LDM names."""
    if change := kind(names):
        return WHAT[change]
    family = family_of_names(names)
    refused = next((what for pattern, what in family.refused if any(re.search(pattern, name) for name in names)), None)
    if refused is None and len(names) <= FEW:
        return f"a file of {len(names)} tensors, the first '{names[0]}': perhaps an embedding, not a model"
    if refused is None and not any(family.part_of(name) == "unet" for name in names):
        return next((what for pattern, what in family.parts_alone if any(re.search(pattern, name) for name in names)), None)
    return refused


def describe(names: list[str]) -> str:
    """Say what a file is, to a user who gave it as something else."""
    family = family_of_names(names)
    if any(family.part_of(name) == "unet" for name in names) and foreign(names) is None:
        return "a whole model; give it as the model (--model)"
    return foreign(names) or f"of no known kind; its first tensor is '{names[0]}'"
