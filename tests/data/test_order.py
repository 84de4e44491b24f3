"""The order of an epoch: computed once, and the next one before it is asked for."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dit_jax.data.loader import epoch_order

THREADS = 8
N = 200_000


@pytest.fixture
def computed(monkeypatch):
    """A function that waits until an order has been begun with this key, and the keys so far."""
    keys, change, philox = [], threading.Condition(), np.random.Philox

    def counted(key):
        with change:
            keys.append(tuple(key.tolist()))
            change.notify_all()
        return philox(key=key)

    def wait_for(key):
        with change:
            assert change.wait_for(lambda: key in keys, timeout=120)

    monkeypatch.setattr(np.random, "Philox", counted)
    return keys, wait_for


def test_an_order_is_computed_once_however_many_threads_ask(computed):
    keys, _ = computed
    together = threading.Barrier(THREADS)

    def ask(_):
        together.wait()
        return [epoch_order(101, epoch, N) for epoch in range(3)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(ask, range(THREADS)))
    for orders in found:
        assert all(order is first for order, first in zip(orders, found[0], strict=True))
    assert [keys.count((101, epoch)) for epoch in range(3)] == [1, 1, 1]
    np.testing.assert_array_equal(np.sort(found[0][2]), np.arange(N))


def test_the_next_epochs_order_is_there_before_it_is_asked_for(computed):
    keys, wait_for = computed
    epoch_order(102, 0, N)
    wait_for((102, 1))
    epoch_order(102, 1, N)
    wait_for((102, 2))
    assert keys.count((102, 1)) == 1


def test_orders_that_are_quick_to_compute_are_not_computed_ahead(computed):
    keys, _ = computed
    epoch_order(103, 0, 100)
    assert keys == [(103, 0)]


def test_an_order_that_fails_is_an_error_for_all_who_wait(monkeypatch):
    def full(key):
        raise MemoryError("no room")

    monkeypatch.setattr(np.random, "Philox", full)
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            epoch_order(104, 0, N)
