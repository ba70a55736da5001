"""Steps and generations, for every kind of scheduler that diffusers has."""

import diffusers
import pytest
import torch

from sparsediff.clock import Clock
from sparsediff.noise_level import noise_levels

SCHEDULERS = {
    "flow euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow unipc": lambda: diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "ddim": lambda: diffusers.DDIMScheduler(),  # has no step_index
    "lcm": lambda: diffusers.LCMScheduler(),
    "edm": lambda: diffusers.EDMEulerScheduler(),
}


class Pipe:
    """What a clock reads of a pipeline."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self._current_timestep = None

    def run(self, clock, steps, *, branches=2, stop_after=None):
        """What a pipeline's denoising loop does, its progress bar included."""
        ticks = []
        self.scheduler.set_timesteps(steps)
        run = clock.open_run()
        try:
            x = torch.zeros(1, 4, 2, 2)
            for i, t in enumerate(self.scheduler.timesteps):
                if i == stop_after:
                    return ticks
                self._current_timestep = t
                ticks += [clock.read(t) for _ in range(branches)]
                x = self.scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
            self._current_timestep = None
            return ticks
        finally:
            clock.close_run(run)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers' Heun under numpy 2
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_steps_are_counted_per_evaluation_and_generations_per_run(name, branches):
    pipe = Pipe(SCHEDULERS[name]())
    clock = Clock(pipe)
    for run in range(3):
        ticks = pipe.run(clock, 5, branches=branches, stop_after=2 if run == 1 else None)
        timesteps = pipe.scheduler.timesteps.tolist()
        steps = range(2) if run == 1 else range(len(timesteps))
        assert [t.step for t in ticks] == [s for s in steps for _ in range(branches)]
        assert {t.generation for t in ticks} == {run}
        assert {t.num_steps for t in ticks} == {len(timesteps)}
        levels = noise_levels(pipe.scheduler)
        assert [t.sigma for t in ticks] == [levels[s] for s in steps for _ in range(branches)]
        assert [t.later_sigmas for t in ticks] == [
            tuple(levels[s + 1 :]) for s in steps for _ in range(branches)
        ]


@pytest.mark.parametrize("told", [True, False])
def test_a_run_that_starts_in_the_middle_counts_from_there(told):
    """Some pipelines tell the scheduler where they start, others only skip the first timesteps."""
    scheduler = SCHEDULERS["flow euler"]()
    clock = Clock(pipe := Pipe(scheduler))
    scheduler.set_timesteps(10)
    if told:
        scheduler.set_begin_index(6)
    clock.open_run()
    ticks, x = [], torch.zeros(1, 4, 2, 2)
    for t in pipe.scheduler.timesteps[6:]:
        ticks.append(clock.read(t))
        x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
    assert [t.step for t in ticks] == [0, 1, 2, 3]
    assert ticks[0].num_steps == 4
    assert [t.sigma for t in ticks] == pytest.approx((scheduler.timesteps[6:] / 1000).tolist())


def test_a_loop_outside_a_run_reads_levels_by_the_pipelines_scheduler():
    pipe = Pipe(diffusers.DDIMScheduler())
    clock = Clock(pipe)
    pipe.scheduler.set_timesteps(20)
    ticks = [clock.read(t) for t in pipe.scheduler.timesteps]
    assert [t.sigma for t in ticks] == pytest.approx(noise_levels(pipe.scheduler), rel=1e-9)
    assert Clock(None).read(torch.tensor([950])).sigma == 0.95, "no scheduler, so a flow's sigma"


def test_one_branch_twice_in_a_step_is_a_new_generation():
    clock = Clock(None)
    t = torch.tensor([900.0])
    ticks = [
        clock.read(t, branch=b, who=w)
        for b, w in [("cond", 1), ("uncond", 1), ("cond", 2), ("cond", 1)]
    ]
    assert [x.generation for x in ticks] == [0, 0, 0, 1]


def test_another_pipeline_with_a_scheduler_of_its_own_starts_a_generation():
    pipe = Pipe(SCHEDULERS["flow euler"]())
    clock = Clock(pipe)
    pipe.run(clock, 3)
    other = [
        clock.read(torch.tensor([t]), branch="cond", step=i) for i, t in enumerate((999.0, 500.0))
    ]
    assert [t.generation for t in other] == [1, 1]
    assert [t.step for t in other] == [0, 1]
    assert [t.sigma for t in other] == pytest.approx([0.999, 0.5])
    assert pipe.run(clock, 3)[0].generation == 2


