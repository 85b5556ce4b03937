"""Compute attention in one way in this process: its errors, its memory, its times. bench/attention.py starts one for each contender.

Queries, keys and values are [B, N, heads * d] as the model has them; rearranging them for a backend, and its output, counts as its time.
"reference" is no contender: it makes the inputs, and the float64 results that errors are measured against.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial

import torch
from einops import rearrange
from torch import Tensor

from minidiff.attention import attention, naive_attention
from minidiff.bench.attention_cases import AttentionCase, directions, exact, inputs
from minidiff.bench.contender import serve
from minidiff.bench.worker_protocol import PeakMemory, time_calls
from minidiff.kernels.dispatch import attention_backend, fused_attention, select_backend

SDPA = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
GRAPH_SECONDS = 5e-3  # seconds of work in a CUDA graph
MAX_LAUNCHES = 200
MAX_SETS = 64  # of inputs in turn, so that none is in the cache

Attend = Callable[[Tensor, Tensor, Tensor, int, bool], Tensor]


# --------------------------------------------------------------------------------------------------------- the ways


def choose_attention(name: str) -> Attend:
    """Return the contender's function. A backend is forced for as long as the process lives."""
    if name == "triton":
        FORCED.enter_context(attention_backend("triton"))
    functions: dict[str, Attend] = {"minidiff": attention, "triton": attention, "by hand": naive_attention, "flex": _flex}
    if name in functions:
        return functions[name]
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name not in SDPA or not hasattr(SDPBackend, SDPA[name]):
        raise ValueError(f"this PyTorch has no backend {name!r}")
    FORCED.enter_context(sdpa_kernel(getattr(SDPBackend, SDPA[name])))
    return partial(fused_attention, "pytorch")


FORCED = ExitStack()  # never left


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    if causal:
        raise ValueError("only tried without a mask")
    q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k, v))
    return rearrange(_compiled_flex()(q, k, v), "B h N d -> B N (h d)")


# ------------------------------------------------------------------------------------------------------- the calls


