"""Which backend runs where, that each gives the same answers, and whole networks in each. The kernels themselves have tests of their own."""

import copy
import inspect
import warnings
from contextlib import contextmanager, nullcontext
from typing import get_args

import jaxtyping
import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import minidiff.vae
from minidiff.adapters.custom_diffusion import create_custom_diffusion
from minidiff.adapters.lora import PATTERNS, create_lora
from minidiff.attention import attention, naive_attention
from minidiff.attention_maps import record_cross_attention
from minidiff.blocks import TransformerBlock
from minidiff.cli.flags import Attentions
from minidiff.kernels import dispatch, self_attention, tiles
from minidiff.kernels.dispatch import ATTENTION, active_backend, attention_backend, select_backend, triton_works
from minidiff.trainers.engine.gradient_checkpointing import with_checkpointing
from minidiff.vae import AttentionBlock
from tests.small_models import small_model, training_config

H200, T4 = tiles.Card("NVIDIA H200", (9, 0), 227 * 1024), tiles.Card("Tesla T4", (7, 5), 64 * 1024)
DEVICE = tiles.DEVICE  # where our kernels run: a GPU, or the CPU in Triton's interpreter


# ------------------------------------------------------------------------------------------------------ which way is chosen


@pytest.fixture
def gpu(monkeypatch):
    """Tensors "on" an H200, made within the block it gives: they have shapes, dtypes and a device, and no numbers."""
    monkeypatch.setattr(tiles, "DEVICE", "cuda")
    monkeypatch.setattr(tiles, "_cards", {torch.device("cuda", i): H200 for i in range(2)} | {torch.device("cuda"): H200})
    monkeypatch.setattr(dispatch, "_triton_works", {})
    monkeypatch.setattr(dispatch, "_disable_current_modes", nullcontext)  # of this GPU nothing is real
    with FakeTensorMode():
        yield monkeypatch


def way(N, L, heads, d, causal=False, dtype=torch.float16, device="cuda"):
    q, k, v = (torch.empty(2, n, heads * d, dtype=dtype, device=device) for n in (N, L, L))
    return select_backend(q, k, v, heads, causal)


