"""Models with numbers of their own: the bundled one, and whatever else was trained with minidiff or is loaded with config=.

Their files state the config in the metadata (metadata.py). Names and all else are those of the public family with the same text
encoder; minidiff writes no other.
"""

from dataclasses import replace

from weights_loader.families.stable_diffusion_1 import STABLE_DIFFUSION_1
from weights_loader.families.stable_diffusion_2 import STABLE_DIFFUSION_2
from weights_loader.families.stable_diffusion_xl import STABLE_DIFFUSION_XL

NAME = "a Stable Diffusion of its own size"

OWN_SIZE_CLIP = replace(STABLE_DIFFUSION_1, name=NAME, marker=None, any_size=True, variants={})
OWN_SIZE_OPEN_CLIP = replace(STABLE_DIFFUSION_2, name=NAME, marker=None, any_size=True, variants={}, image_sizes={})
OWN_SIZE_XL = replace(STABLE_DIFFUSION_XL, name=NAME, marker=None, any_size=True)
