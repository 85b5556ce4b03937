"""Prompts that change over the steps, and kept cross-attention: equal to what they stand for, step by step; cheaper where they say so."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minidiff.adapters.parallel import create_adapters
from minidiff.blocks import TransformerBlock
from minidiff.conditioning import Conditioning
from minidiff.config import UNetConfig
from minidiff.editing.prompt_steps import Span, halves, kept_cross_attention, with_gate, with_spans
from minidiff.editing.start import Sampling
from minidiff.guidance import guide
from minidiff.samplers import SAMPLERS, levels
from minidiff.unet import UNet
from tests.editing.small import last
from tests.small_models import small_model, xl_config

CAT, DOG = "a cat on a red background", "a dog on a red background"


@pytest.fixture(scope="module")
def sd():
    return small_model()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_karras", "ddpm"])
def test_a_change_at_a_step_is_two_runs_joined_there(sd, sampler, guidance_scale):
    """The first steps are those of one prompt, and a one-step sampler goes on as the other prompt's would from there."""
    settings = dict(steps=6, sampler=sampler, guidance_scale=guidance_scale, seeds=[2])
    visited = levels(sd.schedule, sampler, 6)
    joined = list(sd.denoise(CAT, **settings, model=with_spans(sd, [Span(DOG, 3, 6)], visited)))
    cat = list(sd.denoise(CAT, **settings))
    assert all(torch.equal(a.x_t, b.x_t) for a, b in zip(joined[:3], cat)) and not torch.equal(joined[3].x_t, cat[3].x_t)
    if sampler == "ddim":
        dog = last(sd.denoise(DOG, **settings, start=3, x=joined[2].x_t))
        torch.testing.assert_close(joined[-1].x_t, dog, rtol=1e-4, atol=1e-5)  # fp32


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_change_over_all_steps_is_the_other_prompt(sd, sampler):
    visited = levels(sd.schedule, sampler, 4)
    changed = last(sd.denoise([CAT] * 2, seeds=[0, 1], steps=4, sampler=sampler, model=with_spans(sd, [Span(DOG, 0, 4)], visited)))
    assert torch.equal(changed, last(sd.denoise([DOG] * 2, seeds=[0, 1], steps=4, sampler=sampler)))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_no_prompt_is_the_unconditional_prediction_in_one_row(sd, guidance_scale):
    rows, predict = [], sd.predict
    counted = lambda x_t, t, c: rows.append(len(c)) or predict(x_t, t, c)
    model = with_spans(sd, [Span(None, 0, 3)], levels(sd.schedule, "ddim", 3), model=counted)
    dropped = last(sd.denoise(CAT, steps=3, guidance_scale=guidance_scale, model=model))
    torch.testing.assert_close(dropped, last(sd.denoise("", steps=3, guidance_scale=1)), rtol=1e-4, atol=1e-5)  # fp32
    assert rows == [1, 1, 1]


def test_of_spans_that_overlap_the_last_counts_and_sdxl_has_its_sizes():
    sd = small_model(xl_config())
    visited = levels(sd.schedule, "ddim", 4)
    model = with_spans(sd, [Span("a car", 0, 4), Span(DOG, 0, 4)], visited)
    found, expected = last(sd.denoise(CAT, steps=4, model=model)), last(sd.denoise(DOG, steps=4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)  # fp32, latents of 10; prompts encoded alone, and not


# --- kept cross-attention ---------------------------------------------------------------------------------------------


def by_hand(sd, gate, steps, scale, prompt):
    """DDIM with TGATE, on hooks of its own: outputs are stored at step gate - 1, and put in place of the layers' own from then on."""
    visited, kept, now = levels(sd.schedule, "ddim", steps), {}, [0]
    cond, uncond = sd.encode_prompts([prompt]), sd.encode_prompts([""])
    handles = []
    for module in sd.unet.modules():
        if isinstance(module, TransformerBlock):

            def hook(layer, args, output):
                if now[0] == gate - 1:
                    kept.setdefault(layer, []).append(output)
                return sum(kept[layer]) / 2 if now[0] >= gate else None

            handles.append(module.cross_attention.register_forward_hook(hook))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, (level, following) in enumerate(zip(visited, visited[1:])):
            now[0], t = i, torch.tensor([level.t])
            v = guide(sd.unet(x, t, uncond), sd.unet(x, t, cond), scale) if i < gate else sd.unet(x, t, cond)
            a, s = level.sqrt_alpha_bar, level.sqrt_one_minus_alpha_bar
            x = following.sqrt_alpha_bar * (a * x - s * v) + following.sqrt_one_minus_alpha_bar * (a * v + s * x)
    for handle in handles:
        handle.remove()
    return x


@pytest.mark.parametrize("gate", [1, 3])
def test_the_gate_is_tgates(sd, gate):
    found = last(sd.denoise(CAT, steps=6, model=with_gate(sd, gate, levels(sd.schedule, "ddim", 6))))
    torch.testing.assert_close(found, by_hand(sd, gate, 6, 4.0, CAT), rtol=1e-3, atol=1e-4)  # fp32, six steps


def test_a_gate_at_the_end_changes_no_bit_and_the_layers_are_given_back(sd):
    before = list(sd.unet.named_modules())
    visited = levels(sd.schedule, "ddim", 4)
    assert torch.equal(last(sd.denoise(CAT, steps=4, model=with_gate(sd, 4, visited))), last(sd.denoise(CAT, steps=4)))
    last(sd.denoise(CAT, steps=4, model=with_gate(sd, 2, visited)))
    assert list(sd.unet.named_modules()) == before and not any(module._forward_hooks for module in sd.unet.modules())


def test_without_keeping_only_guidance_ends(sd):
    visited = levels(sd.schedule, "ddim", 4)
    found = list(sd.denoise(CAT, steps=4, model=with_gate(sd, 2, visited, keep=False)))
    expected = last(sd.denoise(CAT, steps=4, guidance_scale=1, start=2, x=found[1].x_t))
    torch.testing.assert_close(found[-1].x_t, expected, rtol=1e-4, atol=1e-5)  # fp32


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_a_gate_and_batches_keep_their_own(sd, sampler):
    visited = levels(sd.schedule, sampler, 5)
    both = last(sd.denoise([CAT, "a car"], seeds=[0, 1], steps=5, sampler=sampler, model=with_gate(sd, 2, visited)))
    alone = last(sd.denoise("a car", seeds=[1], steps=5, sampler=sampler, model=with_gate(sd, 2, visited)))
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3)  # batches of other sizes round differently


