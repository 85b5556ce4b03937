"""What Triton's compiler makes of our attention kernel, for a GPU that need not be there.

    python -m lessons.ptx     one JSON object for each of WAYS

PTX is the GPU's assembler text. It is searched for loads from memory and for matrix products (`wgmma`, of an H100). `cp.async` is a load that
goes on in the background. tests/kernels/compile_kernels.py does the same for all kernels and shapes.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# D_1 and D_2, the tiles of a head 40 wide, and whether d = 40 is known when the kernel is compiled.
WAYS = ((32, 16, True), (64, 0, True), (32, 16, False))


@dataclass(frozen=True)
class Counted:
    """Instructions that load 2 and 16 bytes, and the multiplications of the matrix products, for one block of keys."""

    loads_of_2: int
    loads_of_16: int
    products: int


def count_instructions() -> list[Counted]:
    """Compile the kernel in each of WAYS and count. In a process of its own, as this one may have the interpreter on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-m", "lessons.ptx"], Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=True)
    return [Counted(**json.loads(line)) for line in done.stdout.splitlines()]


def compiled() -> Iterator[str]:
    """Yield the PTX of each of WAYS, for an H100 (compute capability 9.0)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minidiff.kernels.self_attention import forward_kernel as kernel

    at = {name: i for i, name in enumerate(kernel.arg_names)}  # pyright: ignore[reportFunctionMemberAccess]
    types = dict.fromkeys(("q", "k", "v", "out"), "*fp16") | {"lse": "*fp32"}
    for D_1, D_2, d_known in WAYS:
        known = {"scale": math.log2(math.e) / math.sqrt(40), "D_1": D_1, "D_2": D_2, "CAUSAL": False, "EVEN": True}
        known |= {"BLOCK_N": 128, "BLOCK_L": 64} | ({"d": 40} if d_known else {})
        signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in at}
        multiples = {(i,): [["tt.divisibility", 16]] for name, i in at.items() if name not in known and name != "d"}
        source = ASTSource(kernel, signature, {(at[name],): value for name, value in known.items()}, multiples)
        options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
        yield triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def counted(ptx: str) -> Counted:
    """Count what is of interest in a kernel's PTX."""
    shapes = re.findall(r"wgmma\.mma_async\S*\.m(\d+)n(\d+)k(\d+)\.", ptx)
    return Counted(
        loads_of_2=len(re.findall(r"ld\.global\S*\.[bu]16\b", ptx)),
        loads_of_16=len(re.findall(r"ld\.global\S*\.v4\.|cp\.async\S*\.global .*(?:0x10|\b16)\b", ptx)),
        products=sum(math.prod(map(int, shape)) for shape in shapes),
    )


if __name__ == "__main__":
    for text in compiled():
        print(json.dumps(asdict(counted(text))), flush=True)
