"""Each saving on and off, whatever happens between two steps; nothing outlives the walk. On the CPU a CUDA graph is a trace."""

import dataclasses
import gc
import threading
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from minidiff import cuda_graph
from minidiff.adapters.custom_diffusion import create_custom_diffusion
from minidiff.adapters.lora import create_lora, merge_lora
from minidiff.adapters.parallel import create_adapters
from minidiff.cuda_graph import NO_SAVINGS, Savings, channels_last, put_in
from minidiff.kernels.dispatch import attention_backend
from minidiff.samplers import SAMPLERS
from tests.small_models import small_config, small_model, training_config

PROMPTS = ["a red apple", "a cat"]
ONE_BY_ONE = {name: dataclasses.replace(NO_SAVINGS, **{name: True}) for name in ("keys_values", "time_table", "shared_prefix", "graph")}
# float32, summed in another order: 1e-6 on an answer, four times with guidance, over four steps
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def sd():
    return small_model()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """On the CPU a recording is a trace of PyTorch's operations with everything in it that they read, which is what a CUDA graph is too."""
    monkeypatch.setitem(cuda_graph.CAPTURE, "cpu", trace)
    return torch.device(request.param)


def trace(f, device):
    program = make_fx(f)()
    answer = program()

    def replay():
        answer.copy_(program())

    return answer, replay


def latents(sd, cuda_graph, steps=4, between=None, size=32, **options):
    """The latents after every step; between(i) is called after step i."""
    result = []
    for step in sd.denoise(PROMPTS, steps=steps, seeds=[1, 2], size=size, savings=cuda_graph, **options):
        result.append(step.x_t)
        if between:
            between(step.i)
    return torch.stack(result)


def on(device, config=None):
    """By default the smallest: tracing takes time."""
    sd = small_model(config or training_config())
    for part in (sd.text_encoder, sd.unet, sd.vae):
        part.to(device)
    return sd


class Runs:
    """How often a layer's own product is computed, while open."""

    def __init__(self, monkeypatch, layers):
        self.count = dict.fromkeys(layers, 0)
        linear = nn.Linear.forward

        def forward(layer, x):
            if layer in self.count:
                self.count[layer] += 1
            return linear(layer, x)

        monkeypatch.setattr(nn.Linear, "forward", forward)


# --- on and off -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_BY_ONE)
@pytest.mark.parametrize("guidance_scale", [1, 4.0])
def test_each_saving_leaves_the_picture_as_it_is(device, name, guidance_scale):
    model = on(device)
    off, by_one = (latents(model, s, guidance_scale=guidance_scale) for s in (NO_SAVINGS, ONE_BY_ONE[name]))
    torch.testing.assert_close(by_one, off, **CLOSE)
    if name in ("keys_values", "graph"):
        assert torch.equal(by_one, off)  # the same operations on the same numbers


@pytest.mark.parametrize(
    "prediction, sampler, spacing",
    [
        *(("v", sampler, None) for sampler in SAMPLERS),
        *(("eps", sampler, "linspace") for sampler in ("euler", "heun", "plms")),
    ],
)
def test_all_savings_together_with_every_sampler(sd, device, prediction, sampler, spacing):
    """Also that the table of times has all that each visits: another is NaN."""
    model = sd if (device.type, prediction) == ("cpu", "v") else on(device, small_config(prediction))
    recorded = device.type == "cuda" or sampler in ("heun", "plms")  # these call the model twice in a step, and keep answers
    off, all_of_them = (latents(model, s, steps=3, sampler=sampler, spacing=spacing) for s in (NO_SAVINGS, Savings(graph=recorded)))
    torch.testing.assert_close(all_of_them, off, **CLOSE)


def test_what_does_not_change_is_worked_out_once_a_walk(sd, monkeypatch):
    block = sd.unet.middle.transformer.blocks[0].cross_attention
    layers = [block.to_k, block.to_v, sd.unet.middle.block_1.time_projection, sd.unet.time_embedding.linear_2]
    runs = Runs(monkeypatch, [*layers, block.to_q])
    for s, times in ((Savings(), 1), (NO_SAVINGS, 4)):
        runs.count = dict.fromkeys(runs.count, 0)
        latents(sd, s)
        assert [runs.count[layer] for layer in layers] == [times] * 4 and runs.count[block.to_q] == 4


