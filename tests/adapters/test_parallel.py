import copy

import pytest
import torch

from minidiff.adapters.layers import modules_of
from minidiff.adapters.lora import create_lora
from minidiff.adapters.parallel import ADAPTER_METHODS, LAYER_PATTERNS, AdapterSet, BottleneckAdapter, create_adapters
from minidiff.attention import Attention, attention_weights, naive_attention
from minidiff.attention_maps import with_attention_maps, word_map
from minidiff.blocks import FeedForward
from minidiff.trainers.engine.gradient_checkpointing import with_checkpointing
from tests.small_models import small_model

BOTH = LAYER_PATTERNS["attention"] + LAYER_PATTERNS["feed_forward"]
WHERE = dict.fromkeys(ADAPTER_METHODS, BOTH) | {"multi_head_parallel": LAYER_PATTERNS["attention"], "prefix": LAYER_PATTERNS["attention"]}
CROSS = "unet.middle.transformer.blocks.0.cross_attention"


@pytest.fixture(scope="module")
def sd():
    sd = small_model()
    sd.unet.requires_grad_(False)
    return sd


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def new(sd, method, patterns=None, rank=3):
    return create_adapters(sd, patterns or WHERE[method], method=method, rank=rank, generator=generator())


def learned(sd, method, patterns=None, rank=3, size=0.3):
    """With every weight moved, the zeros too."""
    adapters, draw = new(sd, method, patterns, rank), generator(1)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(size * torch.randn(p.shape, generator=draw))
    return adapters


def answer(sd):
    x, context = torch.randn(2, 4, 8, 8, generator=generator()), torch.randn(2, 7, 16, generator=generator())
    return sd.unet(x.to(sd.dtype), torch.tensor([3, 700]), context.to(sd.dtype))


def inputs(layer):
    """x, context and q, k, v of a cross-attention of the small model."""
    x, context = torch.randn(2, 5, layer.to_q.in_features, generator=generator(2)), torch.randn(2, 7, 16, generator=generator(3))
    return x, context, (layer.to_q(x), layer.to_k(context), layer.to_v(context))


def bottleneck(small, x):
    """relu(x W_down + b) W_up + b in plain steps."""
    return (x @ small.down.weight.T + small.down.bias).clamp(min=0) @ small.up.weight.T + small.up.bias


# ------------------------------------------------------------------------------------------------ table 1, row by row


def test_prefix_tuning_is_attention_over_the_concatenated_keys_and_values(sd):
    layer, adapters = modules_of(sd, (Attention,))[CROSS], learned(sd, "prefix", (CROSS,))
    x, context, (q, k, v) = inputs(layer)
    prefix = adapters.layers[CROSS]
    # in front, as in the paper; where they stand makes no difference
    keys, values = (torch.cat([rows.expand(2, -1, -1), own], dim=1) for rows, own in ((prefix.keys, k), (prefix.values, v)))
    wanted = layer.to_out(naive_attention(q, keys, values, layer.heads))
    adapters.attach(sd)
    result = layer(x, context)
    adapters.detach()
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)  # fp32 parity of one layer


