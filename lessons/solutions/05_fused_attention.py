"""Answers of lesson 05."""

import math

import torch
from matplotlib.figure import Figure

from lessons.common import curves
from lessons.exercises import Exercise, Misuse, difference
from minidiff.attention import naive_attention

# ------------------------------------------------------------------------------------------------------ running_softmax


def running_softmax(logits):
    m, l = -math.inf, 0.0
    for s in logits:
        m_new = max(m, s)
        l = l * math.exp(m - m_new) + math.exp(s - m_new)
        m = m_new
        yield m, l


def check_running_softmax(function) -> str | None:
    """Of logits that rise and fall, all below zero, where a start at m = 0 shows."""
    logits = [-3.0, -1.0, -4.0, -0.5, -2.0]
    got = function(logits)
    if got is None:
        return difference(got, [])
    if isinstance(got, tuple):
        return "returns one pair at the end: `yield m, l` inside the loop gives one after each logit"
    got, expected = list(got), list(running_softmax(logits))
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in got):
        raise Misuse("yields something other than two numbers a time: `yield m, l`")
    mistakes = {
        "adds to l without rescaling it: multiply l by exp(m - m'), while m is still the old one": never_rescales,
        "rescales by exp(m' - m), which makes the old sum larger still: the factor is exp(m - m'), at most 1": rescales_upwards,
        "rescales the new term as well: l exp(m - m') + exp(s - m'), the factor belongs to l alone": rescales_all,
        "takes each logit for the largest: m' = max(m, s), so that m never falls": takes_the_last,
        "adds exp(s) itself, which overflows for large logits: subtract m' in the exponent": without_m,
        "starts with m = 0, so that logits below zero are never the largest: start with m = -math.inf": starts_at_zero,
        "starts with l = 1: nothing has been summed before the first logit, l = 0.0": starts_at_one,
        "yields m and l as they were before the logit: yield after the step": yields_too_early,
        "yields l before m: the pair is m first, then l": other_order,
        "yields once, at the end: `yield` stands inside the loop": only_the_last,
    }
    for sentence, slip in mistakes.items():
        if _near(got, list(slip(logits))):
            return sentence
    if len(got) != len(expected):
        return f"yields {len(got)} pairs for {len(expected)} logits: one pair each time round the loop"
    pairs = enumerate(zip(got, expected), start=1)
    said = (difference(float(a), b, of=f"as {name} after logit {i}") for i, two in pairs for name, a, b in zip("ml", *two))
    return next((sentence for sentence in said if sentence), None)


def _near(got, other) -> bool:
    flat = [[float(number) for pair in pairs for number in pair] for pairs in (got, other)]
    return len(flat[0]) == len(flat[1]) and all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4) for a, b in zip(*flat))


def never_rescales(logits):
    m, l = -math.inf, 0.0
    for s in logits:
        m = max(m, s)
        l = l + math.exp(s - m)
        yield m, l


def rescales_upwards(logits):
    m, l = logits[0], 0.0
    for s in logits:
        m_new = max(m, s)
        l = l * math.exp(m_new - m) + math.exp(s - m_new)
        m = m_new
        yield m, l


def rescales_all(logits):
    m, l = logits[0], 0.0
    for s in logits:
        m_new = max(m, s)
        l = (l + math.exp(s - m_new)) * math.exp(m - m_new)
        m = m_new
        yield m, l


def takes_the_last(logits):
    m, l = -math.inf, 0.0
    for s in logits:
        l = l * math.exp(m - s) + 1
        m = s
        yield m, l


def without_m(logits):
    l = 0.0
    for (m, _), s in zip(running_softmax(logits), logits):
        l += math.exp(s)
        yield m, l


def starts_at_zero(logits):
    m, l = 0.0, 0.0
    for s in logits:
        m_new = max(m, s)
        l = l * math.exp(m - m_new) + math.exp(s - m_new)
        m = m_new
        yield m, l


def starts_at_one(logits):
    m, l = logits[0], 1.0
    for s in logits:
        m_new = max(m, s)
        l = l * math.exp(m - m_new) + math.exp(s - m_new)
        m = m_new
        yield m, l


def yields_too_early(logits):
    yield from [(-math.inf, 0.0), *running_softmax(logits)][:-1]


def other_order(logits):
    for m, l in running_softmax(logits):
        yield l, m


def only_the_last(logits):
    *_, last = running_softmax(logits)
    yield last


def returns_the_last(logits):
    *_, last = running_softmax(logits)
    return last


def yields_the_sum(logits):
    for _, l in running_softmax(logits):
        yield l


def exponential_of_the_list(logits):
    m = max(logits)
    yield m, sum(math.exp(logits))


def _orders():
    """The same logits as they were drawn, rising and falling."""
    drawn = (3 * torch.randn(40, generator=torch.Generator().manual_seed(0))).tolist()
    return {"as they come": drawn, "rising": sorted(drawn), "falling": sorted(drawn, reverse=True)}