def test_a_timestep_that_is_not_in_the_table_is_not_taken_for_another(sd):
    table = cuda_graph.TimeTable(sd.unet, lambda: [1, 500, 999])
    with torch.no_grad():
        rows = table.embed(torch.tensor([999, 7, 1]))
        torch.testing.assert_close(rows[::2], sd.unet.time_embedding(torch.tensor([999, 1])), **CLOSE)
    assert rows[1].isnan().all()


def test_the_walk_works_in_inference_mode(sd):
    expected = latents(sd, NO_SAVINGS)
    with torch.inference_mode():
        torch.testing.assert_close(latents(sd, Savings()), expected, **CLOSE)


# --- between two steps ------------------------------------------------------------------------------------------------


def random_lora(sd, patterns):
    lora = create_lora(sd, patterns, rank=2, alpha=2.0, init="kaiming", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for low in lora.layers.values():
            low.up.weight.copy_(0.3 * torch.randn(low.up.weight.shape, generator=torch.Generator().manual_seed(1)))
    return lora


def lora(patterns, sd):
    small = random_lora(sd, patterns)
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


def silenced(sd):
    """A hook that is not ours, and does something else at each call."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return output * len(calls)

    handle = sd.unet.middle.register_forward_hook(hook)
    return {2: handle.remove}


EVENTS = {
    "a LoRA on keys, values and times": partial(lora, ("cross_attention.to_(k|v)", "time_projection")),
    "a LoRA on the time embedding": partial(lora, ("time_embedding", "to_q")),
    "a LoRA that learns": lora_that_learns,
    "a LoRA that is merged": merged,
    "a Custom Diffusion": custom_diffusion,
    "prefix tuning": prefix_tuning,
    "training with AdamW": partial(training, partial(torch.optim.AdamW, lr=0.02)),
    "training with fused AdamW": partial(training, partial(torch.optim.AdamW, lr=0.02, fused=True)),
    "training with SGD one by one": partial(training, partial(torch.optim.SGD, lr=0.02, foreach=False)),
    "other weights, then other memory": new_weights,
    "another way of attention": other_attention,
    "a hook of others": silenced,
}


# Traced on the CPU too; to trace all would take a minute.
TRACED = (
    "a LoRA on keys, values and times",
    "a LoRA that learns",
    "training with fused AdamW",
    "other weights, then other memory",
    "another way of attention",
    "a hook of others",
)


@pytest.mark.parametrize("event", EVENTS)
def test_what_changes_between_two_steps_is_seen_by_the_next(event, device):
    def walk(s, quiet=False):
        model = on(device)
        events = EVENTS[event](model)
        return latents(model, s, steps=5, between=lambda i: events.get(i, int)() if not quiet else None)

    graph = device.type == "cuda" or event in TRACED
    off, all_of_them, kept = walk(NO_SAVINGS), walk(Savings(graph=graph)), walk(ONE_BY_ONE["keys_values"])
    torch.testing.assert_close(all_of_them, off, **CLOSE)
    assert torch.equal(kept, off)
    if event not in ("another way of attention", "a hook of others"):
        assert (walk(NO_SAVINGS, quiet=True) - off).abs().max() > 1e-2  # else it would not be noticed


def test_an_adapter_attached_between_two_pictures_is_in_the_second_alone(device):
    model = on(device)
    small = random_lora(model, ("to_k", "time_projection"))
    plain = latents(model, Savings(), steps=3)
    small.attach(model)
    adapted = latents(model, Savings(), steps=3)
    torch.testing.assert_close(adapted, latents(model, NO_SAVINGS, steps=3), **CLOSE)
    small.detach()
    assert torch.equal(latents(model, Savings(), steps=3), plain) and (adapted - plain).abs().max() > 1e-2


def test_walks_that_take_turns_and_pictures_of_other_sizes_do_not_meet(device):
    model = on(device)
    settings = [dict(size=32), dict(size=(40, 32), negative_prompt="a dog")]
    alone = [latents(model, Savings(), steps=3, **one) for one in settings]
    walks = [model.denoise(PROMPTS, steps=3, seeds=[1, 2], **one) for one in settings]
    for i, steps in enumerate(zip(*walks, strict=True)):
        assert all(torch.equal(step.x_t, expected[i]) for step, expected in zip(steps, alone, strict=True))


# --- the recording ----------------------------------------------------------------------------------------------------


def counted(monkeypatch, capture=trace):
    made = []

    def counting(f, device):
        made.append(1)
        return capture(f, device)

    monkeypatch.setitem(cuda_graph.CAPTURE, "cpu", counting)
    return made


def test_a_walk_is_recorded_once_and_again_only_after_a_change(sd, monkeypatch):
    made, model = counted(monkeypatch), on("cpu")
    small = random_lora(model, ("to_k",))
    latents(model, Savings(), steps=6, between=lambda i: {3: lambda: small.attach(model)}.get(i, int)())
    assert len(made) == 2
    latents(model, Savings(), steps=1)
    latents(model, Savings(graph=False))
    latents(model, Savings(), attention_maps=True)  # its hooks take notes, at each call others
    assert len(made) == 2


def test_a_replayed_answer_is_the_callers_own(sd, monkeypatch):
    """plms keeps three."""
    counted(monkeypatch)
    x, t = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500])
    context = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    model = cuda_graph.Recorded(lambda x_t, t: sd.unet(x_t, t, context), sd.unet)
    with torch.no_grad():
        answers = [model(one, t) for one in x]
        assert all(torch.equal(answer, sd.unet(one, t, context)) for answer, one in zip(answers, x))
    assert model.replay is not None


def test_what_cannot_be_recorded_runs_without_and_says_so_once(sd, monkeypatch):
    def fail(f, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    made = counted(monkeypatch, fail)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph and runs without: operation not permitted") as caught:
        shown = latents(sd, ONE_BY_ONE["graph"])
    assert len(caught) == len(made) == 1 and torch.equal(shown, latents(sd, NO_SAVINGS))


def test_a_compiled_unet_is_left_alone(monkeypatch):
    made, model = counted(monkeypatch), small_model()
    model.unet._compiled_call_impl = model.unet._call_impl  # as `compile` does
    monkeypatch.setattr(cuda_graph, "put_in", None)
    latents(model, Savings())
    assert made == []


# --- nothing is left --------------------------------------------------------------------------------------------------


def patched(sd):
    return [name for name, module in sd.unet.named_modules() if "forward" in vars(module)]


def test_no_module_is_changed_after_a_step_or_an_error(sd, monkeypatch):
    walk = sd.denoise(PROMPTS, seeds=[1])
    next(walk)
    assert patched(sd) == []

    def fail(*args):
        assert len(patched(sd)) > 5
        raise MemoryError

    monkeypatch.setattr(sd.unet.middle.block_2, "forward", fail)
    with pytest.raises(MemoryError):
        next(walk)
    monkeypatch.undo()
    assert patched(sd) == []


def test_nothing_is_remembered_after_the_walk(sd, monkeypatch):
    tables = []
    table = cuda_graph.TimeTable
    monkeypatch.setattr(cuda_graph, "TimeTable", lambda *args: tables.append(table(*args)) or tables[-1])
    walk = sd.denoise(PROMPTS, steps=3)
    next(walk)
    remembered = weakref.ref(tables.pop().table)
    assert remembered() is not None
    walk.close()
    del walk
    gc.collect()
    assert remembered() is None


def test_another_thread_computes_by_itself(sd):
    layer, x = sd.unet.time_embedding.linear_1, torch.randn(2, 16)
    results = []
    with put_in({layer: lambda x: None}):
        thread = threading.Thread(target=lambda: results.append(layer(x)))
        thread.start()
        thread.join()
        assert layer(x) is None
    assert torch.equal(results[0], layer(x))


def test_a_forward_that_others_put_in_stays():
    layer, x = nn.Linear(2, 2), torch.randn(1, 2)
    layer.forward = lambda x: x
    with put_in({layer: lambda x: None}):
        assert layer(x) is x
    assert layer(x) is x


# --- channels-last ----------------------------------------------------------------------------------------------------


def test_16_bit_convolutions_are_laid_out_channels_last_and_agree():
    plain, laid_out = small_model(), small_model()
    for model in (plain, laid_out):
        model.unet.bfloat16(), model.text_encoder.bfloat16(), model.vae.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        off, shown = (latents(model, s, steps=2) for model, s in ((plain, NO_SAVINGS), (laid_out, Savings(graph=False))))
        pixels = [model.decode(off[-1]) for model in (plain, laid_out)]
    exact = latents(small_model(), NO_SAVINGS, steps=2)
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
    latents(model, Savings(), steps=1)
    assert all(p.is_contiguous() for p in model.unet.parameters())
