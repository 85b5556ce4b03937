"""Answers of lesson 10."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from lessons.common import picture_grid
from lessons.exercises import Exercise, difference
from minidiff.attention_maps import word_map
from minidiff.guidance import guided as library_guided

# ------------------------------------------------------------------------------------------------------ map_of_word


def map_of_word(maps, positions, side):
    layers = [m[..., positions].sum(dim=-1) for m in maps]
    enlarged = [F.interpolate(layer[None, None], size=(side, side), mode="bilinear")[0, 0] for layer in layers]
    return torch.stack(enlarged).mean(dim=0)


def library_map_of_word(maps, positions, side):
    return word_map({str(i): m[None] for i, m in enumerate(maps)}, positions, (side, side))[0]


def _weights(side, seed):
    """Attention weights [side, side, 6] of a layer; those of tokens 2 and 3 are large in the upper left."""
    scores = torch.randn(side, side, 6, generator=torch.Generator().manual_seed(seed))
    scores[: side // 2, : side // 2, 2:4] += 3
    return scores.softmax(dim=-1)


def check_map_of_word(function) -> str | None:
    """Of layers of three sizes, for a word of two tokens, which do not stand where they would be without the start token."""
    maps = [_weights(side, seed=side) for side in (8, 4, 2)]
    mistakes = {
        "takes the mean over the word's tokens: a cell's share for the word is the sum over them": averaged_tokens,
        "takes the word's first token alone: add up all of them": first_token,
        "adds up the layers: the map is their mean": summed_layers,
        "uses the first layer alone: enlarge each layer and take the mean of all": one_layer,
        "enlarges without interpolating between cells: mode is 'bilinear'": nearest_cells,
        "counts the positions from the first word: they already count from the start token, 0": off_by_one,
        "sums over all tokens, which is 1 everywhere: pick the word's with m[..., positions]": all_tokens,
        "turns height and width round: a map keeps the order of the axes, H and W": transposed,
    }
    arguments = (maps, [2, 3], 8)
    return difference(function(*arguments), map_of_word(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def _enlarged(layers, side, mode="bilinear"):
    return torch.stack([F.interpolate(layer[None, None], size=(side, side), mode=mode)[0, 0] for layer in layers])


def averaged_tokens(maps, positions, side):
    return map_of_word(maps, positions, side) / len(positions)


def first_token(maps, positions, side):
    return map_of_word(maps, positions[:1], side)


def summed_layers(maps, positions, side):
    return len(maps) * map_of_word(maps, positions, side)


def one_layer(maps, positions, side):
    return map_of_word(maps[:1], positions, side)


def nearest_cells(maps, positions, side):
    return _enlarged([m[..., positions].sum(dim=-1) for m in maps], side, "nearest").mean(dim=0)


def off_by_one(maps, positions, side):
    return map_of_word(maps, [position + 1 for position in positions], side)


def all_tokens(maps, positions, side):
    return _enlarged([m.sum(dim=-1) for m in maps], side).mean(dim=0)


def transposed(maps, positions, side):
    return map_of_word(maps, positions, side).T


def not_stacked(maps, positions, side):
    return [F.interpolate(m[..., positions].sum(dim=-1)[None, None], size=(side, side), mode="bilinear")[0, 0] for m in maps]


def not_enlarged(maps, positions, side):
    return sum(m[..., positions].sum(dim=-1) for m in maps) / len(maps)


def number_map_of_word(function) -> str:
    word = function([_weights(side, seed=side) for side in (8, 4, 2)], [2, 3], 8)
    return (
        f"cells that were made to look at the word give it {word[:3, :3].mean():.0%} of their attention, the others {word[4:].mean():.0%}"
    )


def picture_map_of_word(function) -> Figure:
    layers = [_weights(side, seed=side) for side in (16, 8, 4)]
    each = [function([layer], [2, 3], 16) for layer in layers]
    return picture_grid([[*each, function(layers, [2, 3], 16)]], ["16 x 16", "8 x 8", "4 x 4", "mean"])


# ------------------------------------------------------------------------------------------------------ guided_prediction


def guided_prediction(model, x_t, t, cond, uncond, guidance_scale):
    both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([uncond, cond]))
    without, with_prompt = both.chunk(2)
    return without + guidance_scale * (with_prompt - without)


def library_guided_prediction(model, x_t, t, cond, uncond, guidance_scale):
    return library_guided(model, cond, uncond, guidance_scale)(x_t, t)


def check_guided_prediction(function) -> str | None:
    """On two pictures with different timesteps and contexts, by a model whose prediction depends on all three."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 3, 3, generator=generator)
    cond, uncond = (torch.randn(2, 5, 6, generator=generator) for _ in range(2))
    t = torch.tensor([100, 700])

    def model(x_t, t, context):
        factor = context.mean(dim=(1, 2)) + t / 1000
        return x_t * factor[:, None, None, None]

    arguments = (model, x_t, t, cond, uncond, 3.0)
    mistakes = {
        "swaps the two halves: what is cut off first belongs to the context that was put first": swapped,
        "guides three of the four channels and leaves the last as it was: index no channels at all": three_channels,
        "adds scale times the difference to the prediction with the prompt, so that 1 guides already: start from the one without it": from_cond,
        "gives the prediction with the prompt alone, without guidance": with_prompt_only,
        "subtracts in the wrong order, so that it moves away from the prompt: the difference is cond - uncond": reversed_difference,
        "returns the scaled difference alone: add it to the prediction without the prompt": difference_alone,
        "multiplies the prediction with the prompt by the scale instead of the difference": cond_scaled,
    }
    return difference(
        function(*arguments), guided_prediction(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()}
    )


