"""Answers of lesson 05."""

import torch

from lessons.exercises import Exercise, difference


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
        "mends with exp(m' - m), which makes the old sums larger still: alpha = exp(m - m'), at most 1": upside_down,
        "adds to l without mending it: l' = alpha l + sum p": forgets_l,
        "adds to O without mending it: O' = alpha O + p v, with alpha as [:, None]": forgets_o,
        "divides O by l already: that belongs to the end of the walk, once": divides,
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


EXERCISES = (
    Exercise(
        absorb,
        check_absorb,
        wrong=(
            (over_queries, "over the queries"),
            (block_only, "of the new block only"),
            (upside_down, "larger still"),
            (forgets_l, "without mending it: l'"),
            (forgets_o, "without mending it: O'"),
            (divides, "divides O by l already"),
        ),
    ),
)