def number_running_softmax(function) -> str:
    ends = [list(function(logits))[-1][1] for logits in _orders().values()]
    return f"40 logits as they come, rising and falling: the sum ends at {ends[0]:.6f}, {ends[1]:.6f} and {ends[2]:.6f}"


def picture_running_softmax(function) -> Figure:
    lines = {name: (range(1, 41), [l for _, l in function(logits)]) for name, logits in _orders().items()}
    return curves(lines, "keys seen", "sum $l$")


# ------------------------------------------------------------------------------------------------------ absorb


def absorb(m, l, o, s, v):
    m_new = torch.maximum(m, s.amax(dim=1))
    alpha, p = (m - m_new).exp(), (s - m_new[:, None]).exp()
    return m_new, l * alpha + p.sum(dim=1), o * alpha[:, None] + p @ v


def inputs(first: bool):
    """Four queries and a block of four keys, where a maximum along the wrong axis keeps its shape; in two rows the largest logit rises."""
    generator = torch.Generator().manual_seed(0)
    s, o = torch.randn(4, 4, generator=generator), torch.randn(4, 2, generator=generator)
    v = torch.randn(4, 2, generator=generator)
    m, l = torch.tensor([-2.0, 3.0, -1.0, 2.5]), torch.tensor([1.5, 2.0, 1.2, 3.0])
    return (torch.full_like(m, -torch.inf), torch.zeros(4), torch.zeros(4, 2), s, v) if first else (m, l, o, s, v)


def check_absorb(function) -> str | None:
    """In the middle of the walk, and at its first block, where m is -inf."""
    sentences = {
        "takes the largest along dim=0, over the queries; each query has its own, over the keys: dim=1": over_queries,
        "takes the largest of the new block only: m' = max(m, ...), so that it never falls": block_only,
        "takes one largest logit for all queries: each row of s has its own, s.amax(dim=1)": one_for_all,
        "rescales with exp(m' - m), which makes the old sums larger still: alpha = exp(m - m'), at most 1": upside_down,
        "adds to l without rescaling it: l' = alpha l + sum p": forgets_l,
        "adds to O without rescaling it: O' = alpha O + p v, with alpha as [:, None]": forgets_o,
        "divides O by l already: that belongs to the end of the walk, once": divides,
        "mixes the values by the logits: p = exp(s - m') is what mixes them, O' = alpha O + p v": mixes_by_logits,
        "returns the old m: the next block needs m', and so does the answer": old_m,
    }
    for first in (False, True):
        got = function(*inputs(first))
        if got is None:
            return difference(got, absorb(*inputs(first))[0])
        if not isinstance(got, tuple | list) or len(got) != 3:
            return f"gives a {type(got).__name__}, expected three tensors: m', l' and O'"
        for i, name in enumerate(("m'", "l'", "O'")):
            mistakes = {} if first else {sentence: wrong(*inputs(first))[i] for sentence, wrong in sentences.items()}
            said = difference(
                got[i], absorb(*inputs(first))[i], mistakes, of=f"for {name}" + (" of the first block, where m is -inf" if first else "")
            )
            if said:
                return said
    return None


def over_queries(m, l, o, s, v):
    m_new = torch.maximum(m, s.amax(dim=0))
    alpha, p = (m - m_new).exp(), (s - m_new[:, None]).exp()
    return m_new, l * alpha + p.sum(dim=1), o * alpha[:, None] + p @ v


def block_only(m, l, o, s, v):
    m_new = s.amax(dim=1)
    alpha, p = (m - m_new).exp(), (s - m_new[:, None]).exp()
    return m_new, l * alpha + p.sum(dim=1), o * alpha[:, None] + p @ v


def one_for_all(m, l, o, s, v):
    m_new = torch.maximum(m, s.max())
    alpha, p = (m - m_new).exp(), (s - m_new[:, None]).exp()
    return m_new, l * alpha + p.sum(dim=1), o * alpha[:, None] + p @ v


def upside_down(m, l, o, s, v):
    m_new = torch.maximum(m, s.amax(dim=1))
    alpha, p = (m_new - m).exp(), (s - m_new[:, None]).exp()
    return m_new, l * alpha + p.sum(dim=1), o * alpha[:, None] + p @ v


def forgets_l(m, l, o, s, v):
    m_new, _, o_new = absorb(m, l, o, s, v)
    return m_new, l + (s - m_new[:, None]).exp().sum(dim=1), o_new


def forgets_o(m, l, o, s, v):
    m_new, l_new, _ = absorb(m, l, o, s, v)
    return m_new, l_new, o + (s - m_new[:, None]).exp() @ v


def divides(m, l, o, s, v):
    m_new, l_new, o_new = absorb(m, l, o, s, v)
    return m_new, l_new, o_new / l_new[:, None]


