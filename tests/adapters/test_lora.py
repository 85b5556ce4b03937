import copy
import math
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from minidiff.adapters.custom_diffusion import create_custom_diffusion
from minidiff.adapters.layers import choose, layers_of
from minidiff.adapters.lora import PATTERNS, LoRA, create_lora, merge_lora
from minidiff.adapters.low_rank import LowRank
from minidiff.config import SD1
from minidiff.pipeline import StableDiffusion
from minidiff.text_encoder import TextEncoder
from minidiff.unet import UNet
from tests.adapters.learned_lora import ALL, KEYS, generator, random_lora
from tests.small_models import small_model, wider_config


@pytest.fixture(scope="module")
def sd():
    return small_model()


def answers(sd):
    """The text encoder's and, for a context that does not depend on it, the U-Net's."""
    x, context = torch.randn(2, 4, 8, 8, generator=generator()), torch.randn(2, 7, 16, generator=generator())
    tokens = torch.tensor([[1, 5, 9, 2]])
    return sd.text_encoder(tokens), sd.unet(x.to(sd.dtype), torch.tensor([3, 700]), context.to(sd.dtype))


def assert_equal(a, b):
    assert all(torch.equal(one, other) for one, other in zip(a, b))


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    for one, other in zip(a, b):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


# -------------------------------------------------------------------------------------------- against peft and closed form

LAYERS = {
    "linear": (nn.Linear(6, 10), (2, 5, 6)),
    "conv 3x3": (nn.Conv2d(6, 10, 3, padding=1), (2, 6, 8, 8)),
    "conv 3x3 stride 2": (nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 9, 9)),
    "conv 1x1": (nn.Conv2d(6, 10, 1), (2, 6, 8, 8)),
}


class OneLayer(StableDiffusion):
    """As much of a StableDiffusion as adapters look at: its U-Net is one layer."""

    device, text_encoder = torch.device("cpu"), nn.Sequential()

    def __init__(self, layer):
        self.unet, self.attached = nn.Sequential(copy.deepcopy(layer)), []


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_with_lora_gives_what_it_gives_in_peft(kind):
    layer, shape = LAYERS[kind]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    tuner = theirs.base_model.model[0]
    down, up = tuner.lora_A["default"].weight.detach().clone(), tuner.lora_B["default"].weight.detach().clone()
    lora, x = LoRA({"unet.0": LowRank(down, up, alpha=5)}), torch.randn(shape, generator=generator(), requires_grad=True)
    model = OneLayer(layer)
    lora.attach(model)
    with torch.no_grad():
        assert (theirs(x) - layer(x)).abs().max() > 0.1, "a change that is too small to see"
    # fp32 parity of one layer
    torch.testing.assert_close(model.unet(x), theirs(x), rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(net(x).square().sum(), [*weights, x])
        for net, weights in [
            (model.unet, [lora.layers["unet.0"].down.weight, lora.layers["unet.0"].up.weight]),
            (theirs, [tuner.lora_A["default"].weight, tuner.lora_B["default"].weight]),
        ]
    ]
    for ours, other in zip(*gradients):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)  # sums of up to 200 products, of values around 10
    # one product in fp32
    torch.testing.assert_close(lora.layers["unet.0"].delta(), tuner.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


def test_the_attached_model_is_the_one_with_w0_plus_the_product_in_its_weights(sd):
    lora, naive = random_lora(sd), small_model()
    with torch.no_grad():
        for name, low in lora.layers.items():
            product = torch.einsum("or,ri...->oi...", low.up.weight.flatten(1), low.down.weight)
            layers_of(naive)[name].weight += 2.0 / 3 * product
    lora.attach(sd)
    try:
        assert_close(answers(sd), answers(naive))  # fp32, a whole network of small widths
    finally:
        lora.detach()


# --------------------------------------------------------------------------------------------- on and off, live and merged


def test_a_new_lora_changes_nothing_and_learns(sd):
    before = answers(sd)
    lora = create_lora(sd, ALL, rank=2, alpha=1.0, dropout=0.1, generator=generator())
    lora.attach(sd)
    try:
        assert_equal(answers(sd), before)
        sum(answer.square().sum() for answer in answers(sd)).backward()
        # The first step moves up alone: down's gradient goes through up, which is zero.
        assert all(low.up.weight.grad.abs().max() > 0 for low in lora.layers.values())
    finally:
        lora.detach()
        sd.unet.zero_grad(), sd.text_encoder.zero_grad()


def test_live_and_merged_are_equal_and_each_is_taken_back_bit_for_bit(sd):
    weights = {name: layer.weight.detach().clone() for name, layer in layers_of(sd).items()}
    names, before = list(sd.unet.state_dict()), answers(sd)
    lora = random_lora(sd)
    lora.weight = 0.7
    lora.attach(sd)
    live = answers(sd)
    lora.detach()
    assert_equal(answers(sd), before)
    undo = merge_lora(sd, lora)
    merged = answers(sd)
    assert list(sd.unet.state_dict()) == names
    undo()
    assert_equal(answers(sd), before)
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in layers_of(sd).items())
    assert_close(live, merged)  # fp32
    assert (live[1] - before[1]).abs().max() > 0.1


