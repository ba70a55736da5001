"""Marks and medians of time, on the host's clock."""

import time

import pytest
import torch

from sparsediff.timing import mark, seconds, seconds_between

CPU = torch.device("cpu")


def test_seconds_is_the_median_and_leaves_the_first_call_out(monkeypatch):
    """The clock is read before and after each of six calls; the first takes longest, as a compiler would make it."""
    took = [100.0, 3.0, 1.0, 2.0, 50.0, 4.0]
    reads = iter([x for t in took for x in (1000.0, 1000.0 + t)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(reads))
    calls = []
    assert seconds(lambda: calls.append(0), CPU) == 3.0
    assert len(calls) == 6


def test_repeats_are_as_asked():
    calls = []
    assert seconds(lambda: calls.append(0), CPU, repeats=2) >= 0
    assert len(calls) == 3


def test_an_error_in_what_is_timed_comes_out():
    with pytest.raises(ZeroDivisionError):
        seconds(lambda: 1 / 0, CPU)


def test_marks_on_a_cpu_are_seconds():
    start, stop = mark(CPU), mark(CPU)
    assert seconds_between(start, stop) == stop - start >= 0
