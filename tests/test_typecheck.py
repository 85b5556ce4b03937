"""The shape annotations are alive in the tests: a wrong shape, a wrong dtype and a wrong annotation are each an error."""

import sys

import pytest
import torch
from jaxtyping import TypeCheckError, install_import_hook

from minidiff.attention import attention, attention_weights
from minidiff.blocks import ResBlock, timestep_embedding
from minidiff.guidance import guide
from weights_loader.families.shared import UNET_LDM
from weights_loader.name_table import name_table


def test_keys_and_values_of_different_length_are_refused():
    q, k, v = torch.zeros(1, 5, 8), torch.zeros(1, 3, 8), torch.zeros(1, 4, 8)
    with pytest.raises(TypeCheckError, match="v"):
        attention(q, k, v, 2)


def test_a_tensor_of_the_wrong_dtype_is_refused():
    x = torch.zeros(1, 5, 8)
    with pytest.raises(TypeCheckError):
        attention_weights(x.long(), x, 2)


def test_the_methods_of_modules_are_checked():
    with pytest.raises(TypeCheckError):
        ResBlock(8, 8, 4, 1e-5)(torch.zeros(8, 4, 4))


def test_what_a_function_returns_is_checked():
    with pytest.raises(TypeCheckError, match="return"):
        timestep_embedding(torch.tensor([1]), 7)  # an odd width, of which it makes 6


def test_weights_loader_is_checked_too():
    with pytest.raises(TypeCheckError):
        name_table("not a module", UNET_LDM)


def test_an_int_is_welcome_where_a_float_is_expected():
    assert guide(torch.zeros(1, 2), torch.ones(1, 2), 7).tolist() == [[7.0, 7.0]]


def test_a_wrong_annotation_fails_the_first_call(tmp_path, monkeypatch):
    lines = ["from jaxtyping import Float", "from torch import Tensor", "", ""]
    lines += ['def transposed(x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:', "    return x.transpose(1, 2)"]
    (tmp_path / "annotated_wrongly.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    with install_import_hook("annotated_wrongly", "tests.typecheck.strict"):
        import annotated_wrongly
    monkeypatch.delitem(sys.modules, "annotated_wrongly")
    assert annotated_wrongly.transposed(torch.zeros(1, 3, 3)).shape == (1, 3, 3)
    with pytest.raises(TypeCheckError):
        annotated_wrongly.transposed(torch.zeros(1, 2, 3))
