"""Stable Diffusion XL's text side: two encoders, a pooled vector and the picture's sizes.

    prompt -+-> CLIP ViT-L/14 ----> (77, 768) --.
            |                                    side by side -> context (77, 2048) -> cross-attention
            '-> OpenCLIP ViT-bigG -> (77, 1280) -'
                        \\-> last block, end token -> pooled (1280) -.
    original, crop, target sizes -> six numbers ----------------------+-> added to the time embedding (blocks.AddedEmbedding)

Podell et al. 2023, "SDXL: improving latent diffusion models for high-resolution image synthesis", sections 2.1 and 2.2. All else that
makes SDXL differ from Stable Diffusion 1 is a number in config.SDXL. Left out: the refiner, which has the second encoder alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.conditioning import Conditioning, TextSide
from minidiff.config import ModelConfig, TextEncoderConfig, TokenizerConfig
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer
from minidiff.transfer import to_device

FIRST, SECOND = "text_encoder", "text_encoder_2"


@dataclass(frozen=True)
class SizeNumbers:
    """What SDXL is told of a picture, in pixels; None is the picture's own size (Podell et al. 2023, section 2.2).

    original: width and height before it was scaled. crop: pixels cut off left and top. target: width and height of the result.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None

    def row(self, size: tuple[int, int]) -> list[int]:
        """Return the numbers for a picture of this width and height, in the order of training: heights and top come first."""
        return [number for pair in (self.original or size, self.crop, self.target or size) for number in reversed(pair)]


@dataclass(eq=False)
class TwoEncoders(TextSide):
    """Two tokenizers and text encoders. The second makes the pooled vector too. `dataclasses.replace` tells it something else.

    prompt_2: for the second encoder, in place of each prompt; negative prompts go to both. sizes: told to the U-Net with either.
    zero_negative: whether no negative prompt means zeros, as in training, or the empty prompt.
    """

    prompt_2: str | None = None
    sizes: SizeNumbers = SizeNumbers()
    zero_negative: bool = True

    def __call__(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Encode prompts, one row each. size: width and height of the pictures in pixels. Raises ValueError without it."""
        return self._conditioning(prompts, [], size)

    def guided(
        self, prompts: Sequence[str], negative: str | None, size: tuple[int, int] | None = None
    ) -> tuple[Conditioning, Conditioning]:
        """Encode as TextSide does, a negative prompt by both encoders; for None context and pooled vector may be zeros."""
        rows = self._conditioning(prompts, [negative or ""], size)
        away = rows[-1:]
        if negative is None and self.zero_negative:
            away = away.with_tensors([x if x is away.size else torch.zeros_like(x) for x in away.tensors()])
        return rows[:-1], away.expand(len(prompts))

    def _conditioning(self, prompts: Sequence[str], negatives: Sequence[str], size: tuple[int, int] | None) -> Conditioning:
        if size is None:
            raise ValueError("this model is told the size of the picture; give size=(width, height) in pixels")
        prompts_2 = prompts if self.prompt_2 is None else [self.prompt_2] * len(prompts)
        context, pooled = self.encode([*prompts, *negatives], [*prompts_2, *negatives])
        return Conditioning(context, pooled, to_device(context.device, torch.tensor([self.sizes.row(size)] * len(context)).float()))

    def encode(self, texts: Sequence[str], texts_2: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return context (R, L, D) and pooled vectors (R, P) of what each encoder is to read."""
        tokens, tokens_2 = self.tokens(FIRST, texts), self.tokens(SECOND, texts_2)
        first, second = self.encoders[FIRST](tokens), self.encoders[SECOND](tokens_2)
        # The first end token of each row. The original takes the highest id, which may be a learned word's.
        pooled = self.encoders[SECOND].pool(second, (tokens_2 == self.tokenizers[SECOND].end_id).int().argmax(dim=1))
        return torch.cat([first, second], dim=-1), pooled


def text_configs(config: ModelConfig) -> dict[str, tuple[TokenizerConfig, TextEncoderConfig]]:
    """Return the numbers of a model's tokenizers and text encoders, by the names of its encoders."""
    pairs = {FIRST: (config.tokenizer, config.text_encoder)}
    return pairs if config.text_encoder_2 is None else pairs | {SECOND: (config.tokenizer_2, config.text_encoder_2)}


def text_side(config: ModelConfig, encoders: Mapping[str, TextEncoder]) -> TextSide:
    """Put a model's text encoders together with their tokenizers."""
    tokenizers = {name: Tokenizer(numbers) for name, (numbers, _) in text_configs(config).items()}
    for name, start in zip(tokenizers, (0, config.text_encoder.width)):
        encoders[name].added_from = start
    if SECOND in tokenizers:
        return TwoEncoders(tokenizers, dict(encoders), zero_negative=config.zero_negative)
    return TextSide(tokenizers, dict(encoders))
