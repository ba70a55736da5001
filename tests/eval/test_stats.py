"""Intervals against scipy's, and pairing."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sparsediff.eval.results import load_results
from sparsediff.eval.stats import estimate, ratio_estimate
from sparsediff.eval.summary import PSNR_CAP, paired_difference, summarise

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


def test_the_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).normal(3, 2, 20)
    ours = estimate(enumerate(values))
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(2)
    ).confidence_interval
    # Two sets of 10,000 draws differ by a few per cent of the interval.
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * (theirs.high - theirs.low))
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * (theirs.high - theirs.low))


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [estimate(enumerate(rng.normal(0, 1, 20))) for _ in range(200)]
    covered = sum(e.low <= 0 <= e.high for e in found)
    assert 0.88 * 200 <= covered <= 200, "percentile intervals of 20 values cover 92 to 93 %"


@given(VALUES)
def test_an_interval_is_around_its_mean_and_never_changes(values):
    one = estimate(enumerate(values))
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= one.low <= one.mean + slack
    assert one.mean - slack <= one.high <= max(values) + slack
    assert one == estimate(enumerate(values))


def test_seeds_of_one_prompt_are_one_piece_of_evidence():
    values = [("a", 1.0), ("a", 3.0), ("b", 5.0)]
    found = estimate(values)
    assert (found.mean, found.n, found.clips) == (3.5, 2, 3)
    thrice = estimate(values * 3)
    assert (thrice.low, thrice.high) == (found.low, found.high)


def test_one_prompt_has_no_interval_and_nothing_no_mean():
    assert estimate([("a", 2.0)]).low is None
    assert not estimate([("a", 2.0)]).excludes_zero
    assert estimate([("a", 2.0)]).format() == "2.00"
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])
    with pytest.raises(ValueError, match="finite"):
        estimate([("a", math.inf)])


def test_ratios_are_averaged_so_that_twice_and_half_make_one():
    assert ratio_estimate([("a", 2.0, 1.0), ("b", 1.0, 2.0)]).mean == pytest.approx(1.0)


def test_a_summary_of_a_folder(results_folder):
    results = load_results(results_folder)
    dense, auto, *_ = summarise(results)
    assert dense.role == "dense"
    assert dense.speedup is None or dense.speedup.mean == pytest.approx(1.0)
    assert "psnr" not in dense.metrics
    assert auto.speedup.mean == pytest.approx(1.9)
    assert auto.metrics["psnr"].mean == pytest.approx(29.5)
    assert auto.metrics["psnr"].n == 2
    assert auto.differences["flicker"].mean == pytest.approx(0.0)
    assert auto.mask_share == pytest.approx(0.02 / 0.505), "medians of two samples"


def test_differences_are_taken_clip_by_clip(results_folder):
    results = load_results(results_folder)
    found = paired_difference(results, "auto-density=0.3", "lite_attention-threshold=-1", "psnr")
    # The clips differ by a decibel, the difference does not.
    assert (found.mean, found.low, found.high) == pytest.approx((3.5, 3.5, 3.5))
    assert paired_difference(results, "dense", "auto-density=0.3", "ssim") is None


def test_identical_clips_count_as_the_cap(results_folder):
    results = load_results(results_folder)
    arm = results.arm("auto-density=0.3")
    arm.clips[0].metrics["psnr"] = math.inf
    found = next(s for s in summarise(results) if s.arm == arm.arm)
    assert found.identical == 1
    assert found.metrics["psnr"].mean == pytest.approx((PSNR_CAP + 30) / 2)
