"""What SDXL and a ControlNet tell the U-Net, against diffusers: added embedding, transformer depths, residuals."""

import re

import diffusers
import pytest
import torch

from minidiff.conditioning import Conditioning
from minidiff.config import UNetConfig
from minidiff.unet import UNet
from tests.parity.models import randomise
from tests.parity.parts import noise

# Three levels of SDXL's kind: none, some and more transformer blocks; its heads are 64 wide.
SDXL = UNetConfig(
    widths=(32, 64, 128), attention=(0, 2, 3), heads=(2, 4, 8), context_width=40, linear_projection=True, pooled_width=24, groups=8
)
TO_DIFFUSERS = (
    (r"^(down|up)\.", r"\1_blocks."),
    (r"^middle\.block_1", "mid_block.resnets.0"),
    (r"^middle\.block_2", "mid_block.resnets.1"),
    (r"^middle\.transformer", "mid_block.attentions.0"),
    (r"^(\w+_blocks\.\d)\.blocks\.", r"\1.resnets."),
    (r"\.transformers\.", ".attentions."),
    (r"(attentions\.\d)\.blocks\.", r"\1.transformer_blocks."),
    (r"\.(down|up)sample\.", r".\1samplers.0.conv."),
    (r"norm_(\d)", r"norm\1"),
    (r"\bconv_(\d)", r"conv\1"),
    (r"time_projection", "time_emb_proj"),
    (r"\bskip\b", "conv_shortcut"),
    (r"self_attention", "attn1"),
    (r"cross_attention", "attn2"),
    (r"to_out", "to_out.0"),
    (r"feed_forward\.proj_in", "ff.net.0.proj"),
    (r"feed_forward\.proj_out", "ff.net.2"),
    (r"^norm_out", "conv_norm_out"),
    (r"^added_embedding", "add_embedding"),
)


def to_diffusers(name: str) -> str:
    for pattern, replacement in TO_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture(scope="module")
def pair() -> tuple[UNet, diffusers.UNet2DConditionModel]:
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=SDXL.widths,
        layers_per_block=SDXL.blocks_per_level,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),  # the first level has no transformer to count
        attention_head_dim=SDXL.heads,  # its name notwithstanding, the number of heads
        cross_attention_dim=SDXL.context_width,
        use_linear_projection=True,
        norm_num_groups=SDXL.groups,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=24 + 6 * 256,
    )
    theirs = randomise(theirs.double())
    ours = UNet(SDXL).double().requires_grad_(False)
    weights = theirs.state_dict()
    assert {to_diffusers(name) for name in ours.state_dict()} == set(weights)
    ours.load_state_dict({name: weights[to_diffusers(name)] for name in ours.state_dict()})
    return ours, theirs


def inputs() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    size = torch.tensor([[1024.0, 768.0, 0.0, 16.0, 1024.0, 1024.0], [512.0, 512.0, 8.0, 0.0, 1024.0, 1024.0]])
    double = {"dtype": torch.float64}
    conditioning = Conditioning(noise(2, 7, 40, **double), noise(2, 24, **double), size)
    return noise(2, 4, 9, 10, **double), torch.tensor([1, 999]), conditioning


def predict(theirs: diffusers.UNet2DConditionModel, x, t, told: Conditioning) -> torch.Tensor:
    *skips, middle = told.residuals or (None,)
    residuals = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle} if skips else {}
    added = {"text_embeds": told.pooled, "time_ids": told.size}
    return theirs(x, t, encoder_hidden_states=told.context, added_cond_kwargs=added, **residuals).sample


def test_an_unet_of_sdxls_kind_predicts_as_diffusers_does(pair):
    ours, theirs = pair
    x, t, told = inputs()
    # Float64, but for the cosines and sines, which are float32 on both sides and equal to the bit.
    torch.testing.assert_close(ours(x, t, told), predict(theirs, x, t, told), rtol=1e-9, atol=1e-9)


def test_residuals_are_added_where_diffusers_adds_a_controlnets(pair):
    ours, theirs = pair
    x, t, told = inputs()
    skips, middle, _ = ours.encode(x, t, told)
    residuals = tuple(0.5 * noise(*tensor.shape, dtype=torch.float64) for tensor in (*skips, middle))
    controlled = Conditioning(told.context, told.pooled, told.size, residuals)
    answer = ours(x, t, controlled)
    torch.testing.assert_close(answer, predict(theirs, x, t, controlled), rtol=1e-9, atol=1e-9)
    assert (answer - ours(x, t, told)).abs().max() > 0.1