def _two(model, x_t, t, cond, uncond):
    return model(x_t, t, uncond), model(x_t, t, cond)


def swapped(model, x_t, t, cond, uncond, guidance_scale):
    with_prompt, without = _two(model, x_t, t, cond, uncond)
    return without + guidance_scale * (with_prompt - without)


def three_channels(model, x_t, t, cond, uncond, guidance_scale):
    without, _ = _two(model, x_t, t, cond, uncond)
    return torch.cat([guided_prediction(model, x_t, t, cond, uncond, guidance_scale)[:, :3], without[:, 3:]], dim=1)


def from_cond(model, x_t, t, cond, uncond, guidance_scale):
    without, with_prompt = _two(model, x_t, t, cond, uncond)
    return with_prompt + guidance_scale * (with_prompt - without)


def with_prompt_only(model, x_t, t, cond, uncond, guidance_scale):
    return model(x_t, t, cond)


def reversed_difference(model, x_t, t, cond, uncond, guidance_scale):
    without, with_prompt = _two(model, x_t, t, cond, uncond)
    return without + guidance_scale * (without - with_prompt)


def difference_alone(model, x_t, t, cond, uncond, guidance_scale):
    without, with_prompt = _two(model, x_t, t, cond, uncond)
    return guidance_scale * (with_prompt - without)


def cond_scaled(model, x_t, t, cond, uncond, guidance_scale):
    without, with_prompt = _two(model, x_t, t, cond, uncond)
    return without + guidance_scale * with_prompt


def timesteps_once(model, x_t, t, cond, uncond, guidance_scale):
    without, with_prompt = model(torch.cat([x_t, x_t]), t, torch.cat([uncond, cond])).chunk(2)
    return without + guidance_scale * (with_prompt - without)


def not_cut(model, x_t, t, cond, uncond, guidance_scale):
    return model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([uncond, cond]))


def _known(x_t, t, context):
    return torch.ones_like(x_t) * context[:, :1, :1, None]


