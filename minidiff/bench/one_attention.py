"""One way to compute attention, in this process: its errors, its memory, its times. bench/attention.py starts it, once for each contender.

Queries, keys and values are [B, N, heads * d] as the model has them; whatever a way needs done to them, and to its output, is its own cost.
"reference" is no contender: it makes the inputs and the float64 results that errors are measured against.
"""

import warnings
from collections.abc import Callable
from time import perf_counter

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minidiff.attention import attention, naive_attention
from minidiff.bench.answers import Peak, wait_for
from minidiff.bench.attention_cases import Case, directions, exact, inputs
from minidiff.bench.contender import serve
from minidiff.kernels.dispatch import attention_backend, select_backend

SDPA = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
GRAPH = 5e-3  # seconds of work in a CUDA graph
MOST_LAUNCHES = 200
MOST_SETS = 64  # of inputs in turn, so that none is in the cache

Attend = Callable[[Tensor, Tensor, Tensor, int, bool], Tensor]


# --------------------------------------------------------------------------------------------------------- the ways


def way(name: str) -> Attend:
    """The contender's function. A forced backend of PyTorch stays forced as long as the process lives."""
    if name == "minidiff":
        return attention
    if name == "triton":
        KEPT.append(attention_backend("triton"))
        KEPT[0].__enter__()
        return attention
    if name == "by hand":
        return naive_attention
    if name == "flex":
        return _flex
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name not in SDPA or not hasattr(SDPBackend, SDPA[name]):
        raise ValueError(f"this PyTorch has no backend {name!r}")
    KEPT.append(sdpa_kernel(getattr(SDPBackend, SDPA[name])))
    KEPT[0].__enter__()
    return _pytorch


KEPT = []  # what must not be collected while the process lives: a context that was entered, a compiled function


def _pytorch(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal), "B h N d -> B N (h d)")


def _flex(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if causal:
        raise ValueError("only tried without a mask")
    if not KEPT:
        KEPT.append(torch.compile(flex_attention, dynamic=False))
    q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k, v))
    return rearrange(KEPT[0](q, k, v), "B h N d -> B N (h d)")


# ------------------------------------------------------------------------------------------------------- the calls


