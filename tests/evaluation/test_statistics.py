"""Running statistics against NumPy's of all rows, whatever the chunks, the order and the processes."""

import numpy as np
import pytest

from dit_jax.evaluation.statistics import RunningStatistics

ROWS = (1000 + np.random.default_rng(0).standard_normal((1000, 7)) * np.arange(1, 8)).astype(np.float32)


def of(rows, chunk):
    found = RunningStatistics(7)
    for start in range(0, len(rows), chunk):
        found.add(rows[start : start + chunk])
    return found


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
def test_chunks_and_order_do_not_matter(chunk):
    order = np.random.default_rng(chunk).permutation(len(ROWS))
    found = of(ROWS[order], chunk)
    rows = ROWS.astype(np.float64)
    assert found.count == 1000
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-11, atol=1e-10)


def test_merged_and_stored_statistics_are_those_of_all():
    parts = [of(ROWS[:10], 3), RunningStatistics(7), of(ROWS[10:700], 64), of(ROWS[700:], 300)]
    stored = [RunningStatistics.from_arrays(part.to_arrays()) for part in parts]
    one, other = stored[0] + stored[1] + stored[2] + stored[3], stored[3] + (stored[2] + stored[0])
    for found in (one, other):
        assert found.count == 1000
        np.testing.assert_allclose(found.mean, of(ROWS, 1000).mean, rtol=1e-12)
        np.testing.assert_allclose(found.covariance, of(ROWS, 1000).covariance, rtol=1e-11, atol=1e-10)
    assert stored[0].count == 10  # a sum changes no part


def test_what_cannot_be_taken_in_is_refused():
    found = RunningStatistics(7)
    found.add(ROWS[:0])
    with pytest.raises(ValueError, match=r"rows have shape \(1000, 6\); expected \(N, 7\)"):
        found.add(ROWS[:, :6])
    with pytest.raises(ValueError, match="not finite"):
        found.add(ROWS * np.nan)
    with pytest.raises(ValueError, match="statistics of 3 features; expected 7"):
        found.merge(RunningStatistics(3))
    found.add(ROWS[:1])
    with pytest.raises(ValueError, match="are of 1 rows; expected at least 2"):
        found.covariance  # noqa: B018