def number_guided_prediction(function) -> str:
    arguments = (_known, torch.zeros(1, 4, 1, 1), torch.tensor([0]), torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
    said = [float(function(*arguments, scale).mean()) for scale in (0, 1, 4)]
    return f"of a model that predicts 0 without and 1 with a prompt, scales 0, 1 and 4 make {said[0]:.0f}, {said[1]:.0f} and {said[2]:.0f}"


# ------------------------------------------------------------------------------------------------------ rescale


def rescale(guided, cond, phi):
    full = guided * cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return phi * full + (1 - phi) * guided


def check_rescale(function) -> str | None:
    """Of two pictures whose predictions differ in size."""
    generator = torch.Generator().manual_seed(0)
    guided, cond = torch.randn(2, 2, 3, 4, 4, generator=generator) * torch.tensor([2.0, 5.0])[:, None, None, None]
    guided = 3 * guided + 0.5
    mistakes = {
        "turns the fraction upside down, so that predictions grow: it is std(cond) / std(guided)": upside_down,
        "takes the whole of the rescaled prediction: only the share phi of the result comes from it": whole,
        "gives guided the share phi: phi belongs to the rescaled one": shares_swapped,
        "takes one deviation for the whole batch: each picture has its own, dim=(1, 2, 3)": over_the_batch,
        "takes a deviation for each channel: a picture has one, over channels, rows and columns": each_channel,
        "uses variances: the fraction is of standard deviations": variances,
        "brings guided to standard deviation 1: it should be that of cond": to_one,
        "mixes guided with cond: the share phi is of guided itself, made smaller": mixed_with_cond,
        "leaves guided out: its share is 1 - phi": guided_left_out,
    }
    arguments = (guided, cond, 0.7)
    return difference(function(*arguments), rescale(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def _std(x, dim=(1, 2, 3)):
    return x.std(dim=dim, keepdim=True)


def upside_down(guided, cond, phi):
    return phi * guided * _std(guided) / _std(cond) + (1 - phi) * guided


def whole(guided, cond, phi):
    return rescale(guided, cond, 1)


def shares_swapped(guided, cond, phi):
    return rescale(guided, cond, 1 - phi)


def over_the_batch(guided, cond, phi):
    return phi * guided * cond.std() / guided.std() + (1 - phi) * guided


def each_channel(guided, cond, phi):
    return phi * guided * _std(cond, (2, 3)) / _std(guided, (2, 3)) + (1 - phi) * guided


def variances(guided, cond, phi):
    return phi * guided * (_std(cond) / _std(guided)) ** 2 + (1 - phi) * guided


def to_one(guided, cond, phi):
    return phi * guided / _std(guided) + (1 - phi) * guided


def mixed_with_cond(guided, cond, phi):
    return phi * cond + (1 - phi) * guided


def guided_left_out(guided, cond, phi):
    return phi * rescale(guided, cond, 1)


def without_keepdim(guided, cond, phi):
    return phi * guided * cond.std(dim=(1, 2, 3)) / guided.std(dim=(1, 2, 3)) + (1 - phi) * guided


def number_rescale(function) -> str:
    uncond, cond = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    guided = uncond + 7.5 * (cond - uncond)
    sizes = [float(x.std()) for x in (cond, guided, function(guided, cond, 0.7))]
    return f"standard deviations: {sizes[0]:.1f} with the prompt, {sizes[1]:.1f} guided by 7.5, {sizes[2]:.1f} rescaled by 0.7"


EXERCISES = (
    Exercise(
        map_of_word,
        check_map_of_word,
        wrong=(
            (averaged_tokens, "the mean over the word's tokens"),
            (first_token, "first token alone"),
            (summed_layers, "adds up the layers"),
            (one_layer, "the first layer alone"),
            (nearest_cells, "without interpolating"),
            (off_by_one, "counts the positions"),
            (all_tokens, "which is 1 everywhere"),
            (transposed, "turns height and width round"),
            (not_stacked, "gives a list"),
            (not_enlarged, "two tensors that do not fit"),
        ),
        library=library_map_of_word,
        number=number_map_of_word,
        picture=picture_map_of_word,
    ),
    Exercise(
        guided_prediction,
        check_guided_prediction,
        wrong=(
            (swapped, "swaps the two halves"),
            (three_channels, "three of the four channels"),
            (from_cond, "so that 1 guides already"),
            (with_prompt_only, "without guidance"),
            (reversed_difference, "in the wrong order"),
            (difference_alone, "the scaled difference alone"),
            (cond_scaled, "instead of the difference"),
            (timesteps_once, "two tensors that do not fit"),
            (not_cut, "gives shape [4, 4, 3, 3]"),
        ),
        library=library_guided_prediction,
        number=number_guided_prediction,
    ),
    Exercise(
        rescale,
        check_rescale,
        wrong=(
            (upside_down, "upside down"),
            (whole, "takes the whole"),
            (shares_swapped, "gives guided the share phi"),
            (over_the_batch, "for the whole batch"),
            (each_channel, "for each channel"),
            (variances, "uses variances"),
            (to_one, "standard deviation 1"),
            (mixed_with_cond, "mixes guided with cond"),
            (guided_left_out, "leaves guided out"),
            (without_keepdim, "two tensors that do not fit"),
        ),
        number=number_rescale,
    ),
)
