"""What a worker of step, image or train answers when it is asked: its result and its memory, then the time of its runs."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from minidiff.bench.load_worker import ProcessMemory, resident_and_anonymous

Call = Callable[[], torch.Tensor]


class PeakMemory:
    """The peak memory of this process above its level at the start, in bytes: of the GPU if there is one, else of the machine.

    converted: the weights come from a file of another dtype, whose pages can be given back at any time and do not count.
    """

    def __init__(self, device: torch.device, converted: bool):
        self.device, self.converted = device, converted
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.memory = ProcessMemory().__enter__() if device.type == "cpu" and Path("/proc/self/clear_refs").exists() else None

    def reset(self) -> None:
        """Start the peak again from what the process has now; the level at the start stays."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.memory is not None:
            Path("/proc/self/clear_refs").write_text("5")
            self.memory.anonymous_peak = resident_and_anonymous()[1]

    def stop(self) -> dict[str, int | None]:
        """Stop watching and return the peak, with what it consists of."""
        if self.device.type == "cuda":
            return {
                "memory": torch.cuda.max_memory_allocated(self.device) - self.before,
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
        if self.memory is None:
            return {"memory": None}
        self.memory.__exit__()
        resident_peak, _, anonymous_peak, _ = self.memory.above()
        return {"memory": anonymous_peak if self.converted else resident_peak, "resident": resident_peak, "anonymous": anonymous_peak}


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Return seconds per call, waiting for the device only before the first and after the last."""
    wait_for(device)
    start = perf_counter()
    for _ in range(calls):
        run()
    wait_for(device)
    return (perf_counter() - start) / calls


def answer_with(run: Call, peak: PeakMemory, check: Call | None = None) -> Callable[[dict], dict]:
    """Return the function that answers requests: "check" saves the result and tells the memory, "time" tells the seconds per run.

    check: gives the result, if that of `run` differs from call to call.
    """
    check = check or run

    def answer(request: dict) -> dict:
        if request["do"] == "time":
            return {"seconds": time_calls(run, peak.device, request["repeats"])}
        start = perf_counter()
        results = [check().detach().float().cpu().clone()]
        wait_for(peak.device)
        told: dict[str, object] = {"first_run": perf_counter() - start}
        if peak.device.type == "cuda":  # on a CPU a run takes long, and the order of its sums is fixed
            results += [check().detach().float().cpu().clone() for _ in range(2)]
            told["bit_equal"] = all(torch.equal(results[0], again) for again in results[1:])
        if peak.device.type == "cuda" or check is not run:
            time_calls(run, peak.device, 1)  # not counted: the optimizer makes its state, compilers compile
            told["seconds"] = time_calls(run, peak.device, 1)
        np.save(request["result"], results[0].numpy())
        return told | peak.stop()

    return answer
