"""The text encoder's size, its causality and what it refuses. tests/parity holds it against transformers and open_clip."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import nn

from minidiff.config import SD1, SD2, TextEncoderConfig
from minidiff.text_encoder import TextEncoder, quick_gelu

SMALL = TextEncoderConfig(vocab_size=50, context_length=12, width=16, layers=2, heads=4)


def small(**changes) -> TextEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TextEncoder(replace(SMALL, **changes))


def tokens(B=2, L=12):
    return torch.randint(0, 50, (B, L), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "config, count",
    [
        (SD1.text_encoder, 123_060_480),  # counted in transformers' class
        (SD2.text_encoder, 340_387_840),  # the same, of the 23 blocks that diffusers' folders of SD 2 hold
    ],
    ids=["SD 1", "SD 2"],
)
def test_the_number_of_parameters_is_stable_diffusions(config, count):
    with torch.device("meta"):
        encoder = TextEncoder(config)
    assert sum(p.numel() for p in encoder.parameters()) == count


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_word_does_not_know_what_comes_after_it(activation):
    encoder, ids = small(activation=activation), tokens()
    before = encoder(ids)
    for n in range(12):
        changed = ids.clone()
        changed[:, n] = (changed[:, n] + 1) % 50
        after = encoder(changed)
        assert torch.equal(before[:, :n], after[:, :n])
        assert ((before[:, n:] - after[:, n:]).abs().amax(dim=-1) > 1e-6).all()


def test_a_shorter_prompt_is_the_beginning_of_a_longer_one():
    encoder, ids = small().double(), tokens()
    # float64; the shapes of the matrix products differ, and with them the order of additions
    torch.testing.assert_close(encoder(ids[:, :5]), encoder(ids)[:, :5], rtol=1e-12, atol=1e-12)


def test_a_row_of_the_batch_knows_nothing_of_the_others():
    encoder, ids = small().double(), tokens(B=3)
    torch.testing.assert_close(encoder(ids[1:2]), encoder(ids)[1:2], rtol=1e-12, atol=1e-12)


def test_the_same_word_differs_by_its_place():
    out = small()(torch.full((1, 12), 7))
    assert torch.pdist(out[0]).min() > 1e-3


def test_the_output_is_normalised_by_the_last_layer_norm():
    out = small().double()(tokens())
    zeros = torch.zeros(2, 12, dtype=torch.float64)
    torch.testing.assert_close(out.mean(-1), zeros, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.var(-1, unbiased=False), zeros + 1, rtol=0, atol=1e-3)  # eps takes a little


def test_a_gradient_reaches_every_parameter():
    encoder = small()
    (encoder(tokens()) * torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))).sum().backward()
    # But the keys' biases: they add the same to all logits of a row, which softmax does not see.
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in without if not name.endswith("to_k.bias")] == []


def test_quick_gelu_is_near_the_exact_gelu_but_not_the_same():
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    distance = (quick_gelu(x) - F.gelu(x)).abs().max()
    assert 0.019 < distance < 0.021
    torch.testing.assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)), rtol=1e-12, atol=1e-12)


def test_the_activation_is_the_configs():
    ids = tokens()
    quick, exact = small(activation="quick_gelu"), small(activation="gelu")
    assert all(torch.equal(a, b) for a, b in zip(quick.state_dict().values(), exact.state_dict().values(), strict=True))
    assert 1e-4 < (quick(ids) - exact(ids)).abs().max() < 0.2


def test_every_layer_norm_has_eps_1e_5():
    assert {m.eps for m in small().modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="13 tokens given, the text encoder has 12 positions; cut the prompt"):
        small()(tokens(L=13))


def test_tokens_that_are_no_integers_are_refused():
    with pytest.raises(TypeCheckError):
        small()(torch.zeros(1, 5))


def test_ids_beyond_the_table_take_added_rows_and_others_are_refused():
    encoder = small()
    rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    before, names = encoder.embed(tokens()), encoder.state_dict().keys()
    encoder.added = {50: rows}
    x = encoder.embed(torch.tensor([[1, 51, 2, 50]]))
    assert torch.equal(x[0, 1], rows[1]) and torch.equal(x[0, 3], rows[0]) and torch.equal(x[0, 0], encoder.token_embedding.weight[1])
    assert torch.equal(encoder.embed(tokens()), before) and encoder.state_dict().keys() == names
    with pytest.raises(IndexError):
        encoder(torch.tensor([[1, 52]]))
