"""Steps of models that denoise block by block, with the real scheduler."""

from types import SimpleNamespace

import pytest
from diffusers import BlockRefinementScheduler
from hypothesis import given
from hypothesis import strategies as st

from sparsediff.block_clock import BlockClock


def pipeline(steps=4, blocks=3):
    """What a clock sees of one."""
    scheduler = BlockRefinementScheduler()
    scheduler.set_timesteps(steps)
    return Pipe(scheduler=scheduler, _num_timesteps=steps * blocks)


class Pipe(SimpleNamespace):
    """A clock holds its pipeline weakly."""


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 4))
def test_a_block_starts_at_its_share_of_the_run_however_long_the_others_took(calls, steps):
    pipe = pipeline(steps, len(calls))
    clock = BlockClock(pipe)
    for block, count in enumerate(calls):
        for call in range(count):
            tick = clock.read(None, context=32 * (block + 1))
            assert tick.step == block * steps + min(call, steps - 1)
            assert tick.num_steps == steps * len(calls)
            assert tick.sigma == pytest.approx(1 - min(call, steps - 1) / steps)
            assert tick.generation == 0


def test_setting_timesteps_starts_a_generation():
    pipe = pipeline()
    clock = BlockClock(pipe)
    clock.read(None, context=32)
    assert clock.read(None, context=32).step == 1
    pipe.scheduler.set_timesteps(4)  # the same prompt again, after an exception as well
    tick = clock.read(None, context=32)
    assert (tick.generation, tick.step) == (1, 0)


@pytest.mark.parametrize("bars", ["one a block", "one a generation"])
def test_it_does_not_matter_how_long_a_progress_bar_lasts(bars):
    pipe, seen = pipeline(steps=2, blocks=3), []
    clock = BlockClock(pipe)
    for _ in range(2):
        pipe.scheduler.set_timesteps(2)
        run = clock.open_run()
        for block in range(3):
            if block and bars == "one a block":
                clock.close_run(run)
                run = clock.open_run()
            seen += [clock.read(None, context=32 * (block + 1)) for _ in range(2)]
        clock.close_run(run)
    assert [(tick.generation, tick.step) for tick in seen] == [
        (g, s) for g in (0, 1) for s in range(6)
    ]


def test_without_a_pipeline_the_context_tells():
    clock = BlockClock(None, num_steps=6)
    ticks = [clock.read(None, context=n) for n in (32, 32, 64, 64, 64, 32)]
    assert [t.step for t in ticks] == [0, 1, 2, 3, 4, 0]
    assert [t.generation for t in ticks] == [0, 0, 0, 0, 0, 1]
    assert {t.num_steps for t in ticks} == {6}
    assert ticks[0].sigma is None
    clock.begin_generation(9)
    tick = clock.read(None, context=64)
    assert (tick.generation, tick.step, tick.num_steps) == (2, 0, 9)
