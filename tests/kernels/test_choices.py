"""The table of what "auto" takes on a GPU: what is in it, how a benchmark writes it, and what is refused."""

import json

import pytest
import torch

from minidiff.kernels import choices, tiles

ROW = {
    "operation": "self",
    "capability": "9.0",
    "dtype": "bfloat16",
    "shape": [4096, 4096, 8, 40],
    "backend": "pytorch",
    "measured": {"card": "a card", "triton": 70.0, "pytorch": 60.0},
}
SHAPE = (4096, 4096, 8, 40)


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "choices.json"
    path.write_text(choices.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(choices, "TABLE", path)
    monkeypatch.setattr(tiles, "_cards", {torch.device("cuda", 0): tiles.Card("a card", (9, 0), 227 * 1024)})
    return path


def find(operation="self", shape=SHAPE, dtype=torch.bfloat16):
    with torch._subclasses.FakeTensorMode():
        return choices.find(operation, torch.empty(1, dtype=dtype, device="cuda:0"), shape)


def test_the_table_that_ships_claims_nothing_without_a_measurement():
    rows, unmeasured = choices.read(choices.TABLE)
    table = json.loads(choices.TABLE.read_text(encoding="utf-8"))
    assert all(row["measured"] for row in table["measured"]) and len(rows) == len(table["measured"])
    assert {operation: choice.backend for operation, choice in unmeasured.items()} == {
        "self": "triton",
        "cross": "triton",
        "group_norm_silu": "pytorch",
        "geglu": "pytorch",
    }


def test_a_measured_row_is_taken_for_its_card_dtype_and_shape_alone(table):
    assert find().backend == "triton"
    choices.write([ROW | {"blocks": {"forward": [64, 32, 4, 2]}}], table)
    assert find() == choices.Choice("pytorch", {"forward": (64, 32, 4, 2)})
    assert find(shape=(1024, 1024, 8, 80)).backend == find(dtype=torch.float16).backend == find("cross").backend == "triton"
    tiles._cards[torch.device("cuda", 0)] = tiles.Card("another", (8, 0), 163 * 1024)
    assert find().backend == "triton"


def test_a_row_replaces_the_one_of_the_same_card_dtype_and_shape(table):
    choices.write([ROW, ROW | {"dtype": "float16"}], table)
    choices.write([ROW | {"backend": "triton"}], table)
    assert [(row["dtype"], row["backend"]) for row in json.loads(table.read_text())["measured"]] == [
        ("bfloat16", "triton"),
        ("float16", "pytorch"),
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"measured": None}, "a row without measured"),
        ({"backend": "cudnn"}, "'self' by 'cudnn' is unknown"),
        ({"operation": "softmax"}, "'softmax' by 'pytorch' is unknown"),
        ({"blocks": {"forward": [64]}}, r"blocks of 'forward' are \[64\]"),
        ({"blocks": {"delta": [64]}}, r"blocks of 'delta' are \[64\]"),
    ],
)
def test_a_row_that_cannot_be_followed_is_refused_and_nothing_is_written(table, changes, reason):
    before = table.read_text()
    with pytest.raises(ValueError, match=reason):
        choices.write([ROW, ROW | changes], table)
    assert table.read_text() == before


def test_blocks_have_as_many_numbers_as_the_kernels_blocks_have_fields():
    from dataclasses import fields

    from minidiff.kernels import cross_attention, self_attention

    assert set(choices.BLOCKS["self"].values()) == {len(fields(self_attention.Blocks))}
    assert choices.BLOCKS["cross"]["forward"] in (
        len(fields(cross_attention.Blocks)),
        len(fields(cross_attention.Blocks)) - 1,
    )  # one_pass has a default