def test_several_add_up_with_their_weights(sd):
    a, b = random_lora(sd, seed=1), random_lora(sd, KEYS, rank=5, alpha=1.0, seed=3)
    a.weight, b.weight = 0.5, -0.8
    before = answers(sd)
    a.attach(sd), b.attach(sd)
    both = answers(sd)
    a.detach()
    only_b = answers(sd)
    b.detach()
    assert_equal(answers(sd), before)
    undo_a, undo_b = merge_lora(sd, a), merge_lora(sd, b)
    assert_close(both, answers(sd))  # fp32
    undo_b(), undo_a()
    assert_equal(answers(sd), before)
    undo_b = merge_lora(sd, b)
    assert_close(only_b, answers(sd))
    undo_b()


def test_a_weight_may_be_changed_while_attached(sd):
    before, lora = answers(sd), random_lora(sd)
    lora.attach(sd)
    lora.weight = 0.0
    assert_equal(answers(sd), before)
    lora.weight = 1.0
    assert (answers(sd)[1] - before[1]).abs().max() > 0.1
    lora.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_stays_one_and_the_lora_float32(dtype):
    sd, lora = small_model(), random_lora(small_model(), size=0.02)
    lora.attach(sd)
    exact = answers(sd)
    lora.detach()
    sd.unet.to(dtype), sd.text_encoder.to(dtype)
    before = answers(sd)
    lora.attach(sd)
    half = answers(sd)
    sum(answer.float().square().mean() for answer in half).backward()
    lora.detach()
    assert_equal(answers(sd), before)
    assert all(answer.dtype == dtype for answer in half)
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in lora.parameters())
    for one, other in zip(half, exact):
        # bf16 keeps 8 bits, fp16 11; some twenty layers one after the other.
        assert (one.float() - other).norm() / other.norm() < {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]


def test_under_autocast_too(sd):
    lora = random_lora(sd, size=0.02)
    lora.attach(sd)
    exact = answers(sd)
    with torch.autocast("cpu", torch.bfloat16):
        cast = answers(sd)
    sum(answer.float().square().mean() for answer in cast).backward()
    lora.detach()
    sd.unet.zero_grad(), sd.text_encoder.zero_grad()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in lora.parameters())
    for one, other in zip(cast, exact):
        assert (one.float() - other).norm() / other.norm() < 0.03  # bf16 keeps 8 bits, some twenty layers


def test_pictures_are_the_same_live_and_merged_with_guidance(sd):
    def latents():
        *_, last = sd.denoise("a cat", steps=2, guidance_scale=3.0, seeds=[0, 1])
        return last.x_t

    before, lora = latents(), random_lora(sd, PATTERNS["attention"] + PATTERNS["text_encoder"])
    lora.attach(sd)
    live = latents()
    lora.detach()
    undo = merge_lora(sd, lora)
    merged = latents()
    undo()
    assert torch.equal(latents(), before)
    assert (live - before).abs().max() > 0.01
    torch.testing.assert_close(live, merged, rtol=1e-3, atol=1e-4)  # two steps, guidance multiplies the rounding by 3


