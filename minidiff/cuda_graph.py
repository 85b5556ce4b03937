"""What a walk from noise to picture need not work out at every step, or not in this way: same pictures, less time.

    keys_values     to_k and to_v of the text, which stays the same: once a walk                    the same bits
    time_table      the time's vector and its projection in every ResBlock, for all steps at once   equal up to rounding
    shared_prefix   what comes before the first cross-attention: once for both halves of guidance   equal up to rounding
    channels_last   16-bit convolutions with the channels innermost in memory                       equal up to rounding
    graph           on CUDA: all kernels of U-Net and guidance recorded once, launched at one go    the same bits

The first two and the last remember something. Nothing of it outlives the walk, and before each use it is made sure that what it was made
from is as it was: the very same memory, not written to since. So adapters may come, go and be re-weighted and weights may move or be
trained between two steps. (Unnoticed goes what PyTorch knows nothing of: writing into weights through `.data` or by a kernel of one's own.)

Left out: the sampler's ten small operations on the latents are not in the graph; they are launched while it still runs.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from minidiff.blocks import ResBlock, TimeEmbedding, TransformerBlock
from minidiff.kernels.dispatch import active_backend
from minidiff.unet import UNet

Model = Callable[[Tensor, Tensor], Tensor]  # of x_t and t


@dataclass(frozen=True)
class Savings:
    """Which of them are taken; see above."""

    keys_values: bool = True
    time_table: bool = True
    shared_prefix: bool = True
    channels_last: bool = True
    graph: bool = True


NO_SAVINGS = Savings(False, False, False, False, False)


def channels_last(module: nn.Module) -> None:
    """Lays out 16-bit convolution weights as their kernels want them on a CPU or CUDA; what they compute is laid out in the same way.

    Values and shapes stay. In float32 it gains nothing: a CPU's kernels copy into a layout of their own either way.
    """
    weights = [part.weight for part in module.modules() if isinstance(part, nn.Conv2d)]
    if all(weight.dtype.itemsize == 2 and weight.device.type in ("cpu", "cuda") for weight in weights):
        module.to(memory_format=torch.channels_last)


def saving(model: Model, unet: UNet, timesteps: Callable[[], Sequence[float]], savings: Savings) -> Model:
    """model(x_t, t), which runs `unet` and a text that stays, for one walk. timesteps(): all that it will be asked for.

    A U-Net that runs through torch.compile is left to it.
    """
    in_place = {}
    if savings.keys_values:
        attentions = [block.cross_attention for block in unet.modules() if isinstance(block, TransformerBlock)]
        in_place |= {layer: SameInput(layer) for attention in attentions for layer in (attention.to_k, attention.to_v)}
    if savings.time_table:
        table = TimeTable(unet, timesteps)
        in_place |= {unet.time_embedding: table.embed} | {layer: partial(table.project, layer) for layer in table.projections}

    def remembering(x_t: Tensor, t: Tensor) -> Tensor:
        with put_in(in_place):
            return model(x_t, t)

    recorded = Recorded(remembering, unet)

    def choose(x_t: Tensor, t: Tensor) -> Tensor:
        if unet._compiled_call_impl is not None:
            return model(x_t, t)
        return recorded(x_t, t) if savings.graph and x_t.device.type in CAPTURE else remembering(x_t, t)

    return choose


@contextmanager
def put_in(functions: dict[nn.Module, Callable]) -> Iterator[None]:
    """Within the block the modules compute by these functions, in this thread. Hooks on the modules run as ever."""
    thread = get_ident()

    def forward(module: nn.Module, *args):
        return functions[module](*args) if get_ident() == thread else type(module).forward(module, *args)

    free = [module for module in functions if "forward" not in vars(module)]  # else somebody else has put in something
    for module in free:
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module in free:
            vars(module).pop("forward", None)


# ------------------------------------------------------------------------------------------------------ what is remembered


_optimizer_steps = 0  # of all optimizers of the process


def _count(*args):
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count)


class Seen:
    """Some tensors as they were when they were seen.

    It keeps their memory, so that nothing else can come to lie at the same address. PyTorch counts in `_version` how often a tensor was
    written to, but not what its fused optimizers write (2.15): their steps are counted above. Tensors of torch.inference_mode have no count
    and are never the same.
    """

    def __init__(self, *tensors: Tensor):
        self.kept = [(tensor.detach(), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]
        self.optimizer_steps = _optimizer_steps

    def same(self, *tensors: Tensor) -> bool:
        known = len(tensors) == len(self.kept) and self.optimizer_steps == _optimizer_steps
        return known and all(map(_unchanged, tensors, self.kept))


def _unchanged(tensor: Tensor, kept: tuple[Tensor, int]) -> bool:
    before, version = kept
    where = tensor.data_ptr() == before.data_ptr() and tensor.shape == before.shape and tensor.stride() == before.stride()
    return where and tensor.dtype == before.dtype and not tensor.is_inference() and tensor._version == version


class SameInput:
    """A Linear that, asked again about the same input, gives the answer that it gave."""

    def __init__(self, layer: nn.Linear):
        self.layer, self.seen, self.answer = layer, None, None

    def __call__(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D_out"]:
        made_from = x, *self.layer.parameters()
        if self.seen is None or not self.seen.same(*made_from):
            self.answer = type(self.layer).forward(self.layer, x)
            self.seen = Seen(*made_from)
        return self.answer


class TimeTable:
    """The time embedding of all steps and its projections in all ResBlocks, worked out together: a row a timestep, side by side."""

    def __init__(self, unet: UNet, timesteps: Callable[[], Sequence[float]]):
        self.embedding, self.timesteps = unet.time_embedding, timesteps
        self.projections = [block.time_projection for block in unet.modules() if isinstance(block, ResBlock)]
        self.seen = None
        self.now: tuple[Tensor, dict[nn.Module, Tensor]] | None = None  # the embedding given last, and its projections

    def embed(self, t: Shaped[Tensor, " B"]) -> Float[Tensor, "B D_time"]:
        """Rows of the table. For a timestep that it does not have NaN, never another's row."""
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in self.embedding.children()):
            return TimeEmbedding.forward(self.embedding, t)  # an adapter inside: nobody knows when it changes
        made_from = *self.embedding.parameters(), *(p for layer in self.projections for p in layer.parameters())
        if self.seen is None or not self.seen.same(*made_from):
            self._fill(t.device)
            self.seen = Seen(*made_from)
        rows = torch.cat([self.t == t[:, None].float(), torch.ones_like(t[:, None], dtype=torch.bool)], dim=1).int().argmax(dim=1)
        time, *projected = self.table[rows].split(self.widths, dim=1)
        self.now = time, dict(zip(self.projections, projected))
        return time

    def project(self, layer: nn.Linear, time: Float[Tensor, "B D_time"]) -> Float[Tensor, "B C"]:
        if self.now is None or time is not self.now[0]:
            return type(layer).forward(layer, time)
        return self.now[1][layer]

    def _fill(self, device: torch.device):
        self.t = torch.tensor(sorted(set(self.timesteps())), dtype=torch.float32, device=device)
        time = TimeEmbedding.forward(self.embedding, self.t)
        columns = [time, *(type(layer).forward(layer, time) for layer in self.projections)]
        self.widths = [column.shape[1] for column in columns]
        table = torch.cat(columns, dim=1)
        self.table = torch.cat([table, torch.full_like(table[:1], torch.nan)])


