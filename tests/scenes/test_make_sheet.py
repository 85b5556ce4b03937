"""The sheet of pictures: each cut to what is drawn, scaled and centred."""

import numpy as np
from PIL import Image

from minidiff.scenes.make_sheet import CELL, emoji_code, fit_cell


def test_a_picture_fills_its_cell_along_the_longer_side():
    picture = Image.new("RGBA", (40, 40))
    picture.paste((255, 0, 0, 255), (10, 5, 20, 25))  # 10 x 20 of 40 x 40 pixels
    alpha = np.asarray(fit_cell(picture))[..., 3]
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    assert (rows[0], rows[-1]) == (0, CELL - 1) and (columns[0], columns[-1]) == (CELL // 4, 3 * CELL // 4 - 1)


def test_codes_leave_out_the_variation_selector():
    assert emoji_code("2764-FE0F") == "2764" and emoji_code("1f431") == "1f431"
