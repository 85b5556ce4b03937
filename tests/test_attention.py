"""Attention in plain steps and fused: against each other, a closed form in plain loops, PyTorch's own module, and what must leave it unchanged."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from minidiff.attention import Attention, attention, attention_weights, naive_attention

BOTH = pytest.mark.parametrize("function", [naive_attention, attention])
CLOSE = dict(rtol=1e-12, atol=1e-12)  # float64: a few dozen roundings of 1e-16


def inputs(N=6, L=6, B=2, D=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, D, generator=generator, dtype=torch.float64) for n in (N, L, L)]


def in_loops(q, k, v, heads, causal):
    """softmax(q k^T / sqrt(d)) v, one number at a time."""
    B, N, D = q.shape
    d = D // heads
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(heads):
            channels = range(h * d, (h + 1) * d)
            for n in range(N):
                seen = range(n + 1) if causal else range(k.shape[1])
                scores = [math.exp(sum(q[b, n, c] * k[b, i, c] for c in channels) / math.sqrt(d)) for i in seen]
                for c in channels:
                    out[b, n, c] = sum(score * v[b, i, c] for score, i in zip(scores, seen)) / sum(scores)
    return out


@BOTH
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("N, L, causal", [(6, 6, False), (6, 6, True), (4, 7, False), (1, 1, False)])
def test_both_equal_the_closed_form(function, heads, N, L, causal):
    q, k, v = inputs(N, L)
    torch.testing.assert_close(function(q, k, v, heads, causal), in_loops(q, k, v, heads, causal), **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
def test_by_hand_and_fused_agree_in_float32_at_stable_diffusions_size(causal):
    q, k, v = (x.float() for x in inputs(N=256, L=256, D=320))
    # fp32 parity of a block
    torch.testing.assert_close(attention(q, k, v, 8, causal), naive_attention(q, k, v, 8, causal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_the_gradients_of_both_agree(causal):
    gradients = []
    for function in (naive_attention, attention):
        q, k, v = (x.requires_grad_() for x in inputs())
        function(q, k, v, 3, causal).sin().sum().backward()
        gradients.append([q.grad, k.grad, v.grad])
    for naive, fused in zip(*gradients):
        assert naive.abs().max() > 0.01
        torch.testing.assert_close(naive, fused, **CLOSE)


def test_the_gradients_are_those_of_finite_differences():
    q, k, v = (x.requires_grad_() for x in inputs(N=2, L=3, B=1, D=4))
    assert torch.autograd.gradcheck(lambda q, k, v: naive_attention(q, k, v, 2), (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_every_row_of_weights_is_a_distribution(causal):
    q, k, _ = inputs()
    weights = attention_weights(q, k, 3, causal)
    assert weights.shape == (2, 3, 6, 6) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 6, dtype=torch.float64), **CLOSE)
    assert (weights.triu(1) == 0).all() == causal


def test_rows_of_enormous_logits_are_still_distributions():
    q, k, _ = inputs()
    weights = attention_weights(1e4 * q.float(), 1e4 * k.float(), 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 6), rtol=0, atol=1e-6)  # fp32


@BOTH
def test_a_causal_query_does_not_see_later_keys(function):
    q, k, v = inputs()
    before = function(q, k, v, 3, True)
    k[:, 4:] += 1
    v[:, 4:] += 1
    after = function(q, k, v, 3, True)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).all()


@BOTH
def test_the_order_of_the_keys_does_not_matter(function):
    q, k, v = inputs(5, 7)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(function(q, k[:, order], v[:, order], 3), function(q, k, v, 3), **CLOSE)


@BOTH
def test_the_order_of_the_queries_is_the_order_of_the_answers(function):
    q, k, v = inputs(5, 7)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(function(q[:, order], k, v, 3), function(q, k, v, 3)[:, order], **CLOSE)


@BOTH
def test_a_row_of_the_batch_knows_nothing_of_the_others(function):
    q, k, v = inputs(B=3)
    torch.testing.assert_close(function(q[1:2], k[1:2], v[1:2], 3), function(q, k, v, 3)[1:2], **CLOSE)


@BOTH
def test_a_head_knows_nothing_of_the_others(function):
    q, k, v = inputs()
    torch.testing.assert_close(function(q[..., 4:8], k[..., 4:8], v[..., 4:8], 1), function(q, k, v, 3)[..., 4:8], **CLOSE)


@BOTH
def test_equal_keys_give_the_mean_of_the_values(function):
    q, k, v = inputs()
    torch.testing.assert_close(function(q, k[:, :1].expand_as(k), v, 3), v.mean(1, keepdim=True).expand_as(v), **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
def test_the_module_equals_pytorchs_own(causal):
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours = Attention(12, 3, bias=True).double()
    for i, layer in enumerate((ours.to_q, ours.to_k, ours.to_v)):
        layer.weight.data, layer.bias.data = theirs.in_proj_weight.data.chunk(3)[i], theirs.in_proj_bias.data.chunk(3)[i]
    ours.to_out.weight.data, ours.to_out.bias.data = theirs.out_proj.weight.data, theirs.out_proj.bias.data
    x = inputs()[0]
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64) if causal else None
    torch.testing.assert_close(ours(x, causal=causal), theirs(x, x, x, attn_mask=mask, need_weights=False)[0], **CLOSE)


def test_without_a_context_the_module_looks_at_x_itself():
    layer, x = Attention(12, 3).double(), inputs()[0]
    assert torch.equal(layer(x), layer(x, x))


def test_the_input_projections_have_a_bias_only_where_asked():
    layer = Attention(12, 3, context_width=20)
    assert layer.to_q.bias is layer.to_k.bias is layer.to_v.bias is None and layer.to_out.bias is not None
    assert layer.to_k.weight.shape == layer.to_v.weight.shape == (12, 20)
    assert Attention(12, 3, bias=True).to_q.bias is not None


def test_a_width_that_does_not_divide_into_the_heads_is_refused():
    q, k, v = inputs()
    with pytest.raises(Exception, match="can't divide axis of length 12 in chunks of 5"):
        attention(q, k, v, 5)


def test_keys_of_another_width_are_refused():
    q, k, v = inputs()
    with pytest.raises(TypeCheckError):
        attention_weights(q, k[..., :8], 2)
