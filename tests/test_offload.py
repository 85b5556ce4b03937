"""Parts that take turns on the device: the same pictures, and never two parts there at once."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minidiff.adapters.lora import PATTERNS, create_lora
from minidiff.kernels.dispatch import attention_backend
from minidiff.offload import Offload
from minidiff.two_encoders import text_configs
from tests.small_models import small_config, small_model, xl_config

CONFIGS = {"SD": small_config(), "SDXL": xl_config()}


def give_new_parameters(module, device):
    for part in module.modules():
        for key, p in list(part.named_parameters(recurse=False)):
            setattr(part, key, nn.Parameter(p.detach().to(device)))
    return module


def on_cuda(sd):
    return [name for name, part in sd.parts.items() if any(p.device.type == "cuda" for p in part.parameters())]


@pytest.fixture(params=CONFIGS)
def sd(request):
    return small_model(CONFIGS[request.param])


def test_the_picture_is_the_same(sd):
    expected = sd.generate("a cat", steps=2, size=32)[0]
    offload = Offload(sd, torch.device("cpu"))
    assert sd.generate("a cat", steps=2, size=32)[0].tobytes() == expected.tobytes()
    assert offload.present == "vae"
    offload.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for part in sd.parts.values() for m in part.modules())


def test_the_very_same_weights_come_back(sd):
    before = {(name, key): p for name, part in sd.parts.items() for key, p in part.named_parameters()}
    offload = Offload(sd, torch.device("cpu"))
    sd.generate("a cat", steps=1, size=32)
    offload.remove()
    assert all(p is before[name, key] for name, part in sd.parts.items() for key, p in part.named_parameters())


def test_a_decoder_that_went_to_float32_stays_there(sd):
    offload = Offload(sd, torch.device("cpu"))
    sd.decode(torch.zeros(1, 4, 8, 8))
    sd.vae.double()
    offload.remove()
    assert sd.vae.post_quant_conv.weight.dtype == torch.float64


def test_one_part_after_the_other_is_on_the_gpu(sd, monkeypatch):
    """Walked on CUDA tensors without contents."""
    try:
        with FakeTensorMode():
            torch.empty(2, device="cuda")[:1]
    except RuntimeError:
        pytest.skip("this version of PyTorch needs a GPU for CUDA tensors without contents")
    lora = create_lora(sd, PATTERNS["attention"] + PATTERNS["text_encoder"], rank=2, alpha=2.0, generator=torch.Generator().manual_seed(0))
    lora.attach(sd)
    offload = Offload(sd, torch.device("cuda", 0))
    monkeypatch.setattr(nn.Module, "to", give_new_parameters)  # in place PyTorch cannot move them without a GPU
    with FakeTensorMode(allow_non_fake_inputs=True), attention_backend("pytorch"), torch.no_grad():
        told = sd.text(["a cat"], (32, 32))
        assert on_cuda(sd) == [list(text_configs(sd.config))[-1]] == [offload.present]
        answer = sd.unet(torch.zeros(1, 4, 8, 8), torch.tensor([3]), told)
        assert answer.device.type == "cpu" and on_cuda(sd) == ["unet"]
        assert sd.vae.decode(answer).device.type == "cuda" and on_cuda(sd) == ["vae"]
        sd.text(["a cat"], (32, 32))
        assert sd.vae.encode(torch.zeros(1, 3, 32, 32)).mean.device.type == "cuda" and on_cuda(sd) == ["vae"]
    offload.remove()
    assert on_cuda(sd) == []
