"""Answers of lesson 04."""

import math

import torch
from einops import rearrange
from matplotlib.figure import Figure

from lessons.common import curves
from lessons.exercises import Exercise, difference
from minidiff import attention

# ------------------------------------------------------------------------------------------------------ soft_lookup


def soft_lookup(query, keys, values):
    shares = (query @ keys.T).softmax(dim=-1)
    return shares @ values


def check_soft_lookup(function) -> str | None:
    """With as many queries as keys, where a softmax along the wrong axis goes unnoticed by its shape."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(*shape, generator=generator) for shape in ((4, 2), (4, 2), (4, 3)))
    arguments = (query, keys, values)
    mistakes = {
        "takes the softmax over the queries: each query's shares of the keys must add up to 1, so dim=-1": over_queries_alone,
        "mixes by the bare products: they can be negative and add up to anything, softmax makes shares of them": without_softmax,
        "takes the value of the best key alone: a soft lookup mixes all of them by their shares": hard_lookup,
        "returns the shares: they still have to mix the values, shares @ values": shares_alone,
        "mixes the keys: it is the values that are handed back": keys_mixed,
        "gives every value the same share: the shares come from query @ keys.T": evenly,
        "divides the products by sqrt(d): that comes later in the lesson, this lookup has no scale yet": scaled_early,
    }
    return difference(function(*arguments), soft_lookup(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def over_queries_alone(query, keys, values):
    return (query @ keys.T).softmax(dim=0) @ values


def without_softmax(query, keys, values):
    return query @ keys.T @ values


def hard_lookup(query, keys, values):
    return values[(query @ keys.T).argmax(dim=-1)]


def shares_alone(query, keys, values):
    return (query @ keys.T).softmax(dim=-1)


def keys_mixed(query, keys, values):
    return (query @ keys.T).softmax(dim=-1) @ keys


def evenly(query, keys, values):
    return values.mean(dim=0).expand(len(query), -1)


def scaled_early(query, keys, values):
    return (query @ keys.T / math.sqrt(keys.shape[-1])).softmax(dim=-1) @ values


def not_transposed(query, keys, values):
    return (query @ keys).softmax(dim=-1) @ values


def number_soft_lookup(function) -> str:
    keys = torch.eye(3)
    shares = [float(function(length * keys[:1], keys, torch.eye(3)).max()) for length in (1, 4, 16)]
    return f"a query that equals a key takes {shares[0]:.2f} of its value, 4 times as long {shares[1]:.2f}, 16 times {shares[2]:.2f}"


def picture_soft_lookup(function) -> Figure:
    """The value 1 stands at 180 degrees, 0 at 0 degrees; what queries in between are given."""
    keys, values = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.0], [1.0]])
    degrees = torch.arange(181)
    around = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=-1)
    lines = {f"length {length}": (degrees, function(length * around, keys, values)[:, 0]) for length in (1, 4, 16)}
    return curves(lines, "where the query points, in degrees", "mixture of 0 and 1")


# ------------------------------------------------------------------------------------------------------ attention_weights


def attention_weights(q, k, heads):
    q, k = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return logits.softmax(dim=-1)


def library_attention_weights(q, k, heads):
    return attention.attention_weights(q, k, heads)


def check_attention_weights(function) -> str | None:
    """With fewer keys than queries, and queries long enough that the scale matters."""
    generator = torch.Generator().manual_seed(0)
    q, k = 3 * torch.randn(2, 6, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    arguments = (q, k, 2)
    mistakes = {
        "leaves out the scale: divide the products by sqrt(d), here sqrt(4), before the softmax": without_scale,
        "divides by sqrt(8), the root of the whole width D: d, the width of one head, is 4 here": scaled_by_width,
        "divides by d itself: the scale is its square root": scaled_by_d,
        "multiplies by sqrt(d) where it should divide": multiplied,
        "takes the softmax over the queries: each query's shares of the 5 keys must add up to 1, so dim=-1": over_queries,
        "takes every second number for a head: head 0 is the first 4 of the 8 numbers, so split them as (h d), not (d h)": interleaved,
        "returns the products before the softmax: they are no shares yet": logits_alone,
        "scales after the softmax: the rows no longer add up to 1, divide before it": scaled_late,
        "gives shape [2, 6, 5], one lookup for the whole width: split the heads first": heads_together,
        "gives shape [2, 6, 2, 5], with the heads behind the queries: the heads stand right after the batch, B h N L": heads_behind,
    }
    return difference(
        function(*arguments), attention_weights(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()}
    )


def _logits(q, k, heads, pattern="B N (h d) -> B h N d"):
    q, k = (rearrange(x, pattern, h=heads) for x in (q, k))
    return q @ k.transpose(-1, -2)


def without_scale(q, k, heads):
    return _logits(q, k, heads).softmax(dim=-1)


def scaled_by_width(q, k, heads):
    return (_logits(q, k, heads) / math.sqrt(q.shape[-1])).softmax(dim=-1)


def scaled_by_d(q, k, heads):
    return (_logits(q, k, heads) / (q.shape[-1] // heads)).softmax(dim=-1)


def multiplied(q, k, heads):
    return (_logits(q, k, heads) * math.sqrt(q.shape[-1] // heads)).softmax(dim=-1)


def over_queries(q, k, heads):
    return (_logits(q, k, heads) / math.sqrt(q.shape[-1] // heads)).softmax(dim=-2)


def interleaved(q, k, heads):
    return (_logits(q, k, heads, "B N (d h) -> B h N d") / math.sqrt(q.shape[-1] // heads)).softmax(dim=-1)


def logits_alone(q, k, heads):
    return _logits(q, k, heads) / math.sqrt(q.shape[-1] // heads)


def scaled_late(q, k, heads):
    return _logits(q, k, heads).softmax(dim=-1) / math.sqrt(q.shape[-1] // heads)


def heads_together(q, k, heads):
    return attention_weights(q, k, 1)[:, 0]


def heads_behind(q, k, heads):
    return rearrange(attention_weights(q, k, heads), "B h N L -> B N h L")


def keys_not_transposed(q, k, heads):
    q, k = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k))
    return (q @ k / math.sqrt(q.shape[-1])).softmax(dim=-1)


def number_attention_weights(function) -> str:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 77, 640, generator=generator)
    largest = [float(function(q, k, heads).amax(dim=-1).mean()) for heads in (80, 8, 4)]
    narrow, middle, wide = (f"{share:.2f}" for share in largest)
    return f"largest of 77 shares in heads 8, 80 and 160 wide: {narrow}, {middle} and {wide}; with the scale they stay alike"


# ------------------------------------------------------------------------------------------------------ mix_values


def mix_values(weights, v):
    v = rearrange(v, "B L (h d) -> B h L d", h=weights.shape[1])
    return rearrange(weights @ v, "B h N d -> B N (h d)")


def check_mix_values(function) -> str | None:
    """As many heads as pictures, so that values whose heads were not split go through without an error."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 2, 6, 5, generator=generator).softmax(dim=-1)
    v = torch.randn(2, 5, 8, generator=generator)
    arguments = (weights, v)
    mistakes = {
        "gives shape [2, 2, 6, 4], with the heads still apart: merge them to [2, 6, 8]": unmerged,
        "merges the heads in the wrong order: reshape keeps the memory's order B h N d; bring N before h first": badly_merged,
        "takes every second number for a head: split and merge the 8 numbers as (h d), not (d h)": mixed_interleaved,
        "splits as (h d) and merges as (d h), which shuffles the numbers: use the same order twice": merged_interleaved,
        "lets each head mix the whole width, [2, 2, 6, 8]: split v into heads first": whole_width,
        "adds the heads up: each has 4 numbers of its own, put them next to each other": heads_added,
        "uses the weights of the first head for all: each head mixes with its own": first_head,
        "averages the weights over the heads: then all heads look at the same place, each mixes with its own": heads_averaged,
    }
    return difference(function(*arguments), mix_values(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def unmerged(weights, v):
    return weights @ rearrange(v, "B L (h d) -> B h L d", h=weights.shape[1])


def badly_merged(weights, v):
    mixed = unmerged(weights, v)
    return mixed.reshape(mixed.shape[0], mixed.shape[2], -1)


def mixed_interleaved(weights, v):
    v = rearrange(v, "B L (d h) -> B h L d", h=weights.shape[1])
    return rearrange(weights @ v, "B h N d -> B N (d h)")


def merged_interleaved(weights, v):
    return rearrange(unmerged(weights, v), "B h N d -> B N (d h)")


def whole_width(weights, v):
    return weights @ v


def heads_added(weights, v):
    return unmerged(weights, v).sum(dim=1)


def first_head(weights, v):
    return mix_values(weights[:, :1].expand(weights.shape), v)


def heads_averaged(weights, v):
    return mix_values(weights.mean(dim=1, keepdim=True).expand(weights.shape), v)


def weights_turned(weights, v):
    v = rearrange(v, "B L (h d) -> B h L d", h=weights.shape[1])
    return rearrange(weights.transpose(-1, -2) @ v, "B h N d -> B N (h d)")


def unknown_heads(weights, v):
    return rearrange(weights @ v, "B h N d -> B N (h d)", h=heads)


def number_mix_values(function) -> str:
    """Weights that are 1 at one key and 0 elsewhere hand its value back."""
    v = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 5])
    weights = torch.eye(6)[order].expand(1, 2, 3, 6)
    off = float((function(weights, v) - v[:, order]).abs().max())
    return f"weights of 1 at one key and 0 elsewhere hand its value back, off by {off:.0e}"


