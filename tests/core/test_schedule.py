"""When to stay dense."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsediff import AttentionSite, Schedule, TokenGrid

GRID = TokenGrid.video(2, 4, 4)


def site(step=0, num_steps=10, sigma=0.5, layer=0):
    return AttentionSite(
        layer=layer,
        num_layers=4,
        step=step,
        num_steps=num_steps,
        sigma=sigma,
        branch="cond",
        grid=GRID,
    )


@given(st.floats(0.01, 0.99), st.integers(1, 60))
def test_a_fraction_never_gives_fewer_dense_steps_than_asked(fraction, steps):
    schedule = Schedule(dense_steps=fraction)
    dense = sum(schedule.dense_reason(site(i, steps)) is not None for i in range(steps))
    assert fraction * steps - 1e-6 <= dense < fraction * steps + 1


@pytest.mark.parametrize(
    ("dense_steps", "expected"), [(0, 0), (3, 3), (0.25, 5), (1.0, 20), (1, 1), (0.0, 0)]
)
def test_an_int_is_a_count_and_a_float_a_fraction(dense_steps, expected):
    schedule = Schedule(dense_steps=dense_steps)
    assert sum(schedule.dense_reason(site(i, 20)) is not None for i in range(20)) == expected


def test_high_noise_and_first_layers():
    schedule = Schedule(dense_above_sigma=0.9, dense_layers=2)
    assert schedule.dense_reason(site(sigma=0.95, layer=3)) == "schedule: high noise"
    assert schedule.dense_reason(site(sigma=0.9, layer=3)) is None
    assert schedule.dense_reason(site(sigma=None, layer=3)) is None
    assert schedule.dense_reason(site(sigma=0.1, layer=1)) == "schedule: first layers"


def test_a_fraction_of_an_unknown_number_of_steps_stays_dense_and_says_why():
    assert "unknown number of steps" in Schedule(dense_steps=0.5).dense_reason(site(num_steps=None))
    assert Schedule(dense_steps=1.0).dense_reason(site(num_steps=None))
    assert Schedule(dense_steps=2).dense_reason(site(num_steps=None))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_steps": 1.5}, "use an int for a count"),
        ({"dense_steps": -1}, ">= 0"),
        ({"dense_steps": True}, "count"),
        ({"dense_steps": "all"}, "count"),
        ({"dense_above_sigma": 925}, r"in \[0, 1\]"),
        ({"dense_above_sigma": "0.9"}, "must be a number"),
        ({"dense_above_sigma": True}, "must be a number"),
        ({"dense_above_sigma": -math.inf}, r"in \[0, 1\]"),
        ({"dense_above_sigma": math.nan}, r"dense_above_sigma must be in \[0, 1\], got nan"),
        ({"dense_steps": math.nan}, r"in \[0, 1\], got nan"),
        ({"dense_steps": math.inf}, r"in \[0, 1\], got inf"),
        ({"min_dense_share": math.nan}, r"min_dense_share must be in \[0, 1\]"),
        ({"min_dense_share": 2}, r"min_dense_share must be in \[0, 1\]"),
        ({"min_dense_share": None}, "min_dense_share must be a number"),
        ({"dense_layers": math.inf}, "count"),
        ({"dense_layers": -2}, ">= 0"),
        ({"dense_layers": 0.5}, "count"),
    ],
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Schedule(**fields)
