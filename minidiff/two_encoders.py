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

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minidiff.conditioning import Conditioning, SizeNumbers, TextSide
from minidiff.config import ModelConfig, TextEncoderConfig, TokenizerConfig
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer

FIRST, SECOND = "text_encoder", "text_encoder_2"


class TwoEncoders(TextSide):
    """Two tokenizers and text encoders. The second makes the pooled vector too.

    prompt_2: for the second encoder, in place of each prompt; negative prompts go to both. sizes: told to the U-Net, the same with and
    without the prompt.
    """

    def __init__(self, tokenizers: tuple[Tokenizer, Tokenizer], encoders: tuple[TextEncoder, TextEncoder]):
        super().__init__(tokenizers[0], encoders[0])
        self.tokenizers[SECOND], self.encoders[SECOND] = tokenizers[1], encoders[1]
        self.prompt_2: str | None = None
        self.sizes = SizeNumbers()

    def __call__(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Encode prompts, one row each. size: width and height of the pictures in pixels. Raises ValueError without it."""
        return self._encode(prompts, prompts if self.prompt_2 is None else [self.prompt_2] * len(prompts), size)

    def negative(self, prompt: str | None, size: tuple[int, int] | None = None) -> Conditioning:
        """Encode a negative prompt by both encoders, one row; for None context and pooled vector are zeros, as SDXL was trained."""
        encoded = self._encode([prompt or ""], [prompt or ""], size)
        if prompt is not None:
            return encoded
        assert encoded.pooled is not None
        return Conditioning(torch.zeros_like(encoded.context), torch.zeros_like(encoded.pooled), encoded.size)

    def told(self, prompt_2: str | None = None, sizes: SizeNumbers = SizeNumbers()) -> "TwoEncoders":
        """Return the same text side with another prompt for the second encoder, and other size numbers."""
        changed = copy(self)
        changed.prompt_2, changed.sizes = prompt_2, sizes
        return changed

    def _encode(self, prompts: Sequence[str], prompts_2: Sequence[str], size: tuple[int, int] | None) -> Conditioning:
        if size is None:
            raise ValueError("this model is told the size of the picture; give size=(width, height) in pixels")
        first, second = self.context(FIRST, prompts), self.context(SECOND, prompts_2)
        tokenizer = self.tokenizers[SECOND]
        pooled = self.encoders[SECOND].pool(second, first_ends(tokenizer(list(prompts_2)), tokenizer.end_id).to(second.device))
        sizes = torch.tensor([self.sizes.row(size)] * len(prompts), dtype=torch.float32, device=second.device)
        return Conditioning(torch.cat([first, second], dim=-1), pooled, sizes)


def first_ends(tokens: Int[Tensor, "B L"], end_id: int) -> Int[Tensor, "B"]:
    """Return where each row has its first end token. The original takes the highest id, which a learned word has."""
    return (tokens == end_id).int().argmax(dim=1)


def text_configs(config: ModelConfig) -> dict[str, tuple[TokenizerConfig, TextEncoderConfig]]:
    """Return the numbers of a model's tokenizers and text encoders, by the names of its encoders."""
    pairs = {FIRST: (config.tokenizer, config.text_encoder)}
    if config.tokenizer_2 is not None and config.text_encoder_2 is not None:
        pairs[SECOND] = config.tokenizer_2, config.text_encoder_2
    return pairs


def text_side(config: ModelConfig, encoders: Mapping[str, TextEncoder]) -> TextSide:
    """Put a model's text encoders together with their tokenizers."""
    tokenizers = {name: Tokenizer(numbers) for name, (numbers, _) in text_configs(config).items()}
    if SECOND not in tokenizers:
        return TextSide(tokenizers[FIRST], encoders[FIRST])
    return TwoEncoders((tokenizers[FIRST], tokenizers[SECOND]), (encoders[FIRST], encoders[SECOND]))