def mixes_by_logits(m, l, o, s, v):
    m_new, l_new, _ = absorb(m, l, o, s, v)
    return m_new, l_new, o * (m - m_new).exp()[:, None] + s @ v


def old_m(m, l, o, s, v):
    return m, *absorb(m, l, o, s, v)[1:]


def the_maximum_as_a_tuple(m, l, o, s, v):
    m_new = torch.maximum(m, s.max(dim=1))
    return m_new, l, o


def number_absorb(function) -> str:
    """Two blocks, one after the other, beside softmax over both at once."""
    generator = torch.Generator().manual_seed(0)
    s, v = 3 * torch.randn(6, 8, generator=generator), torch.randn(8, 4, generator=generator)
    state = torch.full((6,), -torch.inf), torch.zeros(6), torch.zeros(6, 4)
    for part in (slice(0, 4), slice(4, 8)):
        state = function(*state, s[:, part], v[part])
    _, l, o = state
    off = float((o / l[:, None] - s.softmax(dim=-1) @ v).abs().max())
    return f"two blocks of 4 keys, one after the other, are off by {off:.0e} from softmax over all 8"


# ------------------------------------------------------------------------------------------------------ attend_in_blocks


def attend_in_blocks(step, q, k, v, block):
    d = q.shape[-1]
    m, l, o = torch.full_like(q[:, 0], -torch.inf), torch.zeros_like(q[:, 0]), torch.zeros_like(q)
    for first in range(0, len(k), block):
        s = q @ k[first : first + block].T / math.sqrt(d)
        m, l, o = step(m, l, o, s, v[first : first + block])
    return o / l[:, None], m + l.log()


def tensors(offset: float = 0.0):
    """Five queries, seven keys; with an offset, all logits are far below zero."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, 4, generator=generator) for length in (5, 7, 7))
    q[:, 0], k[:, 0] = (-offset, offset) if offset else (q[:, 0], k[:, 0])
    return q, k, v


def check_attend_in_blocks(function) -> str | None:
    """In blocks that do not divide the keys; then with logits far below zero, where a start at m = 0 shows."""
    expected = attend_in_blocks(absorb, *tensors(), 3)
    got = function(absorb, *tensors(), 3)
    if got is None:
        return difference(got, expected[0])
    if not isinstance(got, tuple | list) or len(got) != 2:
        return f"gives a {type(got).__name__}, expected two tensors: the answer and the LSE"
    sentences = {
        "does not divide O by l at the end: O / l, with l as [:, None]": undivided,
        "leaves out the scale: divide the products by sqrt(d), as in lesson 04": unscaled,
        "divides by d itself: the scale is its square root": scaled_by_d,
        "stops after the last whole block: the keys that are left make a shorter one": whole_blocks_only,
        "takes the values from the start of the table for every block: v[first : first + block], like k": values_of_the_first,
        "forgets what `step` returns: m, l, o = step(m, l, o, s, ...)": last_block_alone,
        "returns l in place of the LSE: the log-sum-exp is m + l.log()": l_itself,
        "leaves out m in the LSE: all terms of l were divided by e^m, so m + l.log()": lse_without_m,
        "leaves out the logarithm in the LSE: m is an exponent and l is not, so m + l.log()": lse_without_log,
    }
    for i, name in enumerate(("the answer", "the LSE")):
        mistakes = {sentence: slip(absorb, *tensors(), 3)[i] for sentence, slip in sentences.items()}
        said = difference(got[i], expected[i], mistakes, of=f"for {name}")
        if said:
            return said
    got, expected = (run(absorb, *tensors(30.0), 3)[0] for run in (function, attend_in_blocks))
    if not got.isfinite().all():
        return "gives no number where all logits are far below zero: start with m = -inf, not with 0"
    return difference(got, expected, of="with logits far below zero")


def undivided(step, q, k, v, block):
    answer, lse = attend_in_blocks(step, q, k, v, block)
    *_, l, _ = _state(step, q, k, v, block)
    return answer * l[:, None], lse


def _state(step, q, k, v, block, scale=None):
    m, l, o = torch.full_like(q[:, 0], -torch.inf), torch.zeros_like(q[:, 0]), torch.zeros_like(q)
    for first in range(0, len(k), block):
        s = q @ k[first : first + block].T / (scale or math.sqrt(q.shape[-1]))
        m, l, o = step(m, l, o, s, v[first : first + block])
    return m, l, o


def _scaled(step, q, k, v, block, scale):
    m, l, o = _state(step, q, k, v, block, scale)
    return o / l[:, None], m + l.log()


def unscaled(step, q, k, v, block):
    return _scaled(step, q, k, v, block, 1.0)


def scaled_by_d(step, q, k, v, block):
    return _scaled(step, q, k, v, block, q.shape[-1])


def whole_blocks_only(step, q, k, v, block):
    whole = len(k) // block * block
    return attend_in_blocks(step, q, k[:whole], v[:whole], block)


def values_of_the_first(step, q, k, v, block):
    again = torch.cat([v[: len(part)] for part in k.split(block)])
    return attend_in_blocks(step, q, k, again, block)


def last_block_alone(step, q, k, v, block):
    last = (len(k) - 1) // block * block
    return attend_in_blocks(step, q, k[last:], v[last:], block)


def l_itself(step, q, k, v, block):
    return attend_in_blocks(step, q, k, v, block)[0], _state(step, q, k, v, block)[1]


def lse_without_m(step, q, k, v, block):
    return attend_in_blocks(step, q, k, v, block)[0], _state(step, q, k, v, block)[1].log()


def lse_without_log(step, q, k, v, block):
    m, l, _ = _state(step, q, k, v, block)
    return attend_in_blocks(step, q, k, v, block)[0], m + l


def starts_with_m_at_zero(step, q, k, v, block):
    m, l, o = torch.zeros_like(q[:, 0]), torch.zeros_like(q[:, 0]), torch.zeros_like(q)
    for first in range(0, len(k), block):
        s = q @ k[first : first + block].T / math.sqrt(q.shape[-1])
        m, l, o = step(m, l, o, s, v[first : first + block])
    return o / l[:, None], m + l.log()


def answer_alone(step, q, k, v, block):
    return attend_in_blocks(step, q, k, v, block)[0]


def l_without_the_axis(step, q, k, v, block):
    m, l, o = _state(step, q, k, v, block)
    return o / l, m + l.log()


def all_values_with_each_block(step, q, k, v, block):
    m, l, o = torch.full_like(q[:, 0], -torch.inf), torch.zeros_like(q[:, 0]), torch.zeros_like(q)
    for first in range(0, len(k), block):
        m, l, o = step(m, l, o, q @ k[first : first + block].T / math.sqrt(q.shape[-1]), v)
    return o / l[:, None], m + l.log()


def number_attend_in_blocks(function) -> str:
    """1,024 keys in blocks of 64: 16 times fewer weights at a time."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1024, 32, generator=generator) for _ in range(3))
    off = float((function(absorb, q, k, v, 64)[0] - naive_attention(q[None], k[None], v[None], 1)[0]).abs().max())
    at_once, in_blocks = 1024 * 1024 * 4 / 1e6, 1024 * 64 * 4 / 1e6
    return f"1,024 keys in blocks of 64: {in_blocks:.2f} MB of weights at a time in place of {at_once:.1f} MB, and off by {off:.0e}"