def _results(attend: Attend, case: Case, on_device: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients."""
    q, k, v = (on_device[name].detach().requires_grad_(case.backward) for name in "qkv")
    out = attend(q, k, v, case.heads, case.causal)
    found = {"out": out.detach()}
    if case.backward:
        found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), on_device["grad"])))
    return found


def _forward_only(attend: Attend, case: Case, on_device: dict[str, Tensor]) -> Callable[[], None]:
    q, k, v = (on_device[name] for name in "qkv")

    def run() -> None:
        with torch.no_grad():
            attend(q, k, v, case.heads, case.causal)

    return run


def _both_ways(attend: Attend, case: Case, on_device: dict[str, Tensor]) -> Callable[[], None]:
    q, k, v = (on_device[name].detach().requires_grad_() for name in "qkv")

    def run() -> None:
        torch.autograd.grad(attend(q, k, v, case.heads, case.causal), (q, k, v), on_device["grad"])

    return run


WAYS = {"forward": _forward_only, "both": _both_ways}


# --------------------------------------------------------------------------------------------------------------- times


def graph_of(runs: list[Callable[[], None]], launches: int) -> torch.cuda.CUDAGraph:
    """So many launches of the runs in turn."""
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


def replayed(graph: torch.cuda.CUDAGraph, launches: int) -> float:
    """Seconds a launch, by the GPU's own clock; once before for nothing."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / launches


def eager(run: Callable[[], None], device: torch.device, least: float) -> float:
    """Seconds a call from Python, waiting for the device at the end alone, over as many calls as take `least` seconds."""
    calls = 1
    while True:
        wait_for(device)
        start = perf_counter()
        for _ in range(calls):
            run()
        wait_for(device)
        took = perf_counter() - start
        if took >= least or calls >= 1000:
            return took / calls
        calls = min(1000, max(2 * calls, int(1.2 * calls * least / max(took, 1e-9))))


class OneWay:
    """A contender at its cases: asked to "check" one, then to "time" it as often as there are rounds."""

    def __init__(self, name: str, device: torch.device):
        self.name, self.device = name, device
        self.attend = way(name) if name != "reference" else None
        self.ready: dict[str, tuple] = {}

    def answer(self, request: dict) -> dict:
        case = Case(**request["case"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return {"make": self.make, "check": self.check, "time": self.time}[request["do"]](case, request)
            except RuntimeError as error:
                # PyTorch says in warnings why each backend was passed over.
                why = [str(w.message).split(" (Triggered")[0] for w in caught if "attention" in str(w.message).lower()]
                raise RuntimeError("; ".join(dict.fromkeys(w for w in why if not w.endswith("because:"))) or str(error)) from error

    def make(self, case: Case, request: dict) -> dict:
        """For the reference: the inputs of every kind and what is exact."""
        tensors = {}
        for kind in request["kinds"]:
            given = inputs(case, kind)
            tensors[kind] = given | exact(case, given, self.device)
        torch.save(tensors, request["path"])
        return {}

    def check(self, case: Case, request: dict) -> dict:
        """RMS errors by kind and tensor; whether three runs are equal; the peak of memory of one call beside its inputs."""
        self.ready = {}
        if self.name == "flex":
            torch._dynamo.reset()  # else the ninth shape is no longer compiled
        tensors = torch.load(request["path"], mmap=True)
        told = {"errors": {}, "scales": {}, "picks": None}
        for kind, known in tensors.items():
            given = self._on_device(case, known)
            found = _results(self.attend, case, given)
            exactly = {name: known[name].to(self.device).double() for name in found}
            told["errors"][kind] = {name: _rms(found[name].double() - exactly[name]) for name in found}
            told["scales"][kind] = {name: _rms(exactly[name]) for name in found}
            if kind == "normal":
                if self.name == "minidiff":
                    told["picks"] = select_backend(*(given[name] for name in "qkv"), case.heads, case.causal)
                again = [_results(self.attend, case, given) for _ in range(2)] if self.device.type == "cuda" else []
                told["bit_equal"] = all(torch.equal(found[name], one[name]) for one in again for name in found) if again else None
        normal = self._on_device(case, tensors["normal"])
        for direction in directions(case):
            self.ready[direction] = self._prepare(case, direction, normal)
            told[f"memory_{direction}"] = self.memory(WAYS[direction](self.attend, case, normal))
        return told

    def _on_device(self, case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[name].to(self.device, getattr(torch, case.dtype)) for name in ("q", "k", "v", "grad")}

    def memory(self, run: Callable[[], None]) -> int | None:
        """Bytes at the peak of a call, above what there is before it."""
        if self.device.type == "cuda":
            wait_for(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run()
            return torch.cuda.max_memory_allocated(self.device) - before
        peak = Peak(self.device, converted=False)
        run()
        return peak.stop()["memory"]

    def _prepare(self, case: Case, direction: str, given: dict[str, Tensor]) -> tuple:
        """What is needed to time it: a call, and on a GPU graphs of many with one set of inputs and with too many for the cache."""
        run = WAYS[direction](self.attend, case, given)
        run()
        if self.device.type != "cuda":
            return (run,)
        launches = max(1, min(MOST_LAUNCHES, int(GRAPH / eager(run, self.device, 1e-3))))
        size = sum(x.nbytes for x in given.values())
        sets = min(MOST_SETS, 1 + 2 * torch.cuda.get_device_properties(self.device).L2_cache_size // size)
        runs = [WAYS[direction](self.attend, case, {name: x.clone() for name, x in given.items()}) for _ in range(sets)]
        many = max(launches, sets)
        return run, (graph_of([run], launches), launches), (graph_of(runs, many), many), runs

    def time(self, case: Case, request: dict) -> dict:
        run, *graphs = self.ready[request["direction"]]
        if not graphs:
            return {"seconds": eager(run, self.device, request["least"])}
        warm, cold, _ = graphs
        return {"seconds": replayed(*warm), "cold": replayed(*cold), "eager": eager(run, self.device, 2e-3)}


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def prepare(job: dict) -> Callable[[dict], dict]:
    torch.backends.cuda.matmul.allow_tf32 = False  # IEEE float32, as the kernels'
    return OneWay(job["contender"], torch.device(job["device"])).answer


if __name__ == "__main__":
    serve(prepare)