def test_a_deep_copy_of_a_model_has_a_copy_of_the_lora_on_it(sd):
    lora = random_lora(sd)
    lora.attach(sd)
    live, copied = answers(sd), copy.deepcopy(sd)
    lora.weight = 0.0
    assert_equal(answers(copied), live)
    lora.detach()
    assert_equal(answers(copied), live)


def test_attaching_moves_a_lora_to_the_models_device():
    sd = small_model()
    lora = random_lora(sd, KEYS)
    sd.unet.to("meta")  # the one other device that every machine has
    lora.attach(sd)
    assert {p.device.type for p in lora.parameters()} == {"meta"}


def test_dropout_acts_in_training_only(sd):
    lora = create_lora(sd, KEYS, rank=2, alpha=1.0, dropout=0.5, generator=generator())
    low, x = next(iter(lora.layers.values())), torch.ones(1, 4, 16)
    with torch.no_grad():
        low.up.weight.fill_(1.0)
    assert not torch.equal(low(x), low(x))
    lora.eval()
    torch.testing.assert_close(low(x), x @ low.delta().T)  # one product in fp32


def test_a_state_dict_goes_into_another_lora_of_the_same_layers(sd):
    one, other = random_lora(sd, seed=1), random_lora(sd, seed=5)
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(low.delta(), other.layers[name].delta()) for name, low in one.layers.items())


# -------------------------------------------------------------------------------------------------------------- making


def test_the_first_down_is_that_of_peft_for_both_initialisations():
    layer = nn.Conv2d(64, 8, 3)
    for init, theirs in (("gaussian", "gaussian"), ("kaiming", True)):
        low = create_lora(OneLayer(layer), ("0",), rank=32, alpha=1.0, init=init, generator=generator()).layers["unet.0"]
        peft = get_peft_model(nn.Sequential(copy.deepcopy(layer)), LoraConfig(r=32, target_modules=["0"], init_lora_weights=theirs))
        wanted = peft.base_model.model[0].lora_A["default"].weight.detach()
        assert low.down.weight.shape == wanted.shape
        # 18432 values: their standard deviation is known to 0.5 %; the largest of a uniform to less, of a normal to 20 %
        assert low.down.weight.std().item() == pytest.approx(wanted.std().item(), rel=0.03)
        assert low.down.weight.abs().max().item() == pytest.approx(wanted.abs().max().item(), rel=0.3 if init == "gaussian" else 0.01)
        assert not low.up.weight.any()


def test_the_same_seed_makes_the_same_lora_and_leaves_the_global_generator_alone(sd):
    state = torch.get_rng_state()
    a, b, c = (create_lora(sd, KEYS, rank=2, alpha=1.0, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(a.state_dict().values(), b.state_dict().values())
    assert not all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), c.state_dict().values()))


def test_the_named_sets_choose_what_the_public_trainers_do(sd):
    layers = layers_of(sd)
    chosen = {name: choose(list(layers), patterns) for name, patterns in PATTERNS.items()}
    transformers = sum(name.endswith(".blocks.0.cross_attention.to_k") for name in layers)
    assert len(chosen["attention"]) == 8 * transformers
    assert len(chosen["transformer"]) == 12 * transformers  # and the feed-forward's two, proj_in and proj_out
    assert {name for name in layers if layers[name].weight.shape[2:] == (3, 3)} - set(chosen["conv"]) == {"unet.conv_in", "unet.conv_out"}
    assert set(chosen["transformer"]) < set(chosen["conv"]) and set(chosen["attention"]) < set(chosen["transformer"])
    assert chosen["text_encoder"] == [f"text_encoder.blocks.{i}.attention.to_{x}" for i in range(2) for x in ("q", "k", "v", "out")]


