"""The captured U-Net, whatever happens between two steps or two pictures. On the CPU a CUDA graph is a trace."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from minidiff import cuda_graph, pipeline
from minidiff.adapters.custom_diffusion import create_custom_diffusion
from minidiff.adapters.lora import create_lora, merge_lora
from minidiff.adapters.parallel import create_adapters
from minidiff.attention_maps import with_attention_maps
from minidiff.conditioning import Conditioning
from minidiff.cuda_graph import UNetGraph
from minidiff.editing.prompt_steps import with_gate
from minidiff.editing.prompt_to_prompt import AttentionEdit, prompt_to_prompt
from minidiff.editing.start import Sampling
from minidiff.kernels.dispatch import attention_backend
from minidiff.pipeline import channels_last
from minidiff.samplers import levels
from tests.editing.small import last
from tests.small_models import small_model, training_config

PROMPTS = ["a red apple", "a cat"]


def trace(f, device):
    program = make_fx(f)()
    output = program()

    def replay():
        output.copy_(program())

    return output, replay


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """On the CPU a capture is a trace of PyTorch's operations with everything in it that they read, which is what a CUDA graph is too."""
    monkeypatch.setattr(pipeline, "GRAPH_DEVICES", ("cpu", "cuda"))
    monkeypatch.setitem(cuda_graph.CAPTURE, "cpu", trace)
    return torch.device(request.param)


@pytest.fixture
def captures(device, monkeypatch):
    """A list that grows by one with each capture."""
    made, capture = [], cuda_graph.CAPTURE[device.type]

    def counting(f, device):
        made.append(1)
        return capture(f, device)

    monkeypatch.setitem(cuda_graph.CAPTURE, device.type, counting)
    return made


def on(device, config=None):
    """By default the smallest: tracing takes time."""
    sd = small_model(config or training_config())
    for part in sd.parts.values():
        part.to(device)
    return sd


def latents(sd, graph=True, steps=4, between=None, size=32, **options):
    """The latents after every step; between(i) is called after step i."""
    if not graph:
        options["model"] = lambda x_t, t, conditioning: sd.unet(x_t.to(sd.dtype), t, conditioning)
    result = []
    for step in sd.denoise(PROMPTS, steps=steps, seeds=[1, 2], size=size, **options):
        result.append(step.x_t)
        if between:
            between(step.i)
    return torch.stack(result)


# --- with and without -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, guidance_scale", [("ddim", 1), ("heun", 4.0), ("plms", 4.0)])
def test_the_graph_gives_the_same_bits(captures, device, sampler, guidance_scale):
    """heun and plms call the model twice in a step, and keep its answers."""
    model = on(device)
    plain, replayed = (latents(model, graph, sampler=sampler, guidance_scale=guidance_scale) for graph in (False, True))
    assert torch.equal(replayed, plain) and len(captures) == 1


def test_it_works_in_inference_mode_and_under_autocast(captures, device):
    model = on(device)
    expected = latents(model, graph=False)
    with torch.inference_mode():
        assert torch.equal(latents(model), expected)
    assert torch.equal(latents(model), expected)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(latents(model), latents(model, graph=False))
    assert len(captures) == 3


def test_without_a_cuda_device_there_is_no_graph(monkeypatch):
    monkeypatch.setattr(cuda_graph, "CAPTURE", {})
    model = on("cpu")
    latents(model)
    assert model._graph is None


# --- between two steps ------------------------------------------------------------------------------------------------