def test_a_bare_transformer_is_followed_by_its_timesteps():
    clock = Clock(None)
    ticks = [clock.read(torch.tensor([t])) for t in (900.0, 900.0, 500.0, 100.0, 100.0, 900.0)]
    assert [t.step for t in ticks] == [0, 0, 1, 2, 2, 0]
    assert [t.generation for t in ticks] == [0, 0, 0, 0, 0, 1]
    assert ticks[0].num_steps is None
    clock.begin_generation(4)
    tick = clock.read(torch.tensor([100.0]))
    assert (tick.generation, tick.step, tick.num_steps) == (2, 0, 4)
    assert clock.read(torch.tensor([900.0])).num_steps is None, "the promise was for one generation"


@pytest.mark.parametrize("names", [(None, None), ("cond", "uncond")])
def test_steps_at_one_timestep_are_told_apart_by_the_scheduler(names):
    """Flux.3's 50 steps, whose levels a modular pipeline rounds to bfloat16."""
    pipe = Pipe(diffusers.FlowMatchEulerDiscreteScheduler(shift=6.93))
    clock, x = Clock(pipe), torch.zeros(1, 4)
    for generation in range(2):
        pipe.scheduler.set_timesteps(50)
        levels = (pipe.scheduler.timesteps / 1000).bfloat16()
        assert len(set(levels.tolist())) < 50
        for step, (t, level) in enumerate(zip(pipe.scheduler.timesteps, levels, strict=True)):
            ticks = [clock.read(level * 1000, branch=name) for name in names]
            assert [(tick.generation, tick.step) for tick in ticks] == [(generation, step)] * 2
            x = pipe.scheduler.step(x, t, x, return_dict=False)[0]


def test_calls_after_a_run_are_not_taken_for_its_next_step():
    pipe = Pipe(SCHEDULERS["flow euler"]())
    clock = Clock(pipe)
    pipe.run(clock, 3)
    first, second = (clock.read(torch.tensor([t])) for t in (400.0, 300.0))
    assert (first.step, second.step) == (0, 1)
    assert first.sigma == pytest.approx(0.4)
    assert pipe.run(clock, 3)[0].step == 0


@pytest.mark.parametrize("stop_after", [None, 2])
def test_a_loop_of_ones_own_over_the_pipelines_timesteps(stop_after):
    """Editing and inversion step the latents themselves and never the scheduler; an aborted run may come before."""
    pipe = Pipe(SCHEDULERS["flow euler"]())
    clock = Clock(pipe)
    pipe.run(clock, 4, stop_after=stop_after)
    for generation in (1, 2):
        pipe.scheduler.set_timesteps(5)
        ticks = [clock.read(t) for t in pipe.scheduler.timesteps for _ in range(2)]
        assert [t.step for t in ticks] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert {t.generation for t in ticks} == {generation}
        assert ticks[-1].sigma == pytest.approx(pipe.scheduler.timesteps[-1].item() / 1000)


def test_segments_of_one_run_are_generations():
    pipe = Pipe(SCHEDULERS["flow euler"]())
    clock = Clock(pipe)
    clock.open_run()
    generations = []
    for _ in range(2):
        pipe.scheduler.set_timesteps(2)
        generations += [
            clock.read(t, branch="cond", step=i).generation
            for i, t in enumerate(pipe.scheduler.timesteps)
        ]
    assert generations == [0, 0, 1, 1]


def test_one_name_for_several_calls_of_a_step_is_no_new_generation_inside_a_run():
    pipe = Pipe(SCHEDULERS["flow euler"]())
    clock = Clock(pipe)
    pipe.scheduler.set_timesteps(2)
    clock.open_run()
    t = pipe.scheduler.timesteps[0]
    assert {clock.read(t, branch="cond").generation for _ in range(3)} == {0}


def test_a_progress_bar_that_closes_late_does_not_end_the_next_run():
    """tqdm closes a bar again when it is collected."""
    pipe = Pipe(SCHEDULERS["flow euler"]())
    clock = Clock(pipe)
    old = clock.open_run()
    clock.close_run(old)
    pipe.scheduler.set_timesteps(4)
    clock.open_run()
    ticks = []
    for i, t in enumerate(pipe.scheduler.timesteps):
        ticks.append(clock.read(t, branch="cond", step=i))
        clock.close_run(old)
    assert {t.num_steps for t in ticks} == {4}
    assert [t.step for t in ticks] == [0, 1, 2, 3]
