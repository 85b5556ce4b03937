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
from copy import copy
from dataclasses import dataclass

import torch

from minidiff.conditioning import Conditioning, TextSide
from minidiff.config import ModelConfig, TextEncoderConfig, TokenizerConfig
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer

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


class TwoEncoders(TextSide):
    """Two tokenizers and text encoders. The second makes the pooled vector too.

    prompt_2: for the second encoder, in place of each prompt; negative prompts go to both. sizes: told to the U-Net with either.
    """

    prompt_2: str | None = None
    sizes = SizeNumbers()

    def __call__(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Encode prompts, one row each. size: width and height of the pictures in pixels. Raises ValueError without it."""
        return self._encode(prompts, [], size)

    def guided(
        self, prompts: Sequence[str], negative: str | None, size: tuple[int, int] | None = None
    ) -> tuple[Conditioning, Conditioning]:
        """Encode as TextSide does, a negative prompt by both encoders; for None its context and pooled vector are zeros, as in training."""
        rows = self._encode(prompts, [negative or ""], size)
        away = rows[-1:]
        if negative is None:
            context, pooled, sizes = away.tensors()
            away = Conditioning(torch.zeros_like(context), torch.zeros_like(pooled), sizes)
        return rows[:-1], away.expand(len(prompts))

    def _encode(self, prompts: Sequence[str], negatives: Sequence[str], size: tuple[int, int] | None) -> Conditioning:
        if size is None:
            raise ValueError("this model is told the size of the picture; give size=(width, height) in pixels")
        prompts_2 = prompts if self.prompt_2 is None else [self.prompt_2] * len(prompts)
        tokens, tokens_2 = self.tokens(FIRST, [*prompts, *negatives]), self.tokens(SECOND, [*prompts_2, *negatives])
        first, second = self.encoders[FIRST](tokens), self.encoders[SECOND](tokens_2)
        # The first end token of each row. The original takes the highest id, which may be a learned word's.
        pooled = self.encoders[SECOND].pool(second, (tokens_2 == self.tokenizers[SECOND].end_id).int().argmax(dim=1))
        sizes = torch.tensor([self.sizes.row(size)] * len(tokens), dtype=torch.float32, device=second.device)
        return Conditioning(torch.cat([first, second], dim=-1), pooled, sizes)


def told(text: TextSide, prompt_2: str | None = None, sizes: SizeNumbers = SizeNumbers()) -> TextSide:
    """Return a text side with another prompt for the second encoder, and other size numbers. Raises ValueError where there is none."""
    changed = copy(text)
    if isinstance(changed, TwoEncoders):
        changed.prompt_2, changed.sizes = prompt_2, sizes
    elif prompt_2 is not None or sizes != SizeNumbers():
        raise ValueError(f"second prompt {prompt_2!r}, {sizes}: this model has one text encoder and is told no sizes; leave both out")
    return changed


def text_configs(config: ModelConfig) -> dict[str, tuple[TokenizerConfig, TextEncoderConfig]]:
    """Return the numbers of a model's tokenizers and text encoders, by the names of its encoders."""
    pairs = {FIRST: (config.tokenizer, config.text_encoder)}
    return pairs if config.text_encoder_2 is None else pairs | {SECOND: (config.tokenizer_2, config.text_encoder_2)}


def text_side(config: ModelConfig, encoders: Mapping[str, TextEncoder]) -> TextSide:
    """Put a model's text encoders together with their tokenizers."""
    tokenizers = {name: Tokenizer(numbers) for name, (numbers, _) in text_configs(config).items()}
    for name, start in zip(tokenizers, (0, config.text_encoder.width)):
        encoders[name].added_from = start
    return (TwoEncoders if SECOND in tokenizers else TextSide)(tokenizers, dict(encoders))
