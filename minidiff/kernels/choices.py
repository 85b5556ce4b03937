"""What "auto" takes on a GPU: a table by compute capability and shape, choices.json, which a benchmark writes and nobody guesses.

    unmeasured   operation -> backend, where no row fits. No measurement stands behind these: attention is ours, as its gradients repeat bit
                 by bit; GroupNorm + SiLU and GEGLU are PyTorch's until a row says that ours are faster.
    measured     rows: what was measured on which card, and what follows from it

A row has

    operation    self, cross, group_norm_silu or geglu
    capability   of the card, as "9.0"
    dtype        bfloat16, float16 or float32
    shape        self and cross: [queries, keys, heads, width of a head]; group_norm_silu: [channels, height, width]; geglu: [rows, 2 F]
    backend      triton (ours) or pytorch
    blocks       how kernels divide their work, by kernel, where it is not their own rule: {"forward": [...]}, the fields of their `Blocks`
    measured     card, versions and microseconds, as the benchmark found them

The table is read once. So a model computes the same way in every run on the same card, and one seed gives one picture.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from torch import Tensor

from minidiff.kernels import tiles

TABLE = Path(__file__).with_name("choices.json")
OPERATIONS = ("self", "cross", "group_norm_silu", "geglu")
BACKENDS = ("triton", "pytorch")
BLOCKS = {"self": {"forward": 4, "dk_dv": 4, "dq": 4}, "cross": {"forward": 3}}  # kernels whose division a row may give; its numbers


@dataclass(frozen=True)
class Choice:
    """What computes an operation, and how its kernels divide the work where it is not by their own rule."""

    backend: str
    blocks: dict[str, tuple[int, ...]] = field(default_factory=dict)


def find(operation: str, x: Tensor, shape: Sequence[int]) -> Choice:
    """Return the table's choice for an operation on x, whose device and dtype count; the shape as in the table."""
    rows, unmeasured = read(TABLE)
    if rows and x.device.type == "cuda":
        key = operation, tiles.card_of(x.device).capability, str(x.dtype).removeprefix("torch."), tuple(shape)
        return rows.get(key, unmeasured[operation])
    return unmeasured[operation]


@tiles.constant_when_compiled
@cache
def read(path: Path) -> tuple[dict[tuple, Choice], dict[str, Choice]]:
    """Return the measured rows by operation, capability, dtype and shape, and the choices without a measurement by operation.

    Raises ValueError, naming the row, for one that cannot be followed or has no measurement.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    rows = {}
    for row in table["measured"]:
        _check(path, row)
        major, minor = row["capability"].split(".")
        key = row["operation"], (int(major), int(minor)), row["dtype"], tuple(row["shape"])
        rows[key] = Choice(row["backend"], {kernel: tuple(numbers) for kernel, numbers in row.get("blocks", {}).items()})
    return rows, {operation: Choice(backend) for operation, backend in table["unmeasured"].items()}


def write(rows: Sequence[dict], path: Path = TABLE) -> None:
    """Put measured rows into the table, in place of those of the same operation, capability, dtype and shape.

    Raises ValueError, and writes nothing, for a row that cannot be followed or has no measurement.
    """
    for row in rows:
        _check(path, row)
    table = json.loads(path.read_text(encoding="utf-8"))
    by_key = {json.dumps([row[name] for name in KEY]): row for row in (*table["measured"], *rows)}
    table["measured"] = [by_key[key] for key in sorted(by_key)]
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    read.cache_clear()


KEY = ("operation", "capability", "dtype", "shape")


def _check(path: Path, row: dict) -> None:
    if missing := [name for name in (*KEY, "backend", "measured") if not row.get(name)]:
        raise ValueError(f"{path}: a row without {missing[0]}: {row}; a benchmark on the card gives it")
    if row["operation"] not in OPERATIONS or row["backend"] not in BACKENDS:
        raise ValueError(f"{path}: {row['operation']!r} by {row['backend']!r} is unknown in {row}")
    known = BLOCKS.get(row["operation"], {})
    for kernel, numbers in row.get("blocks", {}).items():
        if len(numbers) != known.get(kernel):
            raise ValueError(
                f"{path}: blocks of {kernel!r} are {numbers} in {row}; expected {known}, kernels and how many numbers each has"
            )
