"""The judge of the bundled scenes: a small CLIP with heads that say what is where in a picture.

    pixels -> PictureTower -> cells ---> subject and tint of each cell
                                |
                                `-----> pooled ---> background, style, features --.
                                                                                   contrastive_loss
    words  -> tokenizer -> TextEncoder -> the end token's vector ----> features --'

CLIP: Radford et al. 2021, "Learning transferable visual models from natural language supervision"; as there, the picture tower is
convolutions with attention pooling and the text tower a causal transformer read at its end token. The heads are this project's: they
turn "is that a fox?" into a number that does not depend on the wording of a caption. It was trained on composed scenes and knows
nothing else, so what it says of other pictures means nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiff.attention import Attention
from minidiff.blocks import ResBlock
from minidiff.config import TextEncoderConfig, TokenizerConfig
from minidiff.evaluation.alignment import check_size
from minidiff.evaluation.kid import scale_features
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer

GROUPS, EPS = 8, 1e-5  # of the picture tower's GroupNorms


@dataclass(frozen=True)
class JudgeConfig:
    """The judge's sizes, and the labels of its outputs in order.

    widths: channels of the picture tower's levels; the first level has half the picture's resolution, each further one half of that.
    blocks: ResBlocks per level. features: width of both towers' features.
    """

    tokenizer: TokenizerConfig
    text_encoder: TextEncoderConfig
    subjects: tuple[str, ...]
    colours: tuple[str, ...]
    styles: tuple[str, ...]
    widths: tuple[int, ...] = (16, 32, 64, 128)
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    heads: int = 4
    features: int = 128
    image_size: int = 128

    def __post_init__(self):
        if len(self.widths) != len(self.blocks):
            raise ValueError(f"JudgeConfig: {len(self.widths)} widths, {len(self.blocks)} blocks; give one of either a level")
        for width in self.widths:
            if width < 1 or width % GROUPS:
                raise ValueError(f"JudgeConfig: width {width}; expected a multiple of {GROUPS}, the groups of its GroupNorms")
        if self.widths[-1] % self.heads:
            raise ValueError(f"JudgeConfig: the last width {self.widths[-1]} does not divide into {self.heads} heads")
        if self.image_size % 2 ** len(self.widths):
            raise ValueError(f"JudgeConfig: {len(self.widths)} levels halve {self.image_size} pixels to no whole number of cells")

    @property
    def cells(self) -> int:
        """Return the cells per side of the feature map."""
        return self.image_size // 2 ** len(self.widths)


@dataclass(frozen=True, eq=False)
class JudgeOutput:
    """What the judge sees in B pictures, as log-probabilities and features.

    subjects: of each cell; the last one is "nothing". tints: of what is in a cell; the last one is "its own colours".
    features: of length sqrt(D), so that the mean product of two pictures' features is their cosine.
    """

    subjects: Float[Tensor, "B S h w"]
    tints: Float[Tensor, "B T h w"]
    backgrounds: Float[Tensor, "B C"]
    styles: Float[Tensor, "B K"]
    features: Float[Tensor, "B D"]

    def shares(self) -> Float[Tensor, "B known"]:
        """Return the share of the picture that each subject covers, 0..1: its probability averaged over the cells."""
        return self.subjects[:, :-1].exp().mean(dim=(2, 3))

    def centroids(self, subject: Int[Tensor, " B"]) -> Float[Tensor, "B 2"]:
        """Return the centre of one subject in each picture: (x, y) in 0..1, from the left and from the top."""
        weight = self._map(subject)
        weight = weight / weight.sum(dim=(1, 2), keepdim=True)
        h, w = weight.shape[1:]
        across = (torch.arange(w, device=weight.device) + 0.5) / w
        down = (torch.arange(h, device=weight.device) + 0.5) / h
        return torch.stack([(weight.sum(dim=1) * across).sum(dim=1), (weight.sum(dim=2) * down).sum(dim=1)], dim=1)

    def tint_of(self, subject: Int[Tensor, " B"] | None = None) -> Int[Tensor, " B"]:
        """Return the likeliest tint of one subject in each picture, over its cells; None takes whatever is there."""
        weight = -self.subjects[:, -1].expm1() if subject is None else self._map(subject)
        return (self.tints * weight[:, None]).sum(dim=(2, 3)).argmax(dim=1)

    def _map(self, subject: Int[Tensor, " B"]) -> Float[Tensor, "B h w"]:
        return self.subjects[torch.arange(len(subject), device=subject.device), subject].exp()


class AttentionPool(nn.Module):
    """The mean of all cells asks, the cells with their places answer (Radford et al. 2021, section 2.4, one query)."""

    def __init__(self, width: int, cells: int, heads: int):
        super().__init__()
        self.position = nn.Parameter(torch.randn(cells * cells, width) / math.sqrt(width))
        self.attention = Attention(width, heads, bias=True)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C"]:
        x = rearrange(x, "B C h w -> B (h w) C")
        mean = x.mean(dim=1, keepdim=True)
        return (mean + self.attention(mean, x + self.position))[:, 0]


class PictureTower(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] to a feature map (B, C, h, w) and its pooled vector (B, C)."""

    def __init__(self, config: JudgeConfig):
        super().__init__()
        layers, c_in = [], 3
        for width, blocks in zip(config.widths, config.blocks):
            layers.append(nn.Conv2d(c_in, width, 4, stride=2, padding=1))  # 4 wide: every pixel is seen equally often
            layers += [ResBlock(width, width, GROUPS, EPS) for _ in range(blocks)]
            c_in = width
        self.layers = nn.Sequential(*layers, nn.GroupNorm(GROUPS, c_in, eps=EPS), nn.SiLU())
        self.pool = AttentionPool(c_in, config.cells, config.heads)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C"]]:
        x = self.layers(pixels)
        return x, self.pool(x)


