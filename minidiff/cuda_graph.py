"""CUDA graph: the U-Net's kernels, captured once and launched together at every step.

    first call   runs as it is, which also prepares what cannot be captured
    second call  is captured: PyTorch launches some 1,300 kernels one by one, a graph all at once
    after that   x_t, t and the conditioning are copied into buffers and the graph is replayed: same operations, same bits

A graph reads and writes where it did when it was captured. So it holds as long as the weights stay where they are and the adapters on the
model report no change; new values that are written into the same memory, by an optimizer or `load_state_dict`, are seen by the next replay.
It is kept from picture to picture, with the memory of the U-Net's activations. Where it does not hold any more, the next two calls begin
anew. A ControlNet's residuals are inputs like the others; they come and go with its interval, so there is a graph with them and one
without. (A U-Net with its own attribute changed by hand, which no adapter reports, is not noticed: `to()`, hooks and adapters are.)

Left out: the guidance formula and the sampler's ten small operations on the latents; they are launched while the graph still runs.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.conditioning import Conditioning
from minidiff.kernels.dispatch import active_backend
from minidiff.unet import UNet


class UNetGraph:
    """unet(x_t, t, conditioning) by a CUDA graph, where one can be used; else, and until then, by the U-Net itself.

    attached: the adapters on the model, as they are at each call (StableDiffusion.attached).
    """

    def __init__(self, unet: UNet, attached: Sequence[Any]):
        self.unet, self.attached = unet, attached
        self.capturable = True
        self.key: tuple | None = None
        self.replays: dict[tuple, Callable[[list[Tensor]], Tensor] | None] = {}  # by the shapes of the residuals; None: was called once

    def __call__(self, x_t: Float[Tensor, "B C H W"], t: Shaped[Tensor, " B"], conditioning: Conditioning) -> Float[Tensor, "R C_out H W"]:
        """Return the U-Net's prediction; the caller may keep it."""
        inputs = [x_t, t, *conditioning.tensors()]
        if not self._usable():
            self.key, self.replays = None, {}
            return self.unet(x_t, t, conditioning)
        fields, residuals = (conditioning.pooled is None, conditioning.size is None), _kinds(conditioning.residuals)
        key = self._dependencies(), fields, _kinds(inputs[: len(inputs) - len(residuals)])
        if key != self.key:
            self.key, self.replays = key, {}
        if residuals not in self.replays:
            self.replays[residuals] = None
            return self.unet(x_t, t, conditioning)
        replay = self.replays[residuals]
        if replay is None:
            try:
                replay = self.replays[residuals] = self._capture(inputs, conditioning)
            except RuntimeError as error:
                warnings.warn(f"this U-Net cannot be captured as a CUDA graph and runs without: {error}", stacklevel=2)
                self.capturable = False
                return self.unet(x_t, t, conditioning)
        return replay(inputs)

    def _usable(self) -> bool:
        """Whether nothing on the U-Net may do something else at each call, or keeps what it has seen: no gradients, no foreign hooks."""
        compiled = self.unet._compiled_call_impl is not None  # torch.compile has graphs of its own
        return self.capturable and not compiled and not torch.is_grad_enabled() and not self._foreign_hooks()

    def _foreign_hooks(self) -> bool:
        """Whether a hook on the U-Net belongs to no adapter in `attached`: is no method of one or of its parts, nor a partial of such."""
        owners = {id(part) for adapter in self.attached for part in adapter.modules()}
        return any(id(_owner(hook)) not in owners for hook in _hooks(self.unet))

    def _dependencies(self) -> tuple:
        """Return what a captured graph depends on besides its inputs; a graph holds while this stays equal."""
        weights = [p for module in (self.unet, *self.attached) for p in module.parameters()]
        places = tuple((p.data_ptr(), p.dtype, p.stride()) for p in weights)
        versions = tuple((id(adapter), adapter.version) for adapter in self.attached)
        device = weights[0].device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return places, versions, active_backend(), autocast, torch.is_inference_mode_enabled()

    def _capture(self, inputs: list[Tensor], conditioning: Conditioning) -> Callable[[list[Tensor]], Tensor]:
        buffers = [x.clone() for x in inputs]
        x_t, t, *given = buffers
        device = x_t.device
        # Casts that autocast made before are not to be used: they are freed with its block.
        run = torch.autocast(
            device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type), cache_enabled=False
        )(lambda: self.unet(x_t, t, conditioning.with_tensors(given)))
        output, replay = CAPTURE[device.type](run, device)

        def replay_with(inputs: list[Tensor]) -> Tensor:
            for buffer, x in zip(buffers, inputs):
                buffer.copy_(x)
            replay()
            return output.clone()  # the next call overwrites it, and samplers keep some

        return replay_with

    def __deepcopy__(self, memo: dict[int, Any]) -> "UNetGraph":
        """Return one without a graph: a deep copy of the model captures its own."""
        return UNetGraph(deepcopy(self.unet, memo), deepcopy(self.attached, memo))


def _kinds(tensors: Sequence[Tensor]) -> tuple:
    return tuple((x.shape, x.dtype, x.device) for x in tensors)


def _owner(hook: Callable) -> object:
    """Return the object whose method a hook is, or None."""
    return getattr(hook.func if isinstance(hook, partial) else hook, "__self__", None)


def _hooks(module: nn.Module) -> Iterator[Callable]:
    """Yield all forward hooks and forward pre-hooks of a module and of its parts."""
    for part in module.modules():
        yield from part._forward_pre_hooks.values()
        yield from part._forward_hooks.values()


def _capture_on_cuda(f: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """Capture what f launches, without running it; return the tensor that f returned, and a function that computes it anew."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # by itself it would take one of the first device it ever saw
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = f()
    return output, graph.replay


CAPTURE = {"cuda": _capture_on_cuda}  # by the type of the device