SELF = {
    "SD 1.5 at 512": [(4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160)],
    "SD 1.5 at 768": [(9216, 8, 40), (2304, 8, 80), (576, 8, 160), (144, 8, 160)],
    "SD 2.1 at 512": [(4096, 5, 64), (1024, 10, 64), (256, 20, 64), (64, 20, 64)],
    "SD 2.1 at 768": [(9216, 5, 64), (2304, 10, 64), (576, 20, 64), (144, 20, 64)],
    "SDXL at 1024": [(4096, 10, 64), (1024, 20, 64)],
    "bundled model": [(256, 2, 32), (64, 4, 32), (16, 5, 32)],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model", SELF)
def test_on_cuda_every_attention_of_the_unet_runs_our_kernels(gpu, model, dtype):
    words = 32 if model == "bundled model" else 77
    for N, heads, d in SELF[model]:
        assert way(N, N, heads, d, dtype=dtype) == "self"
        too_wide = d == 160 and dtype == torch.float32  # all keys of a head at once would not fit
        assert way(N, words, heads, d, dtype=dtype) == ("self" if too_wide else "cross")


@pytest.mark.parametrize(("L", "heads", "d"), [(77, 12, 64), (77, 16, 64), (32, 4, 32)])
def test_on_cuda_the_text_encoders_run_our_kernel(gpu, L, heads, d):
    assert way(L, L, heads, d, causal=True) == "self"


@pytest.mark.parametrize(("N", "d", "expected"), [(4096, 512, "pytorch"), (9216, 512, "pytorch"), (256, 96, "self")])
def test_on_cuda_the_vaes_one_head_is_ours_only_where_it_is_narrow(gpu, N, d, expected):
    assert way(N, N, 1, d) == expected


def test_on_cuda_more_keys_than_the_kernel_of_cross_attention_takes_go_to_that_of_self_attention(gpu):
    assert way(4096, 256, 8, 40) == "cross"
    assert way(4096, 257, 8, 40) == "self"


def test_on_cuda_what_no_kernel_of_ours_takes_is_pytorchs(gpu):
    assert way(64, 64, 8, 40, dtype=torch.float64) == "pytorch"
    assert way(64, 64, 8, 12) == "pytorch"


@pytest.mark.parametrize("lacking", ["Triton", "a GPU that is new enough"])
def test_on_cuda_without_what_our_kernels_need_all_is_pytorchs_and_nothing_is_said(gpu, lacking):
    if lacking == "Triton":
        gpu.setattr(tiles, "triton", None)
    else:
        gpu.setattr(tiles, "_cards", {torch.device("cuda", 0): T4, torch.device("cuda"): T4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert way(4096, 4096, 8, 40) == way(4096, 77, 8, 40) == "pytorch"


def test_where_triton_does_not_work_one_warning_says_so_and_all_is_pytorchs(gpu):
    def broken(*_):
        raise RuntimeError("Failed to find C compiler.")

    gpu.setattr(self_attention, "fused_self_attention", broken)
    with pytest.warns(UserWarning, match="Triton does not work here.*Failed to find C compiler"):
        assert way(4096, 4096, 8, 40) == "pytorch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert way(4096, 77, 8, 40) == "pytorch"


@pytest.mark.parametrize("works", [True, False])
def test_whether_triton_works_is_tried_for_real_even_among_tensors_without_contents(monkeypatch, works):
    ran = []

    class Kernel:
        def __getitem__(self, grid):
            return self

        def __call__(self, q, *_, **__):
            ran.append(type(q))
            if not works:
                raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(dispatch, "_triton_works", {})
    monkeypatch.setattr(self_attention, "forward_kernel", Kernel())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with FakeTensorMode():
            assert triton_works(torch.device(DEVICE)) == works
        assert triton_works(torch.device(DEVICE)) == works
    assert ran == [torch.Tensor] and len(said) == (0 if works else 1)  # once, on numbers


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_it_is_pytorchs(device):
    with FakeTensorMode():
        for shapes in SELF.values():
            assert {way(N, L, heads, d, dtype=torch.float32, device=device) for N, heads, d in shapes for L in (N, 77)} == {"pytorch"}
        assert way(77, 77, 12, 64, causal=True, device=device) == way(4096, 4096, 1, 512, device=device) == "pytorch"


def test_few_keys_in_bfloat16_on_a_cpu_are_done_by_hand():
    assert way(4096, 77, 8, 40, dtype=torch.bfloat16, device="cpu") == way(256, 256, 8, 80, dtype=torch.bfloat16, device="cpu") == "naive"


@pytest.mark.parametrize(("avx512", "amx", "expected"), [(True, False, "cpu"), (True, True, "pytorch"), (False, False, "pytorch")])
def test_many_keys_in_bfloat16_on_a_cpu_are_ours_on_the_processors_where_that_was_measured_to_be_faster(monkeypatch, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert (
        way(64, 257, 8, 40, dtype=torch.bfloat16, device="cpu") == way(4096, 4096, 1, 512, dtype=torch.bfloat16, device="cpu") == expected
    )
    assert way(257, 257, 8, 40, causal=True, dtype=torch.bfloat16, device="cpu") == "pytorch"
    assert way(64, 257, 8, 40, dtype=torch.float16, device="cpu") == way(64, 257, 8, 40, dtype=torch.float32, device="cpu") == "pytorch"
    with attention_backend("pytorch"):
        assert way(64, 257, 8, 40, dtype=torch.bfloat16, device="cpu") == "pytorch"


def test_what_is_asked_for_is_chosen_within_the_block_and_not_after_it():
    assert active_backend() == "auto"
    with attention_backend("triton"):
        assert way(64, 64, 2, 8, device=DEVICE) == "self" and way(64, 3, 2, 8, device=DEVICE) == "cross"
        with attention_backend("naive"):
            assert way(64, 64, 2, 8, device=DEVICE) == active_backend() == "naive"
        assert active_backend() == "triton"
    with pytest.raises(KeyError), attention_backend("pytorch"):
        assert way(64, 3, 2, 8, dtype=torch.bfloat16, device="cpu") == "pytorch"
        raise KeyError
    assert active_backend() == "auto"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="attention 'flash' unknown; choose auto, naive, pytorch, triton"):
        with attention_backend("flash"):
            pass
    assert get_args(Attentions) == ATTENTION


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(d=512), "heads of a multiple of 8 up to 160"),
        (dict(d=12), "heads of a multiple of 8 up to 160"),
        (dict(dtype=torch.float64), "dtype torch.float64"),
        (dict(device="meta"), "tensors on meta"),
        (dict(L=300, dtype=torch.float64), "dtype torch.float64"),
    ],
)
def test_our_kernels_by_name_for_what_they_do_not_take_is_an_error_with_the_reason(changes, reason):
    usual = dict(N=16, L=16, heads=1, d=8, device=DEVICE)
    with (
        attention_backend("triton"),
        pytest.raises(ValueError, match=f"attention 'triton' does not take this: .*{reason}.*; choose attention 'auto'"),
    ):
        way(**usual | changes)


def test_our_kernels_by_name_without_triton_is_an_error(monkeypatch):
    monkeypatch.setattr(tiles, "triton", None)
    with attention_backend("triton"), pytest.raises(ValueError, match="Triton is not installed"):
        way(16, 16, 1, 8, device="cpu")


