"""Every block and every whole model gives what diffusers, transformers and open_clip give for the same weights and inputs."""

import pytest

from tests.parity.parts import PARTS, largest_errors

CASES = [
    pytest.param(part, shape, dtype, id=f"{part}-{shape}-{str(dtype)[6:]}")
    for part in PARTS
    for shape in part.shapes
    for dtype in part.dtypes
]


@pytest.mark.parametrize("part, shape, dtype", CASES)
def test_ours_equals_the_reference(part, shape, dtype, record_property):
    error = largest_errors(part.compare, shape, dtype)
    record_property("parity", (part.name, part.reference, str(dtype)[6:], error))