EXERCISES = (
    Exercise(
        running_softmax,
        check_running_softmax,
        wrong=(
            (never_rescales, "without rescaling"),
            (rescales_upwards, "larger still"),
            (rescales_all, "rescales the new term"),
            (takes_the_last, "each logit for the largest"),
            (without_m, "adds exp(s) itself"),
            (starts_at_zero, "starts with m = 0"),
            (starts_at_one, "starts with l = 1"),
            (yields_too_early, "before the logit"),
            (other_order, "yields l before m"),
            (only_the_last, "yields once"),
            (returns_the_last, "returns one pair"),
            (yields_the_sum, "something other than two"),
            (exponential_of_the_list, "one number at a time"),
        ),
        number=number_running_softmax,
        picture=picture_running_softmax,
    ),
    Exercise(
        absorb,
        check_absorb,
        wrong=(
            (over_queries, "over the queries"),
            (block_only, "of the new block only"),
            (one_for_all, "for all queries"),
            (upside_down, "larger still"),
            (forgets_l, "without rescaling it: l'"),
            (forgets_o, "without rescaling it: O'"),
            (divides, "divides O by l already"),
            (mixes_by_logits, "by the logits"),
            (old_m, "returns the old m"),
            (the_maximum_as_a_tuple, "the values alone"),
        ),
        number=number_absorb,
    ),
    Exercise(
        attend_in_blocks,
        check_attend_in_blocks,
        wrong=(
            (undivided, "does not divide O"),
            (unscaled, "leaves out the scale"),
            (scaled_by_d, "divides by d itself"),
            (whole_blocks_only, "last whole block"),
            (values_of_the_first, "from the start of the table"),
            (last_block_alone, "forgets what `step` returns"),
            (l_itself, "returns l in place"),
            (lse_without_m, "leaves out m in the LSE"),
            (lse_without_log, "leaves out the logarithm"),
            (starts_with_m_at_zero, "start with m = -inf"),
            (answer_alone, "expected two tensors"),
            (l_without_the_axis, "two tensors that do not fit"),
            (all_values_with_each_block, "a matrix product does not fit"),
        ),
        number=number_attend_in_blocks,
    ),
)