def test_on_stable_diffusion_1_the_sets_are_as_large_as_the_public_trainers_say():
    sd = object.__new__(StableDiffusion)
    with torch.device("meta"):
        sd.unet, sd.text = UNet(SD1.unet), SimpleNamespace(encoder=TextEncoder(SD1.text_encoder))
    layers = layers_of(sd)
    # kohya prints 192 modules for the U-Net, 278 with convolutions; diffusers has 16 transformers with two attentions, CLIP 12 blocks.
    counts = {"attention": 128, "transformer": 192, "conv": 278, "text_encoder": 48}
    assert {name: len(choose(list(layers), patterns)) for name, patterns in PATTERNS.items()} == counts
    lora = create_lora(sd, PATTERNS["attention"], rank=4, alpha=4.0, generator=generator())
    assert sum(p.numel() for p in lora.parameters()) == 797_184  # diffusers' default, a file of 3.2 MB


def test_a_rank_beyond_the_layer_is_taken_and_reaches_any_change(sd):
    lora = random_lora(sd, KEYS, rank=40)
    assert all(low.rank == 40 and torch.linalg.matrix_rank(low.delta()) == min(low.delta().shape) for low in lora.layers.values())


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("attn2.to_kk", r"'attn2.to_kk' matches no layer; (near|there) are .*to_k"),
        (r"cross_atention\.to_k$", r"matches no layer; near are .*cross_attention\.to_k"),
        ("vae", "'vae' matches no layer; there are unet"),
        ("to_(k", r"'to_\(k' is no regular expression"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named_with_near_layers(pattern, message, sd):
    with pytest.raises(ValueError, match=message):
        create_lora(sd, KEYS + (pattern,), rank=1, alpha=1.0, generator=generator())


def test_numbers_out_of_range_are_named(sd):
    given = {"patterns": KEYS, "rank": 1, "alpha": 1.0, "generator": generator()}
    for wrong, message in [
        ({"rank": 0}, "rank 0"),
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"alpha": math.inf}, "alpha inf"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"init": "normal"}, "init 'normal' unknown; choose gaussian, kaiming"),
        ({"patterns": ()}, "no pattern"),
    ]:
        with pytest.raises(ValueError, match=message):
            create_lora(sd, **(given | wrong))


def test_a_lora_of_another_model_names_layers_and_widths_and_attaches_nowhere(sd):
    lora, other = random_lora(sd), small_model(wider_config())
    with pytest.raises(ValueError, match=r"cross_attention.to_k: a change of shape \(16, 16\), for a weight of shape \(16, 24\)"):
        lora.attach(other)
    assert not any(module._forward_hooks for module in chain(other.unet.modules(), other.text_encoder.modules()))
    with pytest.raises(ValueError, match="no layer unet.middle.x; "):
        merge_lora(sd, LoRA({"unet.middle.x": LowRank(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)}))


def test_a_change_that_would_be_hidden_is_not_merged():
    sd = small_model()
    lora, delta = random_lora(sd, (r"attention\.to_k$",)), create_custom_diffusion(sd)
    weights = {name: layer.weight for name, layer in layers_of(sd).items()}
    before = {name: weight.clone() for name, weight in weights.items()}
    delta.attach(sd)
    with pytest.raises(ValueError, match=r"stands in the place of \d+ of the weights to be changed, unet.*cross_attention.to_k for one"):
        merge_lora(sd, lora)
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    delta.detach()
    merge_lora(sd, lora)


def test_twice_is_once_too_often(sd):
    lora, before = random_lora(sd, KEYS), answers(sd)
    lora.attach(sd)
    with pytest.raises(ValueError, match="attached already"):
        lora.attach(sd)
    with pytest.raises(ValueError, match="apply it twice"):
        merge_lora(sd, lora)
    lora.detach()
    lora.detach()
    first, second = merge_lora(sd, lora), merge_lora(sd, lora)
    with pytest.raises(ValueError, match="undo later merges first"):
        first()
    second(), first()
    assert_equal(answers(sd), before)