class Judge(nn.Module):
    """A CLIP with heads. Pixels are in [-1, 1] and of the config's size; texts are captions of any wording."""

    def __init__(self, config: JudgeConfig):
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.tokenizer = Tokenizer(config.tokenizer)
        width = config.widths[-1]
        self.pictures = PictureTower(config)
        self.texts = TextEncoder(config.text_encoder)
        self.picture_projection = nn.Linear(width, config.features, bias=False)
        self.text_projection = nn.Linear(config.text_encoder.width, config.features, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start: temperature 0.07
        self.subjects = nn.Conv2d(width, len(config.subjects) + 1, 1)
        self.tints = nn.Conv2d(width, len(config.colours) + 1, 1)
        self.backgrounds = nn.Linear(width, len(config.colours))
        self.styles = nn.Linear(width, len(config.styles))

    def read(self, pixels: Float[Tensor, "B 3 H W"]) -> JudgeOutput:
        """Say what is in each picture. Raises ValueError for pictures of another size."""
        check_size(pixels, self.image_size, "judge")
        cells, pooled = self.pictures(pixels.to(self.log_scale.device))
        return JudgeOutput(
            self.subjects(cells).float().log_softmax(dim=1),
            self.tints(cells).float().log_softmax(dim=1),
            self.backgrounds(pooled).float().log_softmax(dim=1),
            self.styles(pooled).float().log_softmax(dim=1),
            scale_features(self.picture_projection(pooled).float()),
        )

    def encode_pictures(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Encode pictures to features of length sqrt(D)."""
        return self.read(pixels).features

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Encode texts to features of length sqrt(D), to compare with those of pictures by their cosine."""
        return self.encode_tokens(self.tokenizer(list(texts)).to(self.log_scale.device))

    def encode_tokens(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Encode texts that are tokens already."""
        end = (tokens == self.tokenizer.end_id).int().argmax(dim=1)  # the first end token: the rest is padding
        context = self.texts(tokens)
        return scale_features(self.text_projection(context[torch.arange(len(tokens), device=tokens.device), end]).float())


def contrastive_loss(pictures: Float[Tensor, "B D"], texts: Float[Tensor, "B D"], log_scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the mean of two cross-entropies: which text belongs to each picture, and which picture to each text (CLIP, figure 3).

    Cosines are multiplied by exp(log_scale), at most 100.
    """
    cosines = F.normalize(pictures, dim=1) @ F.normalize(texts, dim=1).T
    logits = cosines * log_scale.exp().clamp(max=100)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
