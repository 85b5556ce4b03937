"""The account of a file: every tensor is used, converted, carried, or ignored for a stated reason; otherwise there is one error.

A loader that skips what it does not know gives a model that draws noise, and no hint why. So names and shapes are compared with what
the model needs before a single weight is taken over.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from difflib import get_close_matches

from torch import Tensor

from weights_loader.dialects import Part, Place, file_shapes, table

# (pattern of a name, why nothing is lost without it)
IGNORED = (
    (
        r"^(betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod|sqrt_recipm?1?_alphas_cumprod"
        r"|posterior_(variance|log_variance_clipped|mean_coef[12])|logvar|lvlb_weights|denoiser\.sigmas)$",
        "tables of the noise schedule, which is computed anew",
    ),
    (r"embeddings\.position_ids$|^cond_stage_model\.model\.attn_mask$", "the numbers 0, 1, 2, ... or the causal mask, made anew"),
    (r"^model_ema\.(decay|num_updates)$", "counters of the training"),
    (r"^model_ema\.", "moving average of the U-Net's weights; ask for it with ema=True (--ema)"),
    (r"^(first_stage_model\.)?loss\.", "the loss that the VAE was trained with"),
)

# Not computed with, but part of the public models: kept, and written back when the model is saved. The block is OpenCLIP's last one,
# which Stable Diffusion 2.x does not run; {layers} is the number of those that it runs.
CARRIED = (
    r"^cond_stage_model\.(model\.|transformer\.)?(text_model\.)?(text_projection(\.weight)?|logit_scale)$"
    r"|^cond_stage_model\.model\.transformer\.resblocks\.{layers}\."
)


@dataclass
class Report:
    """What becomes of each tensor of a file, by its name; for ignored ones with the reason. Grows part by part.

    text_layers: how many blocks of the text encoder are run, of which a file may hold one more.
    """

    text_layers: int
    used: list[str] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: dict[str, str] = field(default_factory=dict)

    def add_part(self, part: Part, layout: str, tensors: dict[str, Tensor]) -> dict[str, Place]:
        """Compare a part with the tensors that are its own. Gives back the places of its parameters."""
        places = table(part, layout)
        parameters = part.state_dict()
        ours = {place.name: (parameters[name], place) for name, place in places.items()}
        for name, expected in file_shapes(part, layout).items():
            parameter, place = ours[name]
            matrix = parameter.dim() == 2 and place.third is None
            if name not in tensors:
                self.missing.append(name)
                continue
            shape = tuple(tensors[name].shape)
            if shape != expected and not (matrix and _without_kernel(shape) == _without_kernel(expected)):
                self.wrong_shape[name] = f"is {shape}, should be {expected}"
            elif place.third is not None:
                self.converted[name] = "stacked query, key and value, taken apart"
            elif matrix and len(shape) == 4:
                self.converted[name] = "1x1 convolution, taken as a matrix"
            else:
                self.used.append(name)
        self.add_rest([name for name in tensors if name not in ours])
        return places

    def add_rest(self, names: list[str]):
        """Tensors that no part computes with."""
        carried = CARRIED.format(layers=self.text_layers)
        for name in names:
            reason = next((reason for pattern, reason in IGNORED if re.search(pattern, name)), None)
            if reason:
                self.ignored[name] = reason
            elif re.search(carried, name):
                self.carried.append(name)
            else:
                self.unexpected.append(name)

    def problem(self) -> str | None:
        """What keeps the file from being loaded: the counts, and of each kind the first names with the nearest known ones."""
        if not (self.missing or self.unexpected or self.wrong_shape):
            return None
        lines = [f"{len(self.missing)} keys missing, {len(self.unexpected)} unexpected, {len(self.wrong_shape)} of the wrong shape"]
        lines += some([f"missing {name}{nearest(name, self.unexpected)}" for name in self.missing[:SHOWN]], len(self.missing))
        known = self.missing or self.used
        lines += some([f"unexpected {name}{nearest(name, known)}" for name in self.unexpected[:SHOWN]], len(self.unexpected))
        lines += some([f"{name} {what}" for name, what in list(self.wrong_shape.items())[:SHOWN]], len(self.wrong_shape))
        return "\n".join(lines)

    def reasons(self) -> dict[str, int]:
        """How many tensors are ignored, by reason."""
        return dict(Counter(self.ignored.values()))


SHOWN = 4  # names of each kind in an error


def _without_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution's shape as a matrix's: they are the same map, and files have either."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def some(lines: list[str], count: int) -> list[str]:
    """The first lines of a list of `count`, indented, and how many more there are."""
    shown = lines[:SHOWN]
    return [f"  {line}" for line in shown] + ([f"  ... and {count - len(shown)} more"] if count > len(shown) else [])


def nearest(name: str, others: list[str]) -> str:
    """The most similar of the other names, in brackets; nothing if none is similar."""
    near = get_close_matches(name, others, n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""
