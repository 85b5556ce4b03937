"""The attentions that are measured: those that a U-Net has, and what is exact for them."""

import pytest
import torch

from minidiff.attention import attention
from minidiff.bench.attention_cases import KINDS, AttentionCase, exact, inputs, list_cases
from minidiff.blocks import TransformerBlock
from minidiff.config import SD1, SD2
from minidiff.unet import UNet
from tests.small_models import small_config

CPU = torch.device("cpu")


def case(tokens=20, keys=12, dtype="float32", **more):
    return AttentionCase("here", tokens, keys, heads=2, head_dim=8, calls=1, batch=2, dtype=dtype, **more)


def test_the_calls_are_those_that_a_unet_makes():
    config, seen = small_config(), []
    unet = UNet(config.unet)
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            for part in (block.self_attention, block.cross_attention):
                part.register_forward_hook(
                    lambda module, args, out, cross=part is block.cross_attention: seen.append((args[0].shape[1], cross, module.heads))
                )
    cells = config.image_size // config.vae.factor
    unet(torch.randn(2, 4, cells, cells), torch.tensor([1, 1]), torch.randn(2, 9, config.unet.context_width))
    asked = [
        (one.tokens, one.where.endswith("cross"), one.heads)
        for one in list_cases("small", config, config.image_size, 2, "float32")
        for _ in range(one.calls)
    ]
    assert sorted(asked) == sorted(seen)


def test_the_shapes_of_the_published_models_are_the_known_ones():
    found = {(c.tokens, c.keys, c.heads, c.head_dim): c.calls for c in list_cases("sd1", SD1, 512, 2, "bfloat16") if c.calls}
    levels = {(4096, 40): 5, (1024, 80): 5, (256, 160): 5, (64, 160): 1}
    assert found == {(n, keys, 8, d): calls for (n, d), calls in levels.items() for keys in (n, 77)}
    assert {(c.tokens, c.heads, c.head_dim) for c in list_cases("sd2", SD2, 768, 2, "bfloat16") if c.calls} == {
        (9216, 5, 64),
        (2304, 10, 64),
        (576, 20, 64),
        (144, 20, 64),
    }
    others = [c for c in list_cases("sd1", SD1, 512, 2, "bfloat16") if not c.calls]
    told = [(c.tokens, c.keys, c.head_dim, c.causal, c.backward) for c in others]
    assert told == [(77, 77, 64, True, True), (4096, 4096, 512, False, False)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_exact_is_what_attention_and_its_gradients_are_in_float64(kind, causal):
    one = case(keys=20, causal=causal)
    given = inputs(one, kind)
    q, k, v = (given[name].double().requires_grad_() for name in "qkv")
    out = attention(q, k, v, one.heads, causal)
    expected = [out, *torch.autograd.grad(out, (q, k, v), given["grad"].double())]
    for found, wanted in zip(exact(one, given, CPU).values(), expected, strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-9, atol=1e-9)  # float64 of values up to 100, in another order


def test_the_inputs_are_what_their_names_say():
    def logits(kind):
        given = inputs(case(), kind)
        q, k = (given[name][0, :, :8] for name in "qk")
        return q @ k.T / 8**0.5

    assert abs(logits("logits near 60").mean() - 60) < 6 and abs(logits("normal").mean()) < 1
    assert (logits("one dominant key").softmax(-1)[:, 6] > 0.99).all()
    assert logits("equal rows").std(dim=0).max() < 1e-5  # all queries the same
    assert abs(inputs(case(), "large mean")["v"].mean() - 100) < 1


def test_half_precision_is_compared_on_the_rounded_inputs():
    one = case(dtype="bfloat16", backward=False)
    given = inputs(one, "normal")
    rounded = {name: x.bfloat16().float() for name, x in given.items()}
    (found,) = exact(one, given, CPU).values()
    torch.testing.assert_close(found, exact(case(backward=False), rounded, CPU)["out"].float(), rtol=0, atol=0)
