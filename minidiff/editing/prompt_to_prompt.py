"""Prompt-to-prompt: two prompts drawn from the same noise, and the second picture looks where the first one looks.

    "a lion on blue"   -- U-Net --> picture            M, the weights of its attention layers
                                      |  M, while the step is early
    "a tiger on blue"  -- U-Net --> edit               M' = M with its columns moved to the edit's tokens

    replace      word for word:          M'_j = sum over i of M_i mapper_ij
    refine       words are added:        M'_j = M_a(j), or the edit's own map where token j is new
    reweight     a word says more:       M'_j times a factor
    local blend  elsewhere the original: x' <- x + mask (x' - x), mask where either word is looked at

Paper: Hertz et al. 2022, "Prompt-to-prompt image editing with cross-attention control", section 3.2 and algorithm 1. Both rows share every
random number, so any sampler will do. Tokens are aligned by whole words: a word of n tokens that is replaced by one of m spreads the sum of
its n maps over the m, so that no attention is lost. (The authors' code moves single columns there and leaves a row of zeros.) Factors act
in every step, as in the paper; in the authors' code they end with the replacement. Weights are not scaled back to a sum of 1 after refine
and reweight, as there.

Left out: words that the local blend excludes, and intervals of steps that do not begin with the first.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite, log

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from minidiff.attention_maps import Layer, Weights, control_attention
from minidiff.config import check_choice
from minidiff.editing.start import Sampling
from minidiff.pipeline import Model, StableDiffusion
from minidiff.samplers import Step
from minidiff.tokenizer import Tokenizer

ALIGNMENTS = ("replace", "refine")
SELF_CELLS = 32**2  # self-attention over more cells is left alone, as in the authors' code
BLEND_CELLS = 16**2  # the local blend reads the maps nearest to this size: 16 x 16 for Stable Diffusion at 512 pixels
BLEND_AFTER = 0.2  # share of the steps without local blend: nothing can be told apart yet
BLEND_ABOVE = 0.3  # of the largest value of a word's map, where it counts as looked at


@dataclass(frozen=True)
class AttentionEdit:
    """How the edit follows the original; shares are of the steps, counted from the first one.

    cross: the share in which the edit's words are looked at where the original's are.
    words: the same for single words of the edit, in place of `cross`.
    self_attention: the share in which the edit's cells look at each other as the original's do.
    align: of ALIGNMENTS; None replaces where both prompts have as many words, and refines otherwise.
    reweight: factors for words of the edit, over all steps.
    local_blend: a word of the original and one of the edit; beyond what looks at them the original is kept.

    Raises ValueError for a share outside 0..1, another alignment, and a factor that is not finite.
    """

    cross: float = 0.8
    self_attention: float = 0.4
    words: Mapping[str, float] = field(default_factory=dict)
    align: str | None = None
    reweight: Mapping[str, float] = field(default_factory=dict)
    local_blend: tuple[str, str] | None = None

    def __post_init__(self):
        shares = {"cross": self.cross, "self_attention": self.self_attention, **self.words}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} {share} is outside 0..1; it is the share of the steps in which the edit follows the original")
        if self.align is not None:
            check_choice("align", self.align, ALIGNMENTS)
        for word, factor in self.reweight.items():
            if not isfinite(factor):
                raise ValueError(f"reweight {word!r} by {factor}: expected a finite number; 1 changes nothing, 0 takes the word away")


def prompt_to_prompt(
    sd: StableDiffusion,
    original: str,
    edited: str,
    edit: AttentionEdit = AttentionEdit(),
    *,
    seeds: Sequence[int] = (0,),
    sampling: Sampling = Sampling(),
    size: int | tuple[int, int] | None = None,
    x: Float[Tensor, "S C h w"] | None = None,
    model: Model | None = None,
) -> Generator[Step, Tensor | None, None]:
    """Denoise S originals and S edits side by side; yield and take what `StableDiffusion.denoise` does, of 2 S rows, originals first.

    The originals are those that the same batch gives without the edit, bit for bit; so are the edits, where the prompts are the same and
    no factor differs from 1.

    Args:
        sd: the model.
        original, edited: the prompts.
        edit: how the second follows the first.
        seeds: one per pair of pictures.
        sampling: steps, sampler and the like.
        size: of the pictures, as in `StableDiffusion.denoise`.
        x: the latents that both rows start from in place of the seeds' noise, as from `invert`.
        model: predicts in the U-Net's place, for 2 S rows, as in `StableDiffusion.denoise`.

    Raises ValueError, before the first step, for prompts that cannot be aligned, a word that is not in its prompt, and what the
    model cannot do.
    """
    scale = sd.config.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
    plan = make_plan(sd.tokenizer, original, edited, edit, pictures=len(seeds), steps=sampling.steps, guided=scale != 1)
    width, height = sd.pixel_size(size)
    cells = (sd.config.vae.latent_channels, height // sd.config.vae.factor, width // sd.config.vae.factor)
    prompts, start = [prompt for prompt in (original, edited) for _ in seeds], None if x is None else torch.cat([x, x])
    like = torch.empty(len(prompts), *cells) if start is None else start
    return _walk(sampling.denoise(sd, prompts, [*seeds, *seeds], like, x=start, model=model), sd, plan)


def _walk(trajectory: Generator[Step, Tensor | None, None], sd: StableDiffusion, plan: "Plan") -> Generator[Step, Tensor | None, None]:
    looked: dict[str, Tensor] = {}
    send = None
    for i in range(plan.steps):
        with ExitStack() as control:
            if plan.acts(i):
                control.enter_context(control_attention(sd.unet, partial(plan.change, i, looked)))
            step = trajectory.send(send)
        blended = None
        if plan.blend is not None and i >= BLEND_AFTER * plan.steps:
            blended = local_blend(step.x_t, *torch.stack(_nearest(looked)).mean(dim=0).chunk(2))
            step = replace(step, x_t=blended)
        sent = yield step
        send = blended if sent is None else sent


# --- words and their tokens -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """The rows of a prompt in the context: words with their positions, between the start token at 0 and the end token."""

    words: list[tuple[str, list[int]]]
    end: int
    length: int

    @property
    def parts(self) -> list[tuple[str, list[int]]]:
        """Return all words, with the start and the end token as words of their own."""
        return [("", [0]), *self.words, ("", [self.end])]


def split_prompt(tokenizer: Tokenizer, prompt: str) -> Tokens:
    """Split a prompt as the tokenizer does; what does not fit into the context is left out."""
    words = tokenizer.words(prompt)
    return Tokens(words, words[-1][1][-1] + 1 if words else 1, tokenizer.config.context_length)


def find_word(tokenizer: Tokenizer, prompt: str, word: str) -> list[int]:
    """Return the positions of a word, or of several in a row, wherever it stands in the prompt. Raises ValueError if it does not."""
    words, wanted = tokenizer.words(prompt), [one for one, _ in tokenizer.words(word)]
    count = len(wanted)
    at = [i for i in range(len(words) - count + 1) if wanted and [one for one, _ in words[i : i + count]] == wanted]
    if not at:
        raise ValueError(f"word {word!r} is not in the prompt {prompt!r}; its words are {', '.join(one for one, _ in words) or 'none'}")
    return sorted({position for i in at for _, positions in words[i : i + count] for position in positions})


def align_replace(original: Tokens, edited: Tokens) -> Float[Tensor, "L L"]:
    """Return the mapper [i, j] of word for word: the share of original token i that goes to edited token j; every row sums to 1.

    Words of as many tokens go token by token, others evenly. The end tokens go to each other, and the n-th padding to the n-th; those that
    find none go to the last one. Raises ValueError for other numbers of words.
    """
    if len(original.words) != len(edited.words):
        ours, theirs = (" ".join(word for word, _ in prompt.words) for prompt in (original, edited))
        raise ValueError(
            f"prompts of {len(original.words)} and {len(edited.words)} words cannot be replaced word for word, {ours!r} by {theirs!r}; "
            "refine them, or write as many words"
        )
    mapper = torch.zeros(original.length, edited.length, dtype=torch.float64)
    for (_, here), (_, there) in zip(original.parts, edited.parts):
        if len(here) == len(there):
            mapper[here, there] = 1
        else:
            mapper[torch.tensor(here)[:, None], torch.tensor(there)] = 1 / len(there)
    for position in range(original.end + 1, original.length):
        mapper[position, min(position - original.end + edited.end, edited.length - 1)] = 1
    return mapper


def align_refine(original: Tokens, edited: Tokens) -> tuple[Float[Tensor, "L L"], Bool[Tensor, " L"]]:
    """Return the mapper [i, j] of common words, and which edited tokens j have an original: the longest common subsequence of words.

    Raises ValueError for prompts without a common word.
    """
    pairs = common_words([word for word, _ in original.words], [word for word, _ in edited.words])
    if original.words and edited.words and not pairs:
        ours, theirs = (" ".join(word for word, _ in prompt.words) for prompt in (original, edited))
        raise ValueError(f"the prompts {ours!r} and {theirs!r} have no word in common, so the edit would be a picture of its own")
    mapper = torch.zeros(original.length, edited.length, dtype=torch.float64)
    for i, j in [(-1, -1), *pairs, (len(original.words), len(edited.words))]:  # with the start and the end token
        for here, there in zip(original.parts[i + 1][1], edited.parts[j + 1][1]):
            mapper[here, there] = 1
    for position in range(edited.end + 1, edited.length):
        if position - edited.end + original.end < original.length:
            mapper[position - edited.end + original.end, position] = 1
    return mapper, mapper.sum(dim=0) > 0


def common_words(original: Sequence[str], edited: Sequence[str]) -> list[tuple[int, int]]:
    """Return the places (i, j) of the longest common subsequence: Needleman and Wunsch 1970 with gaps at 0 and matches at 1."""
    n, m = len(original), len(edited)
    best = [[0] * (m + 1) for _ in range(n + 1)]  # of what follows i and j
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            best[i][j] = best[i + 1][j + 1] + 1 if original[i] == edited[j] else max(best[i + 1][j], best[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < n and j < m:
        if original[i] == edited[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


# --- what is done at each step ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """An edit in numbers: pictures S, steps, and what each step does.

    rows: of the U-Net's batch behind the first cross-attention: 2 S, or 4 S under guidance.
    mapper: original token i to edited token j. follows: by token j, the number of steps in which it takes the original's map.
    self_steps: the same for self-attention. factors: by token j.
    blend: the positions of the original's word and of the edit's.
    same: the edit changes nothing.
    """

    pictures: int
    steps: int
    rows: int
    mapper: Float[Tensor, "L L"]
    follows: Float[Tensor, " L"]
    self_steps: int
    factors: Float[Tensor, " L"]
    blend: tuple[list[int], list[int]] | None
    same: bool

    def acts(self, i: int) -> bool:
        """Return whether step i looks at the attention."""
        follows = i < self.self_steps or bool((self.follows > i).any())
        return not self.same and (follows or self.blend is not None or bool((self.factors != 1).any()))

    def change(self, i: int, looked: dict[str, Tensor], layer: Layer, weights: Weights) -> Float[Tensor, "S h N L"] | None:
        """Return the edits' weights of a layer at step i, None for their own; add what the local blend needs to `looked`.

        Args:
            i: the step.
            looked: the maps of the blend's words by layer, (2 S, H, W), summed over the calls so far.
            layer, weights: as `control_attention` gives them.
        """
        if layer.rows < self.rows:
            return None  # guidance's halves are still one, and the edit is one of the prompt's half alone
        both = slice(layer.rows - 2 * self.pictures, layer.rows)
        if layer.kind == "self":
            acts = i < self.self_steps and layer.size[0] * layer.size[1] <= SELF_CELLS
            return weights(slice(both.start, both.start + self.pictures)) if acts else None
        own = weights(both)
        changed = self.edit_maps(i, own)
        if self.blend is not None:
            maps = word_maps(own if changed is None else torch.cat([own[: self.pictures], changed]), self.blend, layer.size)
            looked[layer.name] = looked[layer.name] + maps if layer.name in looked else maps
        return changed

    def edit_maps(self, i: int, both: Float[Tensor, "R h N K"]) -> Float[Tensor, "S h N K"] | None:
        """Return the edits' cross-attention at step i, of the originals' and the edits' own; None where that is their own.

        Keys beyond the context's, as of prefix tuning, keep their own weights.
        """
        follows = self.follows > i
        if not (follows.any() or (self.factors != 1).any()):
            return None
        original, own = both[..., : len(follows)].chunk(2)
        # Two moves: there is no float64 on Apple's GPU.
        mapper, factors = (numbers.to(both.dtype).to(both.device) for numbers in (self.mapper, self.factors))
        moved, follows = original @ mapper, follows.to(both.device)
        return torch.cat([torch.where(follows, moved, own) * factors, both[self.pictures :, ..., len(follows) :]], dim=-1)


def make_plan(tokenizer: Tokenizer, original: str, edited: str, edit: AttentionEdit, *, pictures: int, steps: int, guided: bool) -> Plan:
    """Align the prompts and count the steps.

    Args:
        tokenizer: of the model.
        original, edited: the prompts.
        edit: what is asked for.
        pictures: pairs of them.
        steps: of the loop.
        guided: whether each prompt's rows follow as many without.

    Raises ValueError as `prompt_to_prompt` does.
    """
    here, there = split_prompt(tokenizer, original), split_prompt(tokenizer, edited)
    align = edit.align or ("replace" if len(here.words) == len(there.words) else "refine")
    if align == "replace":
        mapper, mapped = align_replace(here, there), torch.ones(there.length, dtype=torch.bool)
    else:
        mapper, mapped = align_refine(here, there)
    follows, factors = torch.full((there.length,), float(round(edit.cross * steps))), torch.ones(there.length, dtype=torch.float64)
    for word, share in edit.words.items():
        follows[find_word(tokenizer, edited, word)] = float(round(share * steps))
    for word, factor in edit.reweight.items():
        factors[find_word(tokenizer, edited, word)] = factor
    blend = edit.local_blend and (find_word(tokenizer, original, edit.local_blend[0]), find_word(tokenizer, edited, edit.local_blend[1]))
    same = original == edited and bool((factors == 1).all())
    return Plan(
        pictures=pictures,
        steps=steps,
        rows=(4 if guided else 2) * pictures,
        mapper=mapper,
        follows=follows * mapped,
        self_steps=round(edit.self_attention * steps),
        factors=factors,
        blend=None if same else blend,
        same=same,
    )


# --- local blend ------------------------------------------------------------------------------------------------------


def word_maps(weights: Float[Tensor, "R h N K"], positions: tuple[list[int], list[int]], size: tuple[int, int]) -> Float[Tensor, "R H W"]:
    """Return the maps of two words: the first word's of the first half of the rows, the second's of the second half.

    A map is the mean over the heads and the sum over the word's tokens. size: (H, W) of the layer.
    """
    maps = [half[..., where].mean(dim=1).sum(dim=-1) for half, where in zip(weights.chunk(2), positions)]
    return rearrange(torch.cat(maps), "R (H W) -> R H W", H=size[0])


def _nearest(looked: Mapping[str, Tensor]) -> list[Float[Tensor, "R H W"]]:
    """Return the maps of the layers whose number of cells is nearest to BLEND_CELLS, without the middle's, which are coarse and few."""
    maps = {name: m for name, m in looked.items() if not name.startswith("middle")} or looked
    size = min((m.shape[1:] for m in maps.values()), key=lambda size: abs(log(size[0] * size[1] / BLEND_CELLS)))
    return [m for m in maps.values() if m.shape[1:] == size]


def local_blend(
    x_t: Float[Tensor, "R C h w"], original: Float[Tensor, "S H W"], edited: Float[Tensor, "S H W"]
) -> Float[Tensor, "R C h w"]:
    """Keep the originals' latents in the edits but where either word's map, widened by a cell, exceeds BLEND_ABOVE of its largest value."""
    masks = []
    for looked in (original, edited):
        wide = F.max_pool2d(looked[:, None].to(x_t), 3, stride=1, padding=1)
        wide = F.interpolate(wide, x_t.shape[2:], mode="nearest")
        masks.append(wide > BLEND_ABOVE * wide.amax(dim=(1, 2, 3), keepdim=True))
    kept, free = x_t.chunk(2)
    return torch.cat([kept, torch.where(masks[0] | masks[1], free, kept)])
