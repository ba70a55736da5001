"""What the buttons do: one comparison, or all methods on one prompt, told step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sparsediff.adapter import weight_dtype
from sparsediff.demo.jobs import Job
from sparsediff.demo.meters import Phase, StepPoint
from sparsediff.demo.record import Record
from sparsediff.demo.settings import Settings, command, python_lines, to_query
from sparsediff.demo.studio import Studio
from sparsediff.eval.arms import DENSE, check_arms
from sparsediff.eval.compare import Request
from sparsediff.eval.measure import Made


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a job leaves behind.

    Attributes:
        folder: results as `sparsediff.eval.results` lays them out.
        settings: as they ran, with every size filled in.
        report: the evaluation's HTML page of them.
        dense, sparse: clips or pictures; the sparse one is the last method's.
    """

    folder: Path
    settings: Settings
    report: Path
    dense: Path
    sparse: Path


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A result in the forms that it travels in."""

    query: dict[str, str]
    command: str
    python: str


def shared(studio: Studio, settings: Settings) -> Shared:
    """The settings as an address, a command and Python."""
    place = dict(studio.place)
    if settings.method in studio.calibrations:
        place["calibration"] = studio.calibrations[settings.method]
    real = place
    if studio.device is not None:
        dtype = str(weight_dtype(studio.pipe.transformer)).removeprefix("torch.")
        real = {**place, "device": str(studio.device), "dtype": dtype}
    return Shared(
        query=to_query(settings),
        command=command(settings, studio.model, place),
        python=python_lines(
            settings, studio.model, real, output="frames" if studio.served.video else "images"
        ),
    )


@dataclass
class Progress:
    """Tells the page how far a job of several runs is."""

    job: Job
    runs: int
    done: int = 0
    points: list[StepPoint] = field(default_factory=list)
    _name: str = ""
    _of: str = ""

    def begin(self, name: str, of: str) -> None:
        """A run starts: `name` is its kind, in a word, `of` says more."""
        self._name, self._of, self.points = name, of, []
        self.say("starting")

    def step(self, point: StepPoint) -> None:
        """A step of it has ended."""
        self.points.append(point)
        self.say("decoding" if point.step == point.steps else "")

    def end(self) -> None:
        """The run has ended."""
        self.done += 1

    def say(self, note: str) -> None:
        """Tell the state with a word about what goes on."""
        inside = self.points[-1].step / self.points[-1].steps if self.points else 0.0
        # Decoding and comparing take time too: a run whose steps are done is nearly done.
        share = (self.done + 0.95 * inside) / self.runs
        self.job.tell(
            Phase(
                name=f"{self._name} {self._of}",
                points=tuple(self.points),
                share=min(1.0, share),
                note=note,
                id=self._name.lower(),
            )
        )

    def waiting(self, ahead: int) -> None:
        """Others come first."""
        people = "one other run" if ahead == 1 else f"{ahead} other runs"
        share = self.done / self.runs
        self.job.tell(Phase(name="Waiting", note=f"{people} first", id="waiting", share=share))


def comparison(studio: Studio, settings: Settings) -> Callable[[Job], None]:
    """One method beside dense, for `Job`; tells `Phase`s, then a `Result`."""

    def work(job: Job) -> None:
        asked = _checked(studio, settings, job)
        arm = studio.arm(asked)
        progress = Progress(job, runs=1 if asked.request in studio.dense else 2)
        with studio.new_folder() as folder:
            with studio.turns.turn(job, progress.waiting):
                check_arms(studio.pipe, [arm])  # before the dense run, not after it
                record = Record.begin(studio, folder, asked.request, [arm])
                dense = _dense(studio, job, asked.request, progress)
                progress.begin("Sparse", arm.label)
                run = studio.run_sparse(job, asked.request, arm, dense, progress.step)
            progress.say(f"comparing the {studio.served.noun}s")
            record.add_dense(dense)
            record.add_sparse(arm, run, dense)
            job.check()
            job.tell(_result(record, asked, record.handed_out(arm)))

    return work


def all_methods(studio: Studio, settings: Settings) -> Callable[[Job], None]:
    """Every method that can run here, as it comes, on one prompt; tells `Phase`s, and a `Result` after each method.

    Others get their turn between two runs.
    """

    def work(job: Job) -> None:
        asked = _checked(studio, settings, job)
        plain = [dataclasses.replace(asked, method=n, parameters={}, schedule=None) for n in studio.methods]  # fmt: skip
        arms = [studio.arm(one) for one in plain]
        progress = Progress(job, runs=len(arms) + (asked.request not in studio.dense))
        with studio.new_folder() as folder:
            with studio.turns.turn(job, progress.waiting):
                check_arms(studio.pipe, arms)
                record = Record.begin(studio, folder, asked.request, arms)
                dense = _dense(studio, job, asked.request, progress)
            record.add_dense(dense)
            for arm in arms:
                with studio.turns.turn(job, progress.waiting):
                    progress.begin("Sparse", arm.label)
                    run = studio.run_sparse(job, asked.request, arm, dense, progress.step)
                progress.end()
                record.add_sparse(arm, run, dense)
                job.check()
                job.tell(_result(record, asked, record.handed_out(arm)))

    return work


def _checked(studio: Studio, settings: Settings, job: Job) -> Settings:
    if not studio.loaded:
        job.tell(Phase(name="Loading", note=f"{studio.model} is being loaded", id="loading"))
    studio.wait_until_loaded(job)
    return dataclasses.replace(settings, request=studio.limits.check(settings.request))


def _dense(studio: Studio, job: Job, request: Request, progress: Progress) -> Made:
    """From the cache, or a run of its own."""
    if request not in studio.dense:
        progress.begin("Dense", "for comparison")
        studio.run_dense(job, request, progress.step)
        progress.end()
    return studio.run_dense(job, request, progress.step)


def _result(record: Record, settings: Settings, sparse: Path) -> Result:
    return Result(
        folder=record.folder,
        settings=settings,
        report=record.write_report(),
        dense=record.handed_out(DENSE),
        sparse=sparse,
    )
