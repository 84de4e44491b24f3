"""What the comparison of samplers prints and draws of its scores."""

import numpy as np
import solvers
from solvers import Score


def test_a_line_has_means_over_seeds_and_the_spread_of_the_distance():
    line = solvers.summary([Score(0.9, 40.0, 0.01), Score(1.0, 50.0, 0.03)])
    assert line.split() == ["95.0%", "45.00", "±", "5.00", "0.0200"]
    assert solvers.summary([Score(1.0, 50.0, np.nan)]).split() == ["100.0%", "50.00", "-"]


def test_the_picture_is_written(tmp_path):
    rows = {("ddim", "uniform"): [(6, [Score(0.9, 60.0, 0.1)]), (12, [Score(0.9, 50.0, 0.05)])]}
    solvers.draw_picture(str(tmp_path / "a.png"), rows)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