# ------------------------------------------------------------------------------------------------------------- CUDA graph


class Recorded:
    """model(x_t, t) as a CUDA graph: launched at one go, where PyTorch launches some 1,300 kernels one by one.

    A graph reads and writes where it did when it was recorded. So x_t and t are copied to buffers that stay, and everything else must stay
    where it is: as soon as anything changed (see `taken_up`), a call runs as it is, which also prepares what cannot be recorded, and the
    next one records anew.
    """

    def __init__(self, model: Model, unet: UNet):
        self.model, self.unet, self.works = model, unet, True
        self.seen, self.settings, self.replay = None, None, None

    def __call__(self, x_t: Float[Tensor, "B C H W"], t: Shaped[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
        now = taken_up(self.unet) if self.works else None
        if now is None:
            self.seen = self.replay = None
            return self.model(x_t, t)
        tensors, settings = now
        settings += (x_t.shape, x_t.dtype, x_t.device, t.shape, t.dtype, torch.is_inference_mode_enabled())
        if self.seen is None or settings != self.settings or not self.seen.same(*tensors):
            self.seen, self.settings, self.replay = Seen(*tensors), settings, None
            return self.model(x_t, t)
        if self.replay is None:
            self.x_t, self.t = x_t.clone(), t.clone()
            try:
                self.answer, self.replay = CAPTURE[x_t.device.type](lambda: self.model(self.x_t, self.t), x_t.device)
            except RuntimeError as error:
                warnings.warn(f"this U-Net cannot be recorded as a CUDA graph and runs without: {error}", stacklevel=2)
                self.works = False
                return self.model(x_t, t)
        self.x_t.copy_(x_t)
        self.t.copy_(t)
        self.replay()
        return self.answer.clone()  # the next call overwrites it, and samplers keep some


def cuda_graph(f: Callable, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """Records what f launches, without running it; gives the tensor that f returned, and a function that fills it anew."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # by itself it would take one of the first device it ever saw
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        answer = f()
    return answer, graph.replay


CAPTURE = {"cuda": cuda_graph}  # by the type of the device


def taken_up(unet: UNet) -> tuple[list[Tensor], tuple] | None:
    """All that a recording of the U-Net takes up: tensors, and settings that were read on the way.

    None where a hook is on it that is not of our adapters: such a hook may do other things at each call.
    """
    modules = list(unet.modules())
    hooks = {key: hook for m in modules for key, hook in (*m._forward_pre_hooks.items(), *m._forward_hooks.items())}  # no key comes twice
    owners = {}
    for hook in hooks.values():
        function, arguments = (hook.func, hook.args) if isinstance(hook, partial) else (hook, ())
        if not getattr(function, "__module__", "").startswith("minidiff.adapters."):
            return None
        owners |= dict.fromkeys([getattr(function, "__self__", None), *arguments])
    adapters = dict.fromkeys(part for owner in owners if isinstance(owner, nn.Module) for part in owner.modules())
    tensors = [p for m in (*modules, *adapters) for p in m._parameters.values() if p is not None]
    tensors += [owner for owner in owners if isinstance(owner, Tensor)]
    numbers = [v for part in adapters for v in vars(part).values() if isinstance(v, (bool, int, float))]  # a LoRA's weight, training, ...
    return tensors, (active_backend(), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), *hooks, *numbers)
