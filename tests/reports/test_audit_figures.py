"""Promises about the contact sheet of an audit of labels."""

import numpy as np
from made_up_predictions import assert_is_a_picture

from waferlab.reports.audit_figures import plot_suspects


def test_one_map_and_a_hundred_of_any_size_fit_a_sheet(tmp_path):
    rng = np.random.default_rng(0)
    for number in (1, 100):
        maps = [rng.integers(0, 3, (5 + n % 40, 7 + n % 9), dtype=np.uint8) for n in range(number)]
        captions = [("a class with a very long name", "none", 0.999)] * number
        assert_is_a_picture(plot_suspects(maps, captions, path=tmp_path / f"{number}.png"))
    assert (tmp_path / "100.png").stat().st_size < 2**20, "it is kept beside the record, and looked at over a network"
