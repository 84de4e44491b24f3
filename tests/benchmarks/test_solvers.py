"""What the comparison of samplers prints, reads and draws of its scores."""

import numpy as np
import solvers
from solvers import Row, Score


def test_a_line_has_means_over_seeds_and_the_spread_of_the_distance():
    row = solvers.summary("ddim", "uniform", 8, [Score(0.9, 40.0, 0.01), Score(1.0, 50.0, 0.03)])
    assert str(row).split() == ["ddim", "uniform", "8", "95.0%", "45.00", "±", "5.00", "0.0200"]
    noisy = solvers.summary("ddpm", "respaced", 8, [Score(1.0, 50.0, np.nan)])
    assert str(noisy).split()[3:] == ["100.0%", "50.00", "±", "0.00", "-"]


def test_a_printed_line_is_read_back():
    row = Row("unipc_2_bh1", "uniform", 12, 0.974, 37.89, 1.93, 0.1192)
    assert Row.read(str(row)) == row
    assert np.isnan(Row.read(str(row._replace(error=np.nan))).error)


def test_the_picture_is_of_printed_tables(tmp_path, monkeypatch):
    rows = [Row("ddim", "uniform", count, 0.9, 60.0 - count, 1.0, 0.1 / count) for count in (6, 12)]
    (tmp_path / "a.txt").write_text("\n".join([solvers.HEAD, *map(str, rows)]))
    (tmp_path / "b.txt").write_text(str(Row("ddpm", "respaced", 250, 0.99, 42.0, 4.0, np.nan)))
    picture, drawn = tmp_path / "a.png", []
    monkeypatch.setattr(
        "sys.argv",
        ["solvers.py", "--tables", *(str(tmp_path / f"{x}.txt") for x in "ab"), "--out", str(picture)],
    )
    draw = solvers.draw_picture
    monkeypatch.setattr(solvers, "draw_picture", lambda path, rows: (drawn.extend(rows), draw(path, rows)))
    solvers.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [row.sampler for row in drawn] == ["ddim", "ddim", "ddpm"]
