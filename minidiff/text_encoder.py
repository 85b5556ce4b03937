"""The text encoder: a prompt's tokens to one vector per token, which the U-Net looks at by cross-attention.

    tokens -> token + position embeddings -> blocks of causal self-attention and MLP -> LayerNorm -> context
                                                                '-> context of SDXL -> last block -> LayerNorm -> end token -> pooled

It is the text half of CLIP (Radford et al. 2021, section 2.4). SD 1.x uses OpenAI's ViT-L/14 with its quick GELU and takes the last
block; SD 2.x uses OpenCLIP's ViT-H with the exact GELU and takes the last block but one. Both apply the final LayerNorm to what they
take. SDXL (Podell et al. 2023, section 2.1) uses ViT-L/14 and OpenCLIP's ViT-bigG, takes the last block but one of either, without that
LayerNorm, and of the second also the pooled vector, which CLIP compares with pictures.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiff.attention import Attention
from minidiff.config import TextEncoderConfig


def quick_gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Compute x sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with; up to 0.02 from the exact GELU."""
    return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    """Causal self-attention, then an MLP four times as wide; each on a LayerNorm of x and added to x."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        width = config.width
        self.activation = {"quick_gelu": quick_gelu, "gelu": F.gelu}[config.activation]
        self.norm_1 = nn.LayerNorm(width, eps=1e-5)
        self.attention = Attention(width, config.heads, bias=True)
        self.norm_2 = nn.LayerNorm(width, eps=1e-5)
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        x = x + self.attention(self.norm_1(x), causal=True)
        return x + self.linear_2(self.activation(self.linear_1(self.norm_2(x))))


class TextEncoder(nn.Module):
    """Tokens (B, L) to context (B, L, D). L is at most config.context_length; word n knows words 0..n.

    added: {first id: rows [n, D]}, the vectors of words that were learned later, for ids beyond the table. They belong to
    adapters/tokens.py; the table and the state_dict do not know them. Of two encoders each has its own columns, from added_from on.
    """

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width, eps=1e-5)
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None
        self.added: dict[int, Tensor] = {}
        self.added_from = 0

    def embed(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Look up each token's row, in the table or among the added words. Raises IndexError for an id of neither."""
        is_added = {first: (tokens >= first) & (tokens < first + len(rows)) for first, rows in self.added.items()}
        in_table = tokens
        for mask in is_added.values():
            in_table = in_table.masked_fill(mask, 0)  # any row: it is replaced below
        x = self.token_embedding(in_table)
        for first, rows in self.added.items():
            mask = is_added[first]
            own = rows[:, self.added_from : self.added_from + self.config.width]
            x = torch.where(mask[..., None], F.embedding((tokens - first).masked_fill(~mask, 0), own).to(x.dtype), x)
        return x

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        L = tokens.shape[1]
        if self.config.context_length < L:
            raise ValueError(f"{L} tokens given, the text encoder has {self.config.context_length} positions; cut the prompt")
        x = self.embed(tokens) + self.position_embedding.weight[:L]
        for block in self.blocks[:-1] if self.config.penultimate else self.blocks:
            x = block(x)
        return x if self.config.penultimate else self.norm_out(x)

    def pool(self, context: Float[Tensor, "B L D"], ends: Int[Tensor, "B"]) -> Float[Tensor, "B P"]:
        """Return one vector per prompt from a penultimate context: the last block's output at the end token, normed and projected."""
        assert self.projection is not None, "this encoder has no pooled vector"
        x = self.norm_out(self.blocks[-1](context))
        return self.projection(x[torch.arange(len(x), device=x.device), ends.to(x.device)])
