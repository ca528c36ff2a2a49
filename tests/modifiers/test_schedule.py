from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paring.modifiers.schedule import RAMPS, Window, cubic, ramp, to_step


@pytest.mark.parametrize("spe", [1, 3, 7, 10, 1000])
def test_decimal_epochs_are_exact(spe: int):
    for tenths in range(1, 50):
        assert to_step(tenths / 10, spe) == math.ceil(Fraction(tenths, 10) * spe)


def test_updates_are_where_a_float_modulo_misses_them():
    window = Window.compile(0.0, 3.0, 0.1, steps_per_epoch=10, total_steps=30)
    assert window.updates == frozenset(range(30))
    assert Window.compile(0.2, 1.0, 0.3, 10, 30).updates == {2, 5, 8}


def test_open_end_and_every_step():
    assert Window.compile(1.0, None, None, 4, 10) == Window(4, 10, frozenset(range(4, 10)))


def test_frequency_finer_than_a_step_updates_every_step():
    assert Window.compile(0.0, 1.0, 0.01, 10, 10).updates == frozenset(range(10))


@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 200), st.integers(1, 60))
def test_a_window_holds_its_updates(start: int, length: int, every: int, spe: int):
    first, last, frequency = start / 100, (start + length) / 100, every / 100
    window = Window.compile(first, last, frequency, spe, 10 * spe)
    assert window.start <= window.end
    wanted = {math.ceil(Fraction(start + k * every, 100) * spe) for k in range(length // every + 1)}
    assert window.updates == {step for step in wanted if step < window.end}
    assert all(window.contains(step) for step in window.updates)


def test_progress_runs_from_zero_to_one():
    window = Window(4, 8, frozenset())
    assert [window.progress(s) for s in (3, 4, 6, 8, 9)] == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_ramps_reach_their_ends_exactly():
    for kind in RAMPS:
        assert ramp(kind, 0.05, 0.7, 0.0) == pytest.approx(0.05)
        assert ramp(kind, 0.05, 0.7, 1.0) == 0.7


def test_cubic_is_zhu_and_gupta():
    for p in (0.0, 0.25, 0.5, 1.0):
        assert cubic(p) == pytest.approx((p - 1) ** 3 + 1)