def test_what_an_adapter_adds_to_the_attention_is_kept_too():
    sd = small_model()
    generator = torch.Generator().manual_seed(0)
    adapters = create_adapters(sd, (r"cross_attention$",), method="parallel", rank=2, generator=generator)
    with torch.no_grad():
        for p in adapters.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    plain = by_hand(sd, 2, 4, 4.0, CAT)
    adapters.attach(sd)
    found = last(sd.denoise(CAT, steps=4, model=with_gate(sd, 2, levels(sd.schedule, "ddim", 4))))
    torch.testing.assert_close(found, by_hand(sd, 2, 4, 4.0, CAT), rtol=1e-3, atol=1e-4)  # fp32
    assert not torch.allclose(found, plain, atol=1e-2)


@pytest.mark.slow
def test_sdxl_takes_what_tgate_reports_and_saves_all_of_its_cross_attention():
    """TGATE's README: 25 steps at 1024 pixels take 149.4 TMACs, of convolutions and linear layers alone.

    Behind the gate there is half of that, without the four projections of each cross-attention: q and out of its cells, k and v of 77 tokens.
    """
    config = UNetConfig(
        widths=(320, 640, 1280),
        blocks_per_level=2,
        attention=(0, 2, 10),
        heads=(5, 10, 20),
        context_width=2048,
        linear_projection=True,
        pooled_width=1280,
    )
    with torch.device("meta"):
        unet = UNet(config)
        given = dict(pooled=torch.zeros(1, 1280), size=torch.zeros(1, 6))
        x, t, one = torch.zeros(1, 4, 128, 128), torch.zeros(1), Conditioning(torch.zeros(1, 77, 2048), **given)
    two = one.expand(2)

    def macs(run):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        products = ("bmm", "attention")
        counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
        return sum(count for name, count in counts.items() if not any(word in name for word in products)) / 2 / 1e12

    outputs, handles = {}, []
    for name, module in unet.named_modules():
        if isinstance(module, TransformerBlock):
            handles.append(module.cross_attention.register_forward_hook(lambda m, a, output, name=name: outputs.update({name: output})))
    full = macs(lambda: unet(x, t, two))
    for handle in handles:
        handle.remove()
    with kept_cross_attention(unet, {name: halves(output, True) for name, output in outputs.items()}):
        gated = macs(lambda: unet(x, t, one))
    assert 25 * full == pytest.approx(149.4, rel=0.02)
    # Transformer blocks down, in the middle and up: 2 x 2 and 3 x 2 at 64 x 64 cells, 2 x 10, 10 and 3 x 10 at 32 x 32.
    saved = sum(blocks * 2 * (N * D * D + 77 * 2048 * D) for blocks, N, D in ((10, 64**2, 640), (60, 32**2, 1280))) / 1e12
    assert full / 2 - gated == pytest.approx(saved, rel=1e-3)


@pytest.mark.parametrize("gate", [0, 5])
def test_a_gate_outside_the_steps_is_refused(sd, gate):
    with pytest.raises(ValueError, match=rf"gate {gate} is outside 1\.\.4"):
        with_gate(sd, gate, Sampling(4).levels(sd.schedule))


@pytest.mark.parametrize("start, end", [(3, 3), (-1, 2), (0, 5)])
def test_a_span_outside_the_steps_is_refused(sd, start, end):
    with pytest.raises(ValueError, match=rf"span {start}\.\.{end} of 'a dog.*expected 0 <= start < end <= 4"):
        with_spans(sd, [Span(DOG, start, end)], Sampling(4).levels(sd.schedule))