def test_prefix_tuning_mixes_the_heads_with_attention_to_the_prefix(sd):
    """He et al. eq. 7: (1 - lambda) attention(q, K, V) + lambda attention(q, P_k, P_v), head by head."""
    layer, adapters = modules_of(sd, (Attention,))[CROSS], learned(sd, "prefix", (CROSS,))
    x, context, (q, k, v) = inputs(layer)
    keys, values = (rows.expand(2, -1, -1) for rows in (adapters.layers[CROSS].keys, adapters.layers[CROSS].values))
    share = attention_weights(q, torch.cat([k, keys], dim=1), layer.heads)[..., k.shape[1] :].sum(-1)  # lambda: B h N
    share = share.transpose(1, 2).repeat_interleave(q.shape[-1] // layer.heads, dim=-1)
    assert 0.1 < share.mean() < 0.9
    heads = (1 - share) * naive_attention(q, k, v, layer.heads) + share * naive_attention(q, keys, values, layer.heads)
    adapters.attach(sd)
    result = layer(x, context)
    adapters.detach()
    torch.testing.assert_close(result, layer.to_out(heads), rtol=1e-4, atol=1e-5)  # fp32 parity of one layer


@pytest.mark.parametrize("method, scale, reads_output", [("adapter", 1, True), ("parallel", 1, False), ("scaled_parallel", 4, False)])
@pytest.mark.parametrize(
    "name", [CROSS, "unet.middle.transformer.blocks.0.self_attention", "unet.middle.transformer.blocks.0.feed_forward"]
)
def test_a_bottleneck_behind_or_beside_a_layer_is_the_closed_form(method, scale, reads_output, name, sd):
    layer, adapters = modules_of(sd, (Attention, FeedForward))[name], learned(sd, method, (f"^{name}$",))
    x = torch.randn(2, 5, 32, generator=generator(2))
    args = (x, torch.randn(2, 7, 16, generator=generator(3))) if name == CROSS else (x,)
    h = layer(*args)
    adapters.attach(sd)
    result = layer(*args)
    adapters.detach()
    wanted = h + scale * bottleneck(adapters.layers[name], h if reads_output else x)
    assert (wanted - h).abs().max() > 0.1
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)  # fp32 parity of one layer


def test_the_multi_head_one_adds_to_each_head_before_to_out(sd):
    layer, adapters = modules_of(sd, (Attention,))[CROSS], learned(sd, "multi_head_parallel", (CROSS,))
    x, context, (q, k, v) = inputs(layer)
    small, heads, rank = adapters.layers[CROSS], naive_attention(q, k, v, layer.heads), 3
    added = []
    for i in range(layer.heads):
        rows = slice(i * rank, (i + 1) * rank)
        added.append((x @ small.down.weight[rows].T + small.down.bias[rows]).clamp(min=0) @ small.up[i])
    adapters.attach(sd)
    result = layer(x, context)
    adapters.detach()
    torch.testing.assert_close(result, layer.to_out(heads + torch.cat(added, dim=-1)), rtol=1e-4, atol=1e-5)  # fp32 parity of one layer


# --------------------------------------------------------------------------------------------------- what holds for all


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_all_but_prefixes_change_nothing_at_the_start(method, sd):
    before, adapters = answer(sd), new(sd, method)
    adapters.attach(sd)
    after = answer(sd)
    adapters.detach()
    assert torch.equal(after, before) == (method != "prefix")


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_detaching_is_exact_and_the_model_keeps_its_names(method, sd):
    before, names = answer(sd), list(sd.unet.state_dict())
    adapters = learned(sd, method)
    for _ in range(2):
        adapters.attach(sd)
        assert (answer(sd) - before).abs().max() > 0.01
        assert list(sd.unet.state_dict()) == names
        adapters.detach()
        assert torch.equal(answer(sd), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sd.unet.modules())


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_gradient_flows_to_every_weight_and_checkpointing_does_not_change_it(method, sd):
    adapters, gradients = learned(sd, method, rank=8), []  # of fewer units all may be below zero
    adapters.attach(sd)
    for on in (False, True):
        with with_checkpointing([sd.unet], on):
            gradients.append(torch.autograd.grad(answer(sd).square().mean(), list(adapters.parameters())))
    adapters.detach()
    assert all(torch.equal(one, other) for one, other in zip(*gradients))
    for (name, _), gradient in zip(adapters.named_parameters(), gradients[0]):
        assert gradient.isfinite().all() and gradient.any(), name


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_the_first_gradient_reaches_what_starts_at_zero(method, sd):
    adapters = new(sd, method)
    adapters.attach(sd)
    answer(sd).square().mean().backward()
    adapters.detach()
    ups = [p.grad for name, p in adapters.named_parameters() if "down" not in name]
    assert all(gradient.any() for gradient in ups)


