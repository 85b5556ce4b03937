"""Answers of lesson 09."""

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lessons.exercises import Exercise, Misuse, difference
from minidiff.scenes.train_bpe import join_pair, train

# ------------------------------------------------------------------------------------------------------ spell


def spell(word, merges):
    pieces = (*word[:-1], word[-1] + "</w>")
    while True:
        known = [pair for pair in zip(pieces, pieces[1:]) if pair in merges]
        if not known:
            return pieces
        pieces = join_pair(pieces, min(known, key=merges.get))


def check_spell(function) -> str | None:
    """With merges that lead to another end in every other order."""
    merges = {("e", "r</w>"): 0, ("l", "o"): 1, ("o", "w"): 2, ("w", "er</w>"): 3, ("lo", "w"): 4}
    mistakes = {
        "joins the pair that stands first in 'lower'; of the pairs that are in merges take the one with the lowest number": leftmost,
        "joins the pair with the highest number; the lowest, 0, comes first: ('e', 'r</w>') in 'lower'": highest,
        "forgets that the last letter of 'lower' is 'r</w>', which tells a piece at the end of a word from one inside": without_end,
        "stops after one merge of 'lower'; go on until no pair of neighbours is in merges": once,
        "puts '</w>' as a piece of its own behind 'lower': it belongs to the last letter, 'r</w>'": end_apart,
        "cuts 'lower' into letters and joins nothing: look for neighbours that are in merges": letters_alone,
    }
    for word in ("lower", "low", "e"):
        got, mistaken = function(word, dict(merges)), {}
        if isinstance(got, str):
            raise Misuse("gives a string: return the tuple of pieces, such as ('lo', 'w</w>')")
        if word == "lower":
            mistaken = {sentence: slip(word, merges) for sentence, slip in mistakes.items()}
        wrong = difference(tuple(got) if isinstance(got, list) else got, spell(word, merges), mistaken, of=f"for {word!r}")
        if wrong is not None:
            return wrong
    return None


def _joined(pieces, merges, choose):
    while known := [pair for pair in zip(pieces, pieces[1:]) if pair in merges]:
        pieces = join_pair(pieces, choose(known))
    return pieces


def _letters(word):
    return (*word[:-1], word[-1] + "</w>")


def leftmost(word, merges):
    return _joined(_letters(word), merges, lambda known: known[0])


def highest(word, merges):
    return _joined(_letters(word), merges, lambda known: max(known, key=merges.get))


def without_end(word, merges):
    return _joined(tuple(word), merges, lambda known: min(known, key=merges.get))


def once(word, merges):
    pieces = _letters(word)
    known = [pair for pair in zip(pieces, pieces[1:]) if pair in merges]
    return join_pair(pieces, min(known, key=merges.get)) if known else pieces


def end_apart(word, merges):
    return _joined((*word, "</w>"), merges, lambda known: min(known, key=merges.get))


def letters_alone(word, merges):
    return _letters(word)


def one_string(word, merges):
    return " ".join(spell(word, merges))


def number_spell(function) -> str:
    merges = {pair: place for place, pair in enumerate(train(["low", "lower", "slow", "newest", "widest"]))}
    pieces = function("slowest", merges)
    return f"'slowest', which the {len(merges)} merges were not made from, becomes {len(pieces)} pieces: {' | '.join(pieces)}"


# ------------------------------------------------------------------------------------------------------ causal_weights


def causal_weights(scores):
    later = torch.ones_like(scores).triu(1).bool()
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1)


def check_causal_weights(function) -> str | None:
    """First of one row of positions, then of heads and a batch."""
    generator = torch.Generator().manual_seed(0)
    mistakes = {
        "has no mask: every position still looks at those after it": no_mask,
        "lets each position look at itself and the later ones: hide those above the diagonal, where m > n": looks_ahead,
        "sets the weights of later positions to zero after the softmax, so that rows no longer add up to 1: mask the scores before it": mask_late,
        "sets the later scores to 0, whose exponential is 1: it has to be -infinity": zero_scores,
        "takes the softmax over the columns: a row holds the weights of one position, dim=-1": over_columns,
        "returns the masked scores: the softmax of each row is missing": no_softmax,
        "hides everything but the position itself": itself_alone,
    }
    for shape in ((5, 5), (2, 3, 4, 4)):
        scores = torch.randn(shape, generator=generator)
        got = function(scores)
        if isinstance(got, torch.Tensor) and got.isnan().any():
            return "hides every position from the first row, so its softmax divides zero by zero: each position may look at itself, triu(1)"
        wrong = difference(
            got, causal_weights(scores), {sentence: slip(scores) for sentence, slip in mistakes.items()}, of=f"for shape {list(shape)}"
        )
        if wrong is not None:
            return wrong
    return None


def no_mask(scores):
    return scores.softmax(dim=-1)


def looks_ahead(scores):
    return scores.masked_fill(torch.ones_like(scores).tril(-1).bool(), -torch.inf).softmax(dim=-1)


def mask_late(scores):
    return scores.softmax(dim=-1).tril()


def zero_scores(scores):
    return scores.tril().softmax(dim=-1)


def over_columns(scores):
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(dim=-2)


def no_softmax(scores):
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)


def itself_alone(scores):
    return torch.eye(scores.shape[-1]).expand_as(scores)


def itself_hidden(scores):
    return scores.masked_fill(torch.ones_like(scores).triu(0).bool(), -torch.inf).softmax(dim=-1)


def in_place(scores):
    scores[torch.ones_like(scores).triu(1).bool()] = -torch.inf
    return scores.softmax(dim=-1)