def random_lora(sd, patterns):
    lora = create_lora(sd, patterns, rank=2, alpha=2.0, init="kaiming", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for low in lora.layers.values():
            low.up.weight.copy_(0.3 * torch.randn(low.up.weight.shape, generator=torch.Generator().manual_seed(1)))
    return lora


def lora(sd):
    small = random_lora(sd, ("cross_attention.to_(k|v)", "time_projection", "time_embedding"))
    return {0: lambda: small.attach(sd), 2: lambda: setattr(small, "weight", 2.0), 3: small.detach}


def lora_that_learns(sd):
    small = random_lora(sd, ("cross_attention.to_k", "time_projection"))
    learn = partial(optimizer_step, small, torch.optim.SGD(small.parameters(), lr=0.5))
    return {0: lambda: small.attach(sd), 2: learn}


def merged(sd):
    undo = []
    return {1: lambda: undo.append(merge_lora(sd, random_lora(sd, ("cross_attention.to_v", "time")))), 2: lambda: undo.pop()()}


def custom_diffusion(sd):
    small = create_custom_diffusion(sd)
    with torch.no_grad():
        for weight in small.weights:
            weight.mul_(2)
    return {1: lambda: small.attach(sd), 2: small.detach}


def prefix_tuning(sd):
    small = create_adapters(sd, ("cross_attention$",), method="prefix", rank=3, generator=torch.Generator().manual_seed(0))
    return {1: lambda: small.attach(sd), 2: small.detach}


def optimizer_step(module, optimizer):
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in module.parameters():
        p.grad = None


def training(make, sd):
    return dict.fromkeys((1, 2), partial(optimizer_step, sd.unet, make(sd.unet.parameters())))


def new_weights(sd):
    other = {name: 1.5 * weight for name, weight in sd.unet.state_dict().items()}
    return {1: lambda: sd.unet.load_state_dict(other), 2: lambda: sd.unet.bfloat16().float()}


def other_attention(sd):
    backend = attention_backend("naive")
    return {1: backend.__enter__, 3: lambda: backend.__exit__(None, None, None)}


def foreign_hook(sd):
    """It belongs to no adapter, and does something else at each call."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return output * len(calls)

    handle = sd.unet.middle.register_forward_hook(hook)
    return {2: handle.remove}


EVENTS = {
    "a LoRA": lora,
    "a LoRA that learns": lora_that_learns,
    "a LoRA that is merged": merged,
    "a Custom Diffusion": custom_diffusion,
    "prefix tuning": prefix_tuning,
    "training with fused AdamW": partial(training, partial(torch.optim.AdamW, lr=0.02, fused=True)),
    "other weights, then other memory": new_weights,
    "another way of attention": other_attention,
    "a foreign hook": foreign_hook,
}


@pytest.mark.parametrize("event", EVENTS)
def test_what_changes_between_two_steps_is_seen_by_the_next(event, device):
    def trajectory(graph, quiet=False):
        model = on(device)
        events = EVENTS[event](model)
        return latents(model, graph, steps=5, between=lambda i: events.get(i, int)() if not quiet else None)

    plain = trajectory(graph=False)
    assert torch.equal(trajectory(graph=True), plain)
    if event not in ("another way of attention", "a foreign hook"):
        assert (trajectory(graph=False, quiet=True) - plain).abs().max() > 1e-2  # else it would not be noticed


# --- from picture to picture ------------------------------------------------------------------------------------------


def test_the_graph_is_kept_from_picture_to_picture(captures, device):
    """Other prompts, seeds, scales and samplers are other numbers in the same buffers."""
    model = on(device)
    settings = [{}, {"negative_prompt": "a dog"}, {"guidance_scale": 7.5, "sampler": "euler"}]
    assert all(torch.equal(latents(model, **one), latents(model, graph=False, **one)) for one in settings)
    assert len(captures) == 1
    assert torch.equal(latents(model, size=(40, 32)), latents(model, graph=False, size=(40, 32)))
    latents(model, guidance_scale=1)
    latents(model, guidance_scale=1)
    assert len(captures) == 3


def test_an_adapter_is_in_the_pictures_drawn_while_it_is_attached(captures, device):
    model = on(device)
    small = random_lora(model, ("to_k", "time_projection"))
    plain = latents(model)
    small.attach(model)
    adapted = latents(model)
    assert torch.equal(adapted, latents(model, graph=False)) and (adapted - plain).abs().max() > 1e-2
    small.weight = 0.5
    assert torch.equal(latents(model), latents(model, graph=False))
    small.detach()
    assert torch.equal(latents(model), plain)
    assert len(captures) == 4


class Scale(nn.Module):
    """The smallest adapter: it multiplies the middle's output."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.version = factor, 0

    def attach(self, sd):
        sd.attached.append(self)
        sd.unet.middle.register_forward_hook(self.hook)

    def hook(self, module, args, output):
        return self.factor * output


def test_a_new_setting_is_seen_once_the_version_says_so(captures, device):
    model, small = on(device), Scale(2.0)
    small.attach(model)
    with_2 = latents(model)
    small.factor = 3.0
    assert torch.equal(latents(model), with_2)
    small.version += 1
    assert torch.equal(latents(model), latents(model, graph=False))
    model.attached.remove(small)  # now it is a foreign hook
    latents(model)
    assert len(captures) == 2


def test_weights_that_were_changed_in_place_need_no_new_graph_and_those_that_moved_do(captures, device):
    model = on(device)
    latents(model)
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(2)
    assert torch.equal(latents(model), latents(model, graph=False)) and len(captures) == 1
    model.unet.conv_out.weight.data = 0.5 * model.unet.conv_out.weight
    assert torch.equal(latents(model), latents(model, graph=False)) and len(captures) == 2
    model.unet.double(), model.text_encoder.double()
    assert torch.equal(latents(model), latents(model, graph=False)) and len(captures) == 3


def test_a_captured_unet_is_released_by_a_model_that_gets_another(captures, device):
    model, other = on(device), small_model(training_config(), seed=1).unet.to(device)
    latents(model)
    model.unet = other
    assert torch.equal(latents(model), latents(model, graph=False)) and model._graph.unet is other


def test_a_deep_copy_captures_a_graph_of_its_own(captures, device):
    model = on(device)
    expected = latents(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.unet.conv_out.weight.zero_()
    assert torch.equal(latents(copied), expected) and len(captures) == 2
    assert copied._graph.unet is copied.unet and copied._graph.attached is copied.attached


def test_loops_that_take_turns_do_not_meet(device):
    model = on(device)
    settings = [{}, {"negative_prompt": "a dog"}, {"size": (40, 32)}]
    alone = [latents(model, steps=3, **one) for one in settings]
    loops = [model.denoise(PROMPTS, steps=3, seeds=[1, 2], **({"size": 32} | one)) for one in settings]
    for i, steps in enumerate(zip(*loops, strict=True)):
        assert all(torch.equal(step.x_t, expected[i]) for step, expected in zip(steps, alone, strict=True))


# --- the graph by itself ----------------------------------------------------------------------------------------------


def inputs(device, rows=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, 8, 8, generator=generator)
    context = torch.randn(rows, 5, 16, generator=generator)
    return x.to(device), torch.tensor([10, 500], device=device), Conditioning(context.to(device))


def test_a_replayed_answer_is_the_callers_own(captures, device):
    unet = on(device).unet
    x, t, conditioning = inputs(device)
    graph = UNetGraph(unet, [])
    with torch.no_grad():
        answers = [graph(x_t, t, conditioning) for x_t in x]
        assert all(torch.equal(answer, unet(x_t, t, conditioning)) for answer, x_t in zip(answers, x))
    assert len(captures) == 1


def test_residuals_are_inputs_too(captures, device):
    unet = on(device).unet
    x, t, conditioning = inputs(device)
    graph = UNetGraph(unet, [])
    with torch.no_grad():
        skips, middle, _ = unet.encode(x[0], t, conditioning)
        for i, x_t in enumerate(x):
            controlled = Conditioning(conditioning.context, residuals=tuple(i * r for r in (*skips, middle)))
            assert torch.equal(graph(x_t, t, controlled), unet(x_t, t, controlled))
        graph(x[0], t, conditioning)
    assert len(captures) == 1


def test_gradients_and_a_compiled_unet_take_no_graph(captures, device):
    unet = on(device).unet
    x, t, conditioning = inputs(device)
    graph = UNetGraph(unet, [])
    for x_t in x:
        assert graph(x_t, t, conditioning).requires_grad
    unet._compiled_call_impl = unet._call_impl  # as `compile` does
    with torch.no_grad():
        for x_t in x:
            graph(x_t, t, conditioning)
    assert captures == []


def test_a_loop_that_records_attention_maps_is_not_captured(captures, device):
    """Its hooks belong to no adapter, and take notes, others at each call."""
    model = on(device)
    list(with_attention_maps(model.denoise(PROMPTS, steps=4, seeds=[1, 2], size=32), model.unet))
    assert captures == []


def test_what_cannot_be_captured_runs_without_and_says_so_once(device, monkeypatch):
    def fail(f, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(cuda_graph.CAPTURE, device.type, fail)
    model = on(device)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph and runs without: operation not permitted") as caught:
        shown = latents(model)
    assert len(caught) == 1 and torch.equal(shown, latents(model, graph=False))


# --- channels-last ----------------------------------------------------------------------------------------------------


def test_16_bit_convolutions_are_laid_out_channels_last_and_agree(monkeypatch):
    plain, laid_out = small_model(), small_model()
    for model in (plain, laid_out):
        for part in model.parts.values():
            part.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = latents(laid_out, steps=2)
        monkeypatch.setattr(pipeline, "channels_last", lambda module: None)
        off = latents(plain, steps=2)
        pixels = [model.decode(off[-1]) for model in (plain, laid_out)]
    exact = latents(small_model(), steps=2)
    # The one differs from the other no more than bfloat16 from float32, twice: both round, each in its own order.
    assert (shown - off).square().mean().sqrt() < 2 * (off - exact).square().mean().sqrt()
    assert (pixels[0] - pixels[1]).square().mean().sqrt() < 0.05  # 8 bits, over some thirty layers
    for part in (laid_out.unet, laid_out.vae):
        for name, p in part.state_dict().items():
            assert p.dim() < 4 or p.is_contiguous(memory_format=torch.channels_last), name
    for name, p in laid_out.unet.state_dict().items():
        assert torch.equal(p, plain.unet.state_dict()[name])


def test_the_unet_stays_channels_last_from_end_to_end():
    unet = small_model().unet.bfloat16()
    channels_last(unet)
    wrong = []

    def look(name, module, args, output):
        if output.shape[2:] != (1, 1) and not output.is_contiguous(memory_format=torch.channels_last):
            wrong.append(name)

    for name, module in unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.register_forward_hook(partial(look, name))
    unet(torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([3]), torch.randn(2, 5, 16).bfloat16())
    assert wrong == []


def test_float32_weights_are_left_as_they_are():
    model = small_model()
    latents(model, steps=1)
    assert all(p.is_contiguous() for p in model.unet.parameters())


@pytest.mark.slow
def test_attention_that_is_kept_or_changed_is_never_that_of_another_picture(device, captures):
    """Two pictures after each other, each with the outputs or the maps that are its own."""
    sd, eager = on(device), on(device)
    eager.predict = torch.no_grad()(lambda x_t, t, conditioning: eager.unet(x_t, t, conditioning))
    visited = levels(sd.schedule, "ddim", 6)
    for prompt in ("a cat", "a dog"):
        found, expected = (last(model.denoise(prompt, steps=6, model=with_gate(model, 2, visited))) for model in (sd, eager))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32: a trace adds in another order
        settings = dict(seeds=[1], sampling=Sampling(6))
        found, expected = (last(prompt_to_prompt(model, prompt, "a car", AttentionEdit(0.5, 0.0), **settings)) for model in (sd, eager))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # as above
    assert len(captures) >= 4  # behind the gate, and behind the last step that is controlled