@pytest.mark.parametrize("method", ADAPTER_METHODS)
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_half_precision_stays_and_the_adapters_are_float32(method, how):
    sd = small_model()
    adapters = learned(sd, method, size=0.1)
    adapters.attach(sd)
    exact = answer(sd)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            half = answer(sd)
    else:
        sd.unet.to(getattr(torch, how))
        half = answer(sd)
    assert half.dtype == (torch.float16 if how == "float16" else torch.bfloat16)
    half.float().square().mean().backward()
    adapters.detach()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapters.parameters())
    # bf16 keeps 8 bits, fp16 11; some twenty layers one after the other.
    assert (half.float() - exact).norm() / exact.norm() < (0.005 if how == "float16" else 0.04)


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_pictures_with_guidance_and_attention_maps(method, sd):
    def last(change=lambda steps: steps):
        *_, step = change(sd.denoise("a cat", steps=2, guidance_scale=3.0, seeds=[0, 1]))
        return step

    before, adapters = last().x_t, learned(sd, method)
    adapters.attach(sd)
    live, recorded = last().x_t, last(lambda steps: with_attention_maps(steps, sd.unet))
    adapters.detach()
    assert torch.equal(recorded.x_t, live), "recording runs some layers twice"
    assert word_map(recorded.attention_maps, [1], (8, 8)).shape == (2, 8, 8)
    assert torch.equal(last().x_t, before)
    assert (live - before).abs().max() > 1e-3


def test_they_go_together_with_a_lora_and_with_each_other(sd):
    before = answer(sd)
    lora = create_lora(sd, (r"attention\.to_",), rank=2, alpha=2.0, generator=generator())
    several = [lora, *(learned(sd, method) for method in ADAPTER_METHODS)]  # prefixes last
    for one in several:
        one.attach(sd)
    together = answer(sd)
    for one in several:
        one.detach()
    assert together.isfinite().all() and torch.equal(answer(sd), before)


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_a_deep_copy_of_a_model_has_a_copy_of_them_on_it(method, sd):
    adapters = learned(sd, method)
    adapters.attach(sd)
    live, copied = answer(sd), copy.deepcopy(sd)
    with torch.no_grad():
        for p in adapters.parameters():
            p.zero_()
    changed = answer(sd)
    adapters.detach()
    assert torch.equal(answer(copied), live) and not torch.equal(changed, live)


def test_a_state_dict_goes_into_others_of_the_same_layers(sd):
    for method in ADAPTER_METHODS:
        one, other = learned(sd, method), new(sd, method)
        other.load_state_dict(one.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"method": "lora"}, "method 'lora' unknown; choose adapter, parallel"),
        ({"rank": 0}, "rank 0"),
        ({"scale": 2.0}, "scale 2.0 has no meaning for 'adapter'"),
        ({"method": "prefix"}, "'prefix' changes the heads of an attention, and unet.*feed_forward has none"),
        ({"method": "multi_head_parallel"}, "'multi_head_parallel' changes the heads"),
        ({"patterns": ("feed_foward$",)}, "'feed_foward.' matches no layer; near are .*feed_forward"),
        ({"patterns": ("text_encoder",)}, "'text_encoder' matches no layer"),
    ],
)
def test_what_cannot_be_is_named(changed, message, sd):
    given = {"patterns": BOTH, "method": "adapter", "rank": 2, "generator": generator()} | changed
    with pytest.raises(ValueError, match=message):
        create_adapters(sd, **given)


def test_a_lora_that_comes_after_a_prefix_says_so(sd):
    prefix = new(sd, "prefix", (CROSS,))
    lora = create_lora(sd, (CROSS + r"\.to_k",), rank=2, alpha=2.0, generator=generator())
    prefix.attach(sd)
    before = answer(sd)
    with pytest.raises(ValueError, match="this LoRA adds to .* that these adapters .* as prefix tuning does; attach this LoRA before"):
        lora.attach(sd)
    assert sd.attached == [prefix] and not lora.attached and torch.equal(answer(sd), before)
    prefix.detach()


def test_twice_or_on_another_model_is_an_error(sd):
    adapters = new(sd, "adapter")
    adapters.attach(sd)
    with pytest.raises(ValueError, match="attached already"):
        adapters.attach(sd)
    adapters.detach()
    with pytest.raises(ValueError, match="which has no unet.middle.x"):
        AdapterSet({"unet.middle.x": BottleneckAdapter(4, 2, generator())}).attach(sd)