def number_causal_weights(function) -> str:
    weights = function(torch.zeros(8, 8))
    later = float(weights.triu(1).sum())
    return f"with equal scores, position 1 looks at itself by {weights[0, 0]:.0%}, position 8 at each by {weights[7, 0]:.1%}; later ones get {later:.0f}"


def picture_causal_weights(function) -> Figure:
    fig, axis = plt.subplots(figsize=(6, 4.6))
    axis.imshow(function(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))), vmin=0, vmax=1)
    axis.set(xlabel="looked at", ylabel="position that looks")
    axis.grid(False)
    return fig


# ------------------------------------------------------------------------------------------------------ clip_loss


def clip_loss(pictures, texts, scale):
    pictures, texts = F.normalize(pictures, dim=-1), F.normalize(texts, dim=-1)
    scores = scale * pictures @ texts.T
    own = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def check_clip_loss(function) -> str | None:
    generator = torch.Generator().manual_seed(0)
    pictures, texts = (3 * torch.randn(6, 4, generator=generator) for _ in range(2))
    mistakes = {
        "asks the rows alone, which text belongs to each picture: ask the columns too, with scores.T": rows_alone,
        "asks the columns alone, which picture belongs to each text: ask the rows too": columns_alone,
        "adds the losses of rows and columns: return their mean": summed,
        "leaves the vectors at their own length: F.normalize both of them": unnormalised,
        "normalises the pictures alone: texts have lengths of their own as well": one_normalised,
        "leaves out the scale: cosines lie between -1 and 1, so the softmax would stay nearly even": unscaled,
        "divides by the scale: the scores are the cosines times the scale": divided,
        "takes a softmax before F.cross_entropy, which takes one itself": two_softmaxes,
        "says that column 0 is right for each row: own counts 0, 1, 2, ...": all_first,
        "looks at the pairs that belong together alone: without the other ones nothing pushes vectors apart": diagonal_alone,
        "normalises over the batch: each vector has length one along its own axis, dim=-1": over_the_batch,
    }
    arguments = (pictures, texts, 5.0)
    return difference(function(*arguments), clip_loss(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def _loss(scores, both=True):
    own = torch.arange(len(scores))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2 if both else F.cross_entropy(scores, own)


def _cosines(pictures, texts):
    return F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T


def rows_alone(pictures, texts, scale):
    return _loss(scale * _cosines(pictures, texts), both=False)


def columns_alone(pictures, texts, scale):
    return _loss(scale * _cosines(pictures, texts).T, both=False)


def summed(pictures, texts, scale):
    return 2 * clip_loss(pictures, texts, scale)


def unnormalised(pictures, texts, scale):
    return _loss(scale * pictures @ texts.T)


def one_normalised(pictures, texts, scale):
    return _loss(scale * F.normalize(pictures, dim=-1) @ texts.T)


def unscaled(pictures, texts, scale):
    return _loss(_cosines(pictures, texts))


def divided(pictures, texts, scale):
    return _loss(_cosines(pictures, texts) / scale)


def two_softmaxes(pictures, texts, scale):
    scores, own = scale * _cosines(pictures, texts), torch.arange(len(pictures))
    return (F.cross_entropy(scores.softmax(dim=-1), own) + F.cross_entropy(scores.T.softmax(dim=-1), own)) / 2


def all_first(pictures, texts, scale):
    scores, own = scale * _cosines(pictures, texts), torch.zeros(len(pictures), dtype=torch.long)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def diagonal_alone(pictures, texts, scale):
    return 1 - _cosines(pictures, texts).diagonal().mean()


def over_the_batch(pictures, texts, scale):
    return _loss(scale * F.normalize(pictures, dim=0) @ F.normalize(texts, dim=0).T)


def not_transposed(pictures, texts, scale):
    return _loss(scale * F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1))


def number_clip_loss(function) -> str:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(8, 64, generator=generator) for _ in range(2))
    strangers, pairs = (float(function(one, texts, 20.0)) for texts in (other, one + other / 4))
    return f"8 pairs of random vectors: loss {strangers:.2f}; 8 pairs that nearly agree: {pairs:.3f}; equal shares would give {torch.tensor(8.0).log():.2f}"


EXERCISES = (
    Exercise(
        spell,
        check_spell,
        wrong=(
            (leftmost, "stands first in 'lower'"),
            (highest, "with the highest number"),
            (without_end, "forgets that the last letter"),
            (once, "stops after one merge"),
            (end_apart, "a piece of its own"),
            (letters_alone, "joins nothing"),
            (one_string, "gives a string"),
        ),
        number=number_spell,
    ),
    Exercise(
        causal_weights,
        check_causal_weights,
        wrong=(
            (no_mask, "has no mask"),
            (looks_ahead, "itself and the later ones"),
            (mask_late, "after the softmax"),
            (zero_scores, "whose exponential is 1"),
            (over_columns, "over the columns"),
            (no_softmax, "the softmax of each row is missing"),
            (itself_alone, "everything but the position itself"),
            (itself_hidden, "from the first row"),
            (in_place, "changes its argument scores"),
        ),
        number=number_causal_weights,
        picture=picture_causal_weights,
    ),
    Exercise(
        clip_loss,
        check_clip_loss,
        wrong=(
            (rows_alone, "asks the rows alone"),
            (columns_alone, "asks the columns alone"),
            (summed, "adds the losses"),
            (unnormalised, "at their own length"),
            (one_normalised, "the pictures alone: texts"),
            (unscaled, "leaves out the scale"),
            (divided, "divides by the scale"),
            (two_softmaxes, "before F.cross_entropy"),
            (all_first, "column 0"),
            (diagonal_alone, "belong together alone"),
            (over_the_batch, "over the batch"),
            (not_transposed, "a matrix product does not fit"),
        ),
        number=number_clip_loss,
    ),
)