def test_a_vae_whose_head_is_too_wide_for_our_kernels_runs_where_they_are_asked_for():
    block, x = AttentionBlock(168, 8), torch.randn(1, 168, 2, 2)
    expected = block(x)
    with attention_backend("triton"):
        assert torch.equal(block(x), expected) and active_backend() == "triton"


# ------------------------------------------------------------------------------------------------ the same in every way

PARITY = dict(rtol=1e-4, atol=1e-5)  # fp32 parity of a block


def float_inputs(N, L, D=32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, D, generator=generator).to(DEVICE) for n in (N, L, L)]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(("N", "L", "causal"), [(20, 20, False), (20, 20, True), (20, 7, False)])
def test_every_way_gives_the_same_answer_and_gradients(name, N, L, causal):
    expected, *gradients = answer_and_gradients(naive_attention, *float_inputs(N, L), causal)
    with attention_backend(name):
        out, *others = answer_and_gradients(attention, *float_inputs(N, L), causal)
    torch.testing.assert_close(out, expected, **PARITY)
    torch.testing.assert_close(others, gradients, **PARITY)


def answer_and_gradients(function, q, k, v, causal):
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = function(q, k, v, 4, causal)
    return out, *torch.autograd.grad(out.sin().sum(), (q, k, v))


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("causal", [False, True])
def test_queries_keys_and_values_may_be_views_of_one_projection(name, causal):
    fused = torch.cat(float_inputs(20, 20), dim=-1).requires_grad_()
    apart = [x.detach().contiguous().requires_grad_() for x in fused.chunk(3, dim=-1)]
    with attention_backend(name):
        out, expected = attention(*fused.chunk(3, dim=-1), 4, causal), attention(*apart, 4, causal)
        out.sin().sum().backward()
        expected.sin().sum().backward()
    torch.testing.assert_close(out, expected, **PARITY)
    torch.testing.assert_close(fused.grad, torch.cat([x.grad for x in apart], dim=-1), **PARITY)


# -------------------------------------------------------------------------------------------------- whole networks in each