EXERCISES = (
    Exercise(
        soft_lookup,
        check_soft_lookup,
        wrong=(
            (over_queries_alone, "over the queries"),
            (without_softmax, "bare products"),
            (hard_lookup, "best key alone"),
            (shares_alone, "returns the shares"),
            (keys_mixed, "mixes the keys"),
            (evenly, "the same share"),
            (scaled_early, "no scale yet"),
            (not_transposed, ".T turns a matrix round"),
        ),
        number=number_soft_lookup,
        picture=picture_soft_lookup,
    ),
    Exercise(
        attention_weights,
        check_attention_weights,
        wrong=(
            (without_scale, "leaves out the scale"),
            (scaled_by_width, "the whole width D"),
            (scaled_by_d, "divides by d itself"),
            (multiplied, "where it should divide"),
            (over_queries, "over the queries"),
            (interleaved, "every second number"),
            (logits_alone, "no shares yet"),
            (scaled_late, "scales after the softmax"),
            (heads_together, "one lookup for the whole width"),
            (heads_behind, "behind the queries"),
            (keys_not_transposed, "swaps the last two axes"),
        ),
        library=library_attention_weights,
        number=number_attention_weights,
    ),
    Exercise(
        mix_values,
        check_mix_values,
        wrong=(
            (unmerged, "heads still apart"),
            (badly_merged, "in the wrong order"),
            (mixed_interleaved, "every second number"),
            (merged_interleaved, "shuffles the numbers"),
            (whole_width, "lets each head mix the whole width"),
            (heads_added, "adds the heads up"),
            (first_head, "of the first head for all"),
            (heads_averaged, "averages the weights"),
            (weights_turned, "product of stacked matrices"),
            (unknown_heads, "the name 'heads' is not known"),
        ),
        number=number_mix_values,
    ),
)
