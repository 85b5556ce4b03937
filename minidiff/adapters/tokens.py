"""New words for the text encoder: what Textual Inversion learns, and the <new1> of Custom Diffusion.

    "a photo of <cat>" -> [start, 320, 1125, 539, 49408, 49409, end, ...]   two vectors, two ids beyond the table
    ids below the table's size -> the table;  49408, 49409 -> the rows of <cat>, which are trained

Paper: Gal et al. 2022, "An image is worth one word: personalizing text-to-image generation using Textual Inversion". The rows are
parameters of their own beside the embedding table, so no other row can move: neither by a gradient nor by an optimizer's weight decay.
Left out: vectors that change with the timestep or the layer of the U-Net (progressive words, XTI).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from minidiff.adapters.base import Adapter, Hook
from minidiff.pipeline import StableDiffusion
from minidiff.tokenizer import Tokenizer

# Rare tokens of CLIP that the new words of Custom Diffusion start from: ktn, pll, ucd. The first is a piece of words, not a word.
RARE_TOKENS = (42170, 47629, 43514)


class NewTokens(Adapter):
    """Placeholders and their vectors: rows[name] is a parameter [n_vectors, D], float32. Attached, prompts may use the placeholders.

    D is the text encoder's width; for a model with two encoders, such as SDXL, a vector for each lies side by side, as their contexts do.

    Raises ValueError for rows that are no matrix of at least one vector.
    """

    def __init__(self, rows: Mapping[str, Tensor]):
        super().__init__()
        for name, vectors in rows.items():
            if vectors.dim() != 2 or not len(vectors):
                raise ValueError(f"the rows of {name!r} have shape {tuple(vectors.shape)}; expected [n_vectors, D], at least one")
        self.names = tuple(rows)
        self.title = ", ".join(self.names)
        # A list: the names of nn.ParameterDict must not have a dot in them, and words may.
        self.vectors = nn.ParameterList(nn.Parameter(vectors.detach().float().clone()) for vectors in rows.values())
        self._ids: dict[str, tuple[int, ...]] = {}

    @property
    def rows(self) -> dict[str, nn.Parameter]:
        """Return the vectors by placeholder."""
        return dict(zip(self.names, self.vectors))

    def fit(self, sd: StableDiffusion) -> Sequence[Hook]:
        """Choose an id for each vector, after those of the table and of the words that are attached. No layer needs a hook.

        Raises ValueError for vectors of another width than the text encoder's, and for a placeholder that the tokenizer cannot take.
        """
        width = words_width(sd)
        for name, vectors in self.rows.items():
            if vectors.shape[1] != width:
                raise ValueError(f"the vectors of {name!r} are {vectors.shape[1]} wide, those of this model's words {width}")
        tables = [encoder.token_embedding.num_embeddings for encoder in sd.text.encoders.values()]
        first = max([*tables, *(i + 1 for ids in sd.tokenizer.added.values() for i in ids)])
        self._ids = {}
        for name, vectors in self.rows.items():
            self._ids[name] = tuple(range(first, first + len(vectors)))
            first += len(vectors)
        for tokenizer in sd.text.tokenizers.values():
            tokenizer.with_added(self._ids)  # only to learn whether it takes them
        return ()

    def attach(self, sd: StableDiffusion) -> None:
        """Attach as every Adapter, and give the placeholders to the tokenizer and their rows to the text encoder."""
        super().attach(sd)
        for part, encoder in sd.text.encoders.items():
            sd.text.tokenizers[part] = sd.text.tokenizers[part].with_added(self._ids)
            encoder.added |= {ids[0]: self.rows[name] for name, ids in self._ids.items()}

    def detach(self) -> None:
        """Leave sd as it was; other words that are attached stay. Does nothing if these are not attached."""
        if self._sd is not None:
            for part, encoder in self._sd.text.encoders.items():
                self._sd.text.tokenizers[part] = self._sd.text.tokenizers[part].without(self._ids)
                for ids in self._ids.values():
                    del encoder.added[ids[0]]
        super().detach()


def create_tokens(
    sd: StableDiffusion,
    vectors: Mapping[str, int],
    start: Mapping[str, str | int | None] | None = None,
    generator: torch.Generator | None = None,
) -> NewTokens:
    """Return new words to be trained, not attached.

    Args:
        sd: the model that they are for
        vectors: {"<cat>": how many vectors the word has}
        start: {"<cat>": "cat"}, the word of the vocabulary that all its vectors start from, or a token's number (see RARE_TOKENS); a word
            with None or without an entry starts at random, normal with each channel's mean and deviation in the table
        generator: for random starts

    Raises ValueError for a placeholder that the tokenizer cannot take (see Tokenizer), a start that is not a single token, a start for a
    word that is not among `vectors`, and no vectors.
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
    tables = {part: encoder.token_embedding.weight.detach().float() for part, encoder in sd.text.encoders.items()}
    rows = {}
    for name, n in vectors.items():
        first = start.get(name)
        if first is not None:
            places = {part: _single_token(tokenizer, first) for part, tokenizer in sd.text.tokenizers.items()}
            rows[name] = torch.cat([table[places[part]] for part, table in tables.items()]).expand(n, -1)
        elif generator is None:
            raise ValueError(f"{name!r} has no word to start from: give one in start, or a torch.Generator for random vectors")
        else:
            noise = torch.randn(n, words_width(sd), generator=generator, device=generator.device).to(sd.device)
            mean, std = (torch.cat([statistic(table, dim=0) for table in tables.values()]) for statistic in (torch.mean, torch.std))
            rows[name] = mean + std * noise
    return NewTokens(rows)


def words_width(sd: StableDiffusion) -> int:
    """Return how many numbers a word's vector has: one of each text encoder's, side by side."""
    return sum(encoder.config.width for encoder in sd.text.encoders.values())


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