class Calls(TorchDispatchMode):
    """Notes every call of our operations: [(name, arguments)]."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "minidiff":
            self.calls.append((function.__name__.split(".")[0], args))
        return function(*args, **(kwargs or {}))

    def named(self, name):
        return [args for one, args in self.calls if one == name]


@pytest.fixture(scope="module")
def sd():
    sd, tf32 = small_model(training_config()), torch.backends.cudnn.allow_tf32
    for part in sd.parts.values():
        part.to(DEVICE)
    torch.backends.cudnn.allow_tf32 = False  # convolutions of 10 bits would make large differences of small ones
    yield sd
    torch.backends.cudnn.allow_tf32 = tf32


def unet_inputs():
    generator = torch.Generator().manual_seed(0)
    x_t, context = torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 20, 16, generator=generator)
    return x_t.to(DEVICE), torch.tensor([700], device=DEVICE), context.to(DEVICE)


def unet_and_gradients(unet, name, checkpointing=False):
    """What the U-Net says, and the gradients of all its weights and of its context."""
    x_t, t, context = unet_inputs()
    weights = [context.requires_grad_(), *unet.parameters()]
    with attention_backend(name), with_checkpointing([unet], checkpointing):
        out = unet(x_t, t, context)
        return out, *torch.autograd.grad(out.square().mean(), weights)


@pytest.mark.parametrize("how", ["as it is", "checkpointed", "channels-last"])
def test_a_unet_and_its_gradients_are_the_same_by_our_kernels(sd, how):
    expected = unet_and_gradients(sd.unet, "pytorch")
    unet = copy.deepcopy(sd.unet).to(memory_format=torch.channels_last) if how == "channels-last" else sd.unet
    with Calls() as calls:
        ours = unet_and_gradients(unet, "triton", checkpointing=how == "checkpointed")
    torch.testing.assert_close(ours, expected, **PARITY)
    assert {name for name, _ in calls.calls} >= {"self_attention", "cross_attention_backward", "geglu"}
    assert bool(calls.named("group_norm_silu")) == (how == "channels-last")


def test_a_text_encoder_and_its_gradients_are_the_same_by_our_kernels(sd):
    tokens = sd.tokenizer(["a cat and a dog", "a pizza"]).to(DEVICE)
    answers = {}
    for name in ("pytorch", "triton"):
        with attention_backend(name):
            out = sd.text_encoder(tokens)
            answers[name] = out, *torch.autograd.grad(out.sin().mean(), list(sd.text_encoder.parameters()))
    torch.testing.assert_close(answers["triton"], answers["pytorch"], **PARITY)


@pytest.mark.parametrize("name", ATTENTION)
def test_maps_are_recorded_in_every_way_and_recording_changes_nothing(sd, name):
    with torch.no_grad(), attention_backend("pytorch"), record_cross_attention(sd.unet) as expected:
        sd.unet(*unet_inputs())
    with torch.no_grad(), attention_backend(name):
        plain = sd.unet(*unet_inputs())
        with record_cross_attention(sd.unet) as maps:
            assert torch.equal(sd.unet(*unet_inputs()), plain)
    assert maps and maps.keys() == expected.keys()
    torch.testing.assert_close(maps, expected, **PARITY)


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile of a module as one graph, which is run as it is, with its gradients; and the code of the graphs that it makes."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' checks of shapes are not for torch.compile
    graphs = []

    def noted(graph, example):
        graphs.append(
            "\n".join(part.code for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
        )  # gradients are inner ones
        return lookup_backend("aot_eager")(graph, example)

    torch._dynamo.reset()
    yield lambda module: (torch.compile(module, backend=noted, fullgraph=True, dynamic=False), graphs)
    torch._dynamo.reset()


def test_torch_compile_sees_through_the_choice_and_notices_another(compiled):
    block = TransformerBlock(16, 2, 8).to(DEVICE)
    x, context = torch.randn(1, 9, 16, device=DEVICE, requires_grad=True), torch.randn(1, 5, 8, device=DEVICE)
    fast, graphs = compiled(block)
    operations = {"pytorch": "scaled_dot_product_attention", "triton": "minidiff.cross_attention", "naive": "softmax"}
    for name, operation in operations.items():
        for _ in range(2):
            with attention_backend(name):
                answers = [(out, *torch.autograd.grad(out.sin().sum(), x)) for out in (fast(x, context), block(x, context))]
            torch.testing.assert_close(*answers, **PARITY)
        assert operation in graphs[-1] and ("minidiff" in graphs[-1]) == (name == "triton")
    assert len(graphs) == 3  # one for each name: the second call found it


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pytorch", "triton"])
def test_torch_compile_makes_one_graph_of_a_unet(sd, compiled, name):
    fast, graphs = compiled(sd.unet)
    torch.testing.assert_close(unet_and_gradients(fast, name), unet_and_gradients(sd.unet, name), **PARITY)
    assert len(graphs) == 1


def test_torch_compile_makes_one_graph_of_the_vaes_attention(compiled, monkeypatch):
    monkeypatch.setattr(minidiff.vae, "attention_backend", contextmanager(inspect.unwrap(attention_backend)))  # without the tests' checks
    block, x = AttentionBlock(16, 8), torch.randn(1, 16, 2, 2)
    fast, graphs = compiled(block)
    with attention_backend("triton"):
        torch.testing.assert_close(fast(x), block(x), **PARITY)
        assert active_backend() == "triton" and len(graphs) == 1


def lora_of(pattern):
    return lambda sd: create_lora(sd, (pattern,), rank=2, alpha=2, generator=torch.Generator().manual_seed(0))


# What the backward pass asks of the kernels, layer by layer from the U-Net's last to its first: (dq, dk, dv) and (dq, dk and dv).
ALL, KEYS_AND_VALUES, QUERIES = (True, True, True), (False, True, True), (True, False, False)
METHODS = {
    # Nothing before the first cross-attention is trained, so nobody needs the gradient of its queries, or the self-attention before it.
    "custom diffusion": (create_custom_diffusion, [ALL, ALL, ALL, KEYS_AND_VALUES], [(True, True)] * 3),
    "a LoRA on queries": (lora_of(r"^unet\..*attention\.to_q$"), [QUERIES] * 4, [(True, True)] * 3 + [(True, False)]),
    "a LoRA on all of attention": (lora_of(PATTERNS["attention"][0]), [ALL] * 4, [(True, True)] * 4),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_is_the_same_by_our_kernels_and_computes_only_the_gradients_that_are_needed(sd, method):
    create, cross, of_itself = METHODS[method]
    adapter = create(sd)
    trained = list(adapter.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in trained:  # a LoRA's factor that starts at 0 would have the other's gradient 0
            nn.init.normal_(weight, std=0.3)
    frozen = [p for p in sd.unet.parameters() if p.requires_grad]
    sd.unet.requires_grad_(False)
    adapter.attach(sd)
    try:
        answers = {}
        for name in ("pytorch", "triton"):
            with attention_backend(name), Calls() as calls:
                loss = sd.unet(*unet_inputs()).square().mean()
                answers[name] = loss, *torch.autograd.grad(loss, trained)
    finally:
        adapter.detach()
        for weight in frozen:
            weight.requires_grad_()
    torch.testing.assert_close(answers["triton"], answers["pytorch"], **PARITY)
    assert all(gradient.abs().max() > 1e-6 for gradient in answers["triton"][1:])
    assert [args[-3:] for args in calls.named("cross_attention_backward")] == cross
    assert [args[-2:] for args in calls.named("self_attention_backward")] == of_itself
