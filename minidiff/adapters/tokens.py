"""New words for the text encoder: what Textual Inversion learns, and the <new1> of Custom Diffusion.

    "a photo of <cat>" -> [start, 320, 1125, 539, 49408, 49409, end, ...]   two vectors, two ids beyond the table
    ids below the table's size -> the table;  49408, 49409 -> the rows of <cat>, which are trained

Paper: Gal et al. 2022, "An image is worth one word: personalizing text-to-image generation using Textual Inversion". The rows are
parameters of their own beside the embedding table, so no other row can move: neither by a gradient nor by an optimizer's weight decay.
Left out: vectors that change with the timestep or the layer of the U-Net (progressive words, XTI).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minidiff.pipeline import StableDiffusion
from minidiff.tokenizer import Tokenizer

# Seldom tokens of CLIP from which Custom Diffusion lets its new words start: ktn, pll, ucd. The first is no word but a piece of words.
RARE_TOKENS = (42170, 47629, 43514)


class NewTokens(nn.Module):
    """Placeholders and their vectors: rows[name] is a parameter [n_vectors, D], float32.

    Raises ValueError for rows that are no matrix of at least one vector.
    """

    def __init__(self, rows: Mapping[str, Tensor]):
        super().__init__()
        for name, vectors in rows.items():
            if vectors.dim() != 2 or not len(vectors):
                raise ValueError(f"the rows of {name!r} have shape {tuple(vectors.shape)}; expected [n_vectors, D], at least one")
        self.names = tuple(rows)
        # A list: the names of nn.ParameterDict must not have a dot in them, and words may.
        self.vectors = nn.ParameterList(nn.Parameter(vectors.detach().float().clone()) for vectors in rows.values())
        self._attached: tuple[StableDiffusion, dict[str, tuple[int, ...]]] | None = None

    @property
    def rows(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.names, self.vectors))

    @property
    def attached(self) -> bool:
        return self._attached is not None

    def attach(self, sd: StableDiffusion):
        """Move to sd's device; from now on its prompts may use the placeholders.

        Raises ValueError, and changes nothing, where one cannot be added.
        """
        if self.attached:
            raise ValueError(f"{', '.join(self.names)}: attached already; detach first")
        width = sd.config.text_encoder.width
        for name, vectors in self.rows.items():
            if vectors.shape[1] != width:
                raise ValueError(f"the vectors of {name!r} are {vectors.shape[1]} wide, this text encoder's are {width}")
        known = sd.tokenizer.added
        first = max([sd.text_encoder.token_embedding.num_embeddings, *(i + 1 for ids in known.values() for i in ids)])
        added = {}
        for name, vectors in self.rows.items():
            added[name] = tuple(range(first, first + len(vectors)))
            first += len(vectors)
        sd.tokenizer = sd.tokenizer.with_added(added)
        self.to(sd.device)
        sd.text_encoder.added |= {ids[0]: self.rows[name] for name, ids in added.items()}
        self._attached = sd, added

    def detach(self):
        """sd is again as it was; other words that are attached stay. Nothing happens where these are not attached."""
        if not self._attached:
            return
        sd, added = self._attached
        sd.tokenizer = sd.tokenizer.without(added)
        for ids in added.values():
            del sd.text_encoder.added[ids[0]]
        self._attached = None


def create_tokens(
    sd: StableDiffusion,
    vectors: Mapping[str, int],
    start: Mapping[str, str | int | None] | None = None,
    generator: torch.Generator | None = None,
) -> NewTokens:
    """New words to be trained, not attached: {"<cat>": how many vectors}.

    start: {"<cat>": "cat"}, the word of the vocabulary that all its vectors start from, or a token's number (see RARE_TOKENS); None or left
    out: random, normal with each channel's mean and deviation in the table, from the generator.
    Raises ValueError for a placeholder that the tokenizer cannot take (see Tokenizer), a start that is not a single token, a start for a
    word that is not asked for, and no vectors.
    """
    start = dict(start or {})
    if unknown := [name for name in start if name not in vectors]:
        raise ValueError(f"a start is given for {unknown[0]!r}, which is not among the new words {', '.join(map(repr, vectors))}")
    if not vectors:
        raise ValueError("no new words given; expected {'<cat>': 1}")
    room = sd.tokenizer.config.context_length - 2
    for name, n in vectors.items():
        if not 1 <= n <= room:
            raise ValueError(f"{n} vectors for {name!r}; expected 1 to {room}, what a prompt has room for")
    sd.tokenizer.with_added({name: (-1 - i,) for i, name in enumerate(vectors)})  # only to learn whether it can be
    table = sd.text_encoder.token_embedding.weight.detach().float()
    rows = {}
    for name, n in vectors.items():
        if start.get(name) is not None:
            rows[name] = table[_single_token(sd.tokenizer, start[name])].expand(n, -1)
        elif generator is None:
            raise ValueError(f"{name!r} has no word to start from: give one in start, or a torch.Generator for random vectors")
        else:
            noise = torch.randn(n, table.shape[1], generator=generator, device=generator.device).to(table.device)
            rows[name] = table.mean(dim=0) + table.std(dim=0) * noise
    return NewTokens(rows)


def _single_token(tokenizer: Tokenizer, word: str | int) -> int:
    if isinstance(word, int):
        if not 0 <= word < tokenizer.vocab_size:
            raise ValueError(f"the start {word} is no token; expected 0..{tokenizer.vocab_size - 1}")
        return word
    ids = tokenizer.encode(word)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "nothing"
        raise ValueError(f"the start {word!r} is not a single token but {len(ids)} ({pieces}); choose a word of one token")
    if ids[0] >= tokenizer.vocab_size:
        raise ValueError(f"the start {word!r} is itself a new word; choose a word of the vocabulary")
    return ids[0]