def _make_call(attend: Attend, case: AttentionCase, given: dict[str, Tensor], direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call that computes the output and, with direction "both", the gradients of q, k and v.

    Args:
        attend: The contender's function.
        case: The shape.
        given: q, k, v and the gradient of the output, on the device.
        direction: One of `directions`.
    """
    both = direction == "both"
    q, k, v = (given[name].detach().requires_grad_(both) for name in "qkv")

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(both):
            out = attend(q, k, v, case.heads, case.causal)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), given["grad"])) if both else (out,)

    return run


# --------------------------------------------------------------------------------------------------------------- times


def capture_graph(runs: Sequence[Callable[[], object]], launches: int) -> torch.cuda.CUDAGraph:
    """Capture that many launches of the runs, in turn, in a CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for run in runs[:3]:
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            runs[i % len(runs)]()
    return graph


def time_replay(graph: torch.cuda.CUDAGraph, launches: int) -> float:
    """Return seconds per launch by the GPU's own clock, after a replay that does not count."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / launches


def time_eager(run: Callable[[], object], device: torch.device, least: float) -> float:
    """Return seconds per call from Python, waiting for the device only at the end, over as many calls as take `least` seconds."""
    calls = 1
    while True:
        seconds = time_calls(run, device, calls)
        if calls * seconds >= least or calls >= 1000:
            return seconds
        calls = min(1000, max(2 * calls, int(1.2 * least / max(seconds, 1e-12))))


class AttentionWorker:
    """One contender: asked to "check" a case, then to "time" it in every round."""

    def __init__(self, name: str, device: torch.device):
        self.name, self.device = name, device
        self.attend = choose_attention(name if name != "reference" else "by hand")
        self.ready: dict[str, tuple] = {}

    def answer(self, request: dict) -> dict:
        """Answer a request. Raises RuntimeError with PyTorch's reasons if it has no backend for the case."""
        case = AttentionCase(**request["case"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return {"make": self.make, "check": self.check, "time": self.time}[request["do"]](case, request)
            except RuntimeError as error:
                # PyTorch says in warnings why each backend was passed over.
                why = [str(w.message).split(" (Triggered")[0] for w in caught if "attention" in str(w.message).lower()]
                raise RuntimeError("; ".join(dict.fromkeys(w for w in why if not w.endswith("because:"))) or str(error)) from error

    def make(self, case: AttentionCase, request: dict) -> dict:
        """Write the inputs of every kind and their exact results: the reference's task."""
        given = {kind: inputs(case, kind) for kind in request["kinds"]}
        torch.save({kind: tensors | exact(case, tensors, self.device) for kind, tensors in given.items()}, request["path"])
        return {}

    def check(self, case: AttentionCase, request: dict) -> dict:
        """Measure RMS errors by kind and tensor, whether three runs are equal, and the peak memory of a call above its inputs."""
        self.ready = {}
        if self.name == "flex":
            torch._dynamo.reset()  # else the ninth shape is no longer compiled
        tensors = torch.load(request["path"], mmap=True)
        told = {"errors": {}, "scales": {}, "picks": None}
        for kind, known in tensors.items():
            given = self._on_device(case, known)
            run = _make_call(self.attend, case, given, directions(case)[-1])
            found = dict(zip(("out", "dq", "dk", "dv"), run()))
            exactly = {name: known[name].to(self.device).double() for name in found}
            told["errors"][kind] = {name: _rms(found[name].double() - exactly[name]) for name in found}
            told["scales"][kind] = {name: _rms(exactly[name]) for name in found}
            if kind == "normal":
                if self.name == "minidiff":
                    told["picks"] = select_backend(given["q"], given["k"], given["v"], case.heads, case.causal)
                again = [run() for _ in range(2)] if self.device.type == "cuda" else []
                told["bit_equal"] = all(torch.equal(x, y) for one in again for x, y in zip(one, found.values())) if again else None
        normal = self._on_device(case, tensors["normal"])
        for direction in directions(case):
            self.ready[direction] = self._prepare(case, direction, normal)
            told[f"memory_{direction}"] = self.memory(_make_call(self.attend, case, normal, direction))
        return told

    def _on_device(self, case: AttentionCase, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[name].to(self.device, getattr(torch, case.dtype)) for name in ("q", "k", "v", "grad")}

    def memory(self, run: Callable[[], object]) -> int | None:
        """Return the peak bytes of a call, above what is there before it."""
        peak = PeakMemory(self.device, converted=False)
        peak.reset()
        run()
        return peak.stop()["memory"]

    def _prepare(self, case: AttentionCase, direction: str, given: dict[str, Tensor]) -> tuple:
        """Prepare the timing: a call; on a GPU also graphs of many calls, on one set of inputs and on more sets than the cache holds."""
        run = _make_call(self.attend, case, given, direction)
        run()
        if self.device.type != "cuda":
            return (run,)
        launches = max(1, min(MAX_LAUNCHES, int(GRAPH_SECONDS / time_eager(run, self.device, 1e-3))))
        size = sum(x.nbytes for x in given.values())
        sets = min(MAX_SETS, 1 + 2 * torch.cuda.get_device_properties(self.device).L2_cache_size // size)
        runs = [_make_call(self.attend, case, {name: x.clone() for name, x in given.items()}, direction) for _ in range(sets)]
        many = max(launches, sets)
        return run, (capture_graph([run], launches), launches), (capture_graph(runs, many), many), runs

    def time(self, case: AttentionCase, request: dict) -> dict:
        """Time the case that was checked last."""
        run, *graphs = self.ready[request["direction"]]
        if not graphs:
            return {"seconds": time_eager(run, self.device, request["least"])}
        warm, cold, _ = graphs
        return {"seconds": time_replay(*warm), "cold": time_replay(*cold), "eager": time_eager(run, self.device, 2e-3)}


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def prepare(job: dict) -> Callable[[dict], dict]:
    """Return the function that answers, for a contender of that name."""
    torch.backends.cuda.matmul.allow_tf32 = False  # IEEE float32, as the kernels'
    return AttentionWorker(job["contender"], torch.device(job["device"])).answer


if __name__ == "__main__":
    serve(prepare)
