"""Compiles kernels for GPUs that are not there, and tells what became of them: tensor-core instructions, narrow loads, spills, shared memory.

    python -m tests.kernels.compile_kernels tests.kernels.test_compiled 90 bfloat16      one JSON object a kernel

This is for compute capability 9.0 (H100, H200); 8.0 is an A100, 8.6 and 8.9 are GeForce 30 and 40. The named module has CASES: {name: function
without arguments}, of which those are taken whose name has the last word in it. Each function calls our operations, forward and backward, as a
model would, on uninitialised CPU tensors of full size. Nothing is computed: every launch of a kernel is caught with its arguments, and compiled as
Triton would compile it for just these, each distinct one once. In a process of its own, as TRITON_INTERPRET must not be set.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
# Bytes that one program may have: CUDA programming guide, table of compute capabilities.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Built:
    """A compiled kernel. case: the first that launched it; arguments: what it was compiled for."""

    case: str
    kernel: str
    arguments: str
    tensor_core: int  # mma, wgmma and tcgen05.mma instructions
    narrow_loads: int  # of 2 bytes from global memory
    wide_loads: int  # of 16 bytes
    registers: int  # of a thread, of 255
    stack: int  # bytes of a thread in global memory: registers that were spilled
    shared: int  # bytes of a program
    seconds: float


def built(module: str, capability: int, part: str = "") -> list[Built]:
    """What became of every kernel of a module's CASES that have `part` in their name, compiled in another process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", module, str(capability), part]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return [Built(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def assert_compiled_well(kernel: Built, capability: int, narrow_loads: int = 0):
    """What holds for every kernel of ours, whatever it computes. narrow_loads: where a thread's share of a block is one number."""
    assert kernel.stack <= spilled_by_this_triton(), f"{kernel} keeps registers in memory"
    assert kernel.narrow_loads == narrow_loads and kernel.wide_loads > 0, f"{kernel} loads its inputs in small pieces"
    assert kernel.shared <= SHARED_MEMORY[capability], f"{kernel} needs more shared memory than there is"


def spilled_by_this_triton() -> int:
    """Bytes of stack that a thread may have: none, but for Triton 3.4 (torch 2.8), of which up to 136 were seen below 9.0: slower, not wrong."""
    return 136 if tuple(map(int, version("triton").split(".")[:2])) < (3, 6) else 0


@dataclass
class Launch:
    kernel: object  # a triton.JITFunction
    arguments: tuple
    options: dict[str, int | bool]  # num_warps and such


def launches(call: Callable[[], None], capability: int) -> list[Launch]:
    """What `call` would have launched on a card of this capability."""
    from triton import JITFunction

    from minidiff.kernels import tiles

    caught = []

    def run(kernel, *arguments, grid, warmup, **options):
        rest = [options.pop(name) for name in kernel.arg_names[len(arguments) :]]  # what was given by name
        caught.append(Launch(kernel, (*arguments, *rest), options))

    as_there = mock.patch.object(tiles, "capability_of", lambda x: divmod(capability, 10))
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(tiles, "DEVICE", "cpu"), as_there:
        call()
    return caught


def specialised(launch: Launch) -> tuple[dict, dict, dict]:
    """Triton's own rules: an argument that is 1, and a constexpr, are compiled in; a number or an address that 16 divides is known to be so."""
    import torch

    types = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments, strict=True)):
        if parameter.is_constexpr or value is None or type(value) is int and value == 1:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = types[value.dtype], [["tt.divisibility", 16]]  # as PyTorch allocates
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            attributes |= {(i,): [["tt.divisibility", 16]]} if value % 16 == 0 else {}
    return signature, constants, attributes


def build(case: str, launch: Launch, capability: int) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = time.perf_counter()
    source = ASTSource(launch.kernel, *specialised(launch))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx = compiled.asm["ptx"]
    registers, stack = resources(compiled.asm["cubin"])
    return Built(
        case=case,
        kernel=launch.kernel.__name__,
        arguments=f"{ {launch.kernel.arg_names[i]: value for (i,), value in source.constants.items()} } {launch.options}",
        tensor_core=len(re.findall(r"\b(?:(?:wgmma\.mma_async|mma)\.sync|tcgen05\.mma)\.", ptx)),
        narrow_loads=len(re.findall(r"\bld\.global\S*\.[bu]16\b", ptx)),
        wide_loads=len(re.findall(r"\bld\.global\S*\.v4\.[bf]32\b|\bcp\.async\S*\.global .*(?:0x10|\b16)\b", ptx)),
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        seconds=round(time.perf_counter() - start, 2),
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, by the tool that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))


def main(module: str, capability: int, part: str) -> Iterator[Built]:
    seen = set()
    for case, call in importlib.import_module(module).CASES.items():
        for launch in launches(call, capability) if part in case else []:
            key = (launch.kernel.__name__, str(specialised(launch)), str(launch.options))
            if key not in seen:
                seen.add(key)
                yield build(case, launch, capability)


if __name__ == "__main__":
    for kernel in main(sys.argv[1], int(sys.argv[2]), sys.argv[3]):
        print(json.dumps(asdict(kernel)), flush=True)
