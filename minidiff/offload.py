"""Draw with a model that is larger than the GPU's memory: its parts wait on the CPU and take turns on the device.

    CPU     text encoder, text encoder 2, U-Net, VAE
    device  the one that runs; when the next one is called, it goes back

SDXL in float16 has 6.9 GB of weights, of which the U-Net's 5.1 are needed at once. From outside the model stays where it was: whatever a
part is given is moved to the device, and the U-Net's answer back. Each picture moves each part once.

Left out: moving single layers, which needs less memory still and is slower by far.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minidiff.conditioning import Conditioning
from minidiff.pipeline import StableDiffusion


class Offload:
    """Hooks that move each part of a model to `device` when it is called; `remove` takes them off and the parts back.

    The weights on the CPU stay there and are taken up again afterwards, so nothing may change them meanwhile but their dtype.
    """

    def __init__(self, sd: StableDiffusion, device: torch.device):
        self.sd, self.device = sd, device
        self.present: str | None = None
        self._waiting: dict[tuple[nn.Module, str], nn.Parameter] = {}  # those of the part that is on the device
        self._handles: list[RemovableHandle] = [sd.unet.register_forward_hook(self._bring_back)]
        for name, part in sd.parts.items():
            # The VAE is called by its methods, which begin with one of these.
            for entrance in (sd.vae.encoder, sd.vae.post_quant_conv) if name == "vae" else (part,):
                self._handles.append(entrance.register_forward_pre_hook(partial(self._arrive, name)))

    def remove(self) -> None:
        """Take off the hooks, and bring the part that is on the device back."""
        for handle in self._handles:
            handle.remove()
        self._leave()

    def _arrive(self, name: str, entrance: nn.Module, args: tuple) -> tuple:
        if name != self.present:
            self._leave()
            for module in self.sd.parts[name].modules():
                for key, weight in module.named_parameters(recurse=False):
                    self._waiting[module, key] = weight
                    setattr(module, key, nn.Parameter(weight.detach().to(self.device), requires_grad=False))
            for adapter in self.sd.attached:
                adapter.to(self.device)
            self.present = name
        return tuple(_moved(x, self.device) for x in args)

    def _leave(self) -> None:
        for (module, key), waiting in self._waiting.items():
            weight = getattr(module, key)
            setattr(module, key, waiting if weight.dtype == waiting.dtype else nn.Parameter(weight.detach().cpu(), requires_grad=False))
        self._waiting, self.present = {}, None

    def _bring_back(self, unet: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.cpu()


def _moved(x: object, device: torch.device) -> object:
    if isinstance(x, Conditioning):
        return x.with_tensors([tensor.to(device) for tensor in x.tensors()])
    return x.to(device) if isinstance(x, Tensor) else x
