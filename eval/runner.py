"""Making the clips of all arms, side by side, and measuring them.

Arms take turns prompt by prompt, so that a machine that grows hot or busy slows all of them.  Every arm has the same
prompt, seed, steps and scheduler, and its dense steps run on the same attention backend.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import sparsediff
from sparsediff.api import require_stock_pipeline, watch
from sparsediff.eval.arms import DENSE, Arm, check_arms, parse_arm, random_twin
from sparsediff.eval.checks import check_results
from sparsediff.eval.clips import (  # fmt: skip
    Reference,
    SampledAttentionError,
    clip_result,
    with_attention_errors,
)
from sparsediff.eval.dense_backends import best_backend
from sparsediff.eval.measure import Made, generate, makes_video
from sparsediff.eval.metrics import choose
from sparsediff.eval.results import CAPTURES, CLIPS, ClipResult, Results
from sparsediff.eval.run_folder import RunFolder, blank_arm, configuration, run_name
from sparsediff.eval.suites import Suite
from sparsediff.eval.video import check_writable, write_mp4
from sparsediff.progress import step_bar
from sparsediff.report import RunReport
from sparsediff.schedule import Schedule

OURS = (
    "prompt",
    "generator",
    "output_type",
    "callback_on_step_end",
)  # arguments of the pipeline's call
CAPTURED_STEPS, CAPTURED_LAYERS = 3, 6  # spread evenly


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure.

    Attributes:
        metrics: names of frame metrics; None: all that can be had here.
        lpips_weights: file with the network of ST-LPIPS; None: the installed package's.
        repeats: how often each clip is made, for times; pictures are taken from the first.
        dense_best: also run the fastest exact dense backend, where one is faster than the pipeline's own.
        random: also run random blocks at the density of each method that states one.
        attention_error: run the first clip of each method once more and compare sampled attention calls with dense
            ones.
        captures: run the first clip of each method once more and keep block masks for the report.
        progress: show bars.
    """

    metrics: tuple[str, ...] | None = None
    lpips_weights: str | Path | None = None
    repeats: int = 1
    dense_best: bool = True
    random: bool = False
    attention_error: bool = False
    captures: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")


def evaluate(
    pipe: object,
    prompts: Suite | Sequence[str],
    arms: Sequence[Arm | str] = ("auto",),
    *,
    folder: str | Path,
    call: dict[str, object] | None = None,
    model: str = "",
    fps: int = 16,
    options: Options | None = None,
) -> Results:
    """Generate every prompt dense and with every arm, measure, and write results as they come.

    ```python
    results = evaluate(pipe, ["a cat", "a dog"], ["auto", "auto:density=0.2", "lite_attention"], folder="out")
    ```

    The same call with the same folder goes on where it was interrupted; further prompts and arms may be added to it.

    Args:
        pipe: a diffusers pipeline; stock before and after.
        prompts: a suite, or texts (each with seed 0).
        arms: beside the dense ones, as `sparsediff.eval.arms.parse_arm` reads them.
        folder: where results go; see `sparsediff.eval.results`.
        call: arguments of the pipeline's call, over those of the suite.
        model: what results call the model.
        fps: of the written clips.
        options: how to measure.

    Raises:
        ValueError: arms that cannot run, metrics that cannot be had, a folder that holds something else, clips with
            NaN.  Whatever can be refused is refused before the first clip.
        TypeError: a bare transformer.
        OSError: the folder cannot be written.
    """
    suite = prompts if isinstance(prompts, Suite) else _ad_hoc_suite(prompts)
    options = options or Options()
    call = {**suite.call, **(call or {})}
    if ours := [name for name in OURS if name in call]:
        raise ValueError(
            f"call must not hold {', '.join(ours)}: the evaluation sets {', '.join(OURS)} itself"
        )
    require_stock_pipeline(pipe)
    methods = [parse_arm(arm) if isinstance(arm, str) else arm for arm in arms]
    if options.random:
        methods += [twin for twin in map(random_twin, methods) if twin is not None]
    size = (call["height"], call["width"]) if {"height", "width"} <= call.keys() else None
    frames = call.get("num_frames") if makes_video(pipe) else 1
    metrics, notes = choose(options.metrics, size, frames, lpips_weights=options.lpips_weights)
    check_writable(Path(folder) / "results")
    check_arms(pipe, [DENSE, *methods])
    with step_bar(pipe, shown=options.progress):
        run = _Run(pipe, suite, call, options, metrics, folder)
        run.prepare(methods, run_name(pipe, model), fps, notes)
        run.make_clips()
        run.look_inside()
    return run.finish()


class _Run:
    """One evaluation."""

    def __init__(self, pipe, suite: Suite, call, options: Options, metrics, folder) -> None:
        self.pipe, self.suite, self.call, self.options = pipe, suite, call, options
        self.metrics, self.folder_path = metrics, Path(folder)
        self.keys = [(prompt, seed) for prompt in suite.prompts for seed in suite.seeds]
        self.warm: set[str] = set()

    def prepare(self, methods: list[Arm], model: str, fps: int, notes: tuple[str, ...]) -> None:
        """Decide on the arms and open the folder; refuses a folder of another run."""
        shared = {
            "suite": self.suite,
            "call": self.call,
            "configuration": configuration(self.pipe, self.metrics, self.options.repeats),
            "model": model,
            "fps": fps,
        }
        arms = [DENSE, *methods]
        self.folder = RunFolder(
            self.folder_path, [blank_arm(a, self.pipe, notes=notes, **shared) for a in arms]
        )
        if self.options.dense_best:
            best, note = self._dense_best()
            notes = (*notes, f"dense-best: {note}")
            arms += [best] if best is not None else []
            blanks = [blank_arm(a, self.pipe, notes=notes, **shared) for a in arms]
            self.folder = RunFolder(self.folder_path, blanks)
        self.arms = {arm.name: arm for arm in arms}

    def make_clips(self) -> None:
        """Every clip that is missing, arms in turns."""
        from tqdm.auto import tqdm

        total = len(self.keys) * len(self.arms)
        with tqdm(
            total=total, disable=not self.options.progress, desc="clips", file=sys.stderr
        ) as bar:
            for number, key in enumerate(self.keys):
                missing = [name for name in self.arms if self.folder.lacks(name, key)]
                bar.update(len(self.arms) - len(missing))
                if not missing:
                    continue
                reference = self._reference(key, bar, missing)
                # Here and not where the clip is made: an interrupt may have come between the two.
                if self.folder.arms[DENSE.name].repeat is None:
                    self.folder.update(DENSE.name, repeat=self._repeat(key, reference))
                rest = [name for name in missing if name != DENSE.name]
                turn = number % max(1, len(rest))
                for name in rest[turn:] + rest[:turn]:
                    bar.set_postfix_str(self.arms[name].label, refresh=True)
                    self._make(name, key, reference)
                    bar.update()
                self.folder.drop_reference(key)

    def look_inside(self) -> None:
        """Errors of attention calls and block masks of each method's first clip, in a run that nobody times."""
        key = self.keys[0]
        for name, arm in self.arms.items():
            if arm.method is None:
                continue
            clip = self.folder.arms[name].clip(key)
            wants_error = self.options.attention_error and "attention_error" not in clip.metrics
            path = self.folder_path / CAPTURES / f"{name}.safetensors"
            if wants_error or (self.options.captures and not path.is_file()):
                try:
                    errors = self._observe(arm, key, path if self.options.captures else None)
                except (
                    ValueError
                ) as error:  # a capture that cannot fit is refused; the figures stand without it
                    note = f"the first clip of {arm.label} could not be looked into: {error}"
                    self.folder.update(name, notes=(*self.folder.arms[name].notes, note))
                    continue
                if self.options.attention_error:
                    self.folder.add(name, with_attention_errors(clip, errors))

    def finish(self) -> Results:
        """Self-checks, and everything in the folder."""
        results = self.folder.results()
        for name, checks in check_results(results).items():
            if name in self.folder.arms:
                self.folder.update(name, checks=checks)
        return self.folder.results()

    # -- one clip -------------------------------------------------------------------------------------------------

    def _arguments(self, key: tuple[str, int]) -> dict[str, object]:
        prompt, seed = key
        generator = torch.Generator("cpu").manual_seed(seed)
        return {**self.call, "prompt": prompt, "generator": generator, "output_type": "np"}

    def _reference(self, key: tuple[str, int], bar, missing: list[str]) -> Reference:
        """The dense twin: made now, kept from before the interrupt, or made again for arms that came later."""
        dense = DENSE.name
        bar.set_postfix_str(DENSE.label, refresh=True)
        if dense not in missing:
            if (kept := self.folder.load_reference(key, dense)) is not None:
                return kept
            made = generate(self.pipe, self._arguments(key), trajectory=True)
            recorded = self.folder.arms[dense].clip(key).frames_sha256
            if made.frames_sha256 != recorded:
                raise ValueError(
                    "the dense clip of this prompt does not come out as it did before, so later arms cannot be "
                    "compared with it; choose another --out"
                )
            reference = Reference.of(made)
            reference.save(self.folder.reference_path(key))
            return reference
        runs, _ = self._timed(DENSE, key)
        reference = Reference.of(runs[0])
        clip = self._result(DENSE, key, runs, (), None)
        reference.save(self.folder.reference_path(key))
        self._write(DENSE.name, clip, runs[0])
        bar.update()
        return reference

    def _make(self, name: str, key: tuple[str, int], reference: Reference) -> None:
        runs, reports = self._timed(self.arms[name], key)
        clip = self._result(self.arms[name], key, runs, reports, reference)
        self._write(name, clip, runs[0])

    def _timed(
        self, arm: Arm, key: tuple[str, int], **settings: object
    ) -> tuple[list[Made], list[RunReport]]:
        """The clip as often as it is to be timed, after one that is not."""
        if arm.name not in self.warm:
            # The first call of a process decodes as well: no clip's time may hold the decoder's first run.
            seconds = arm.warm_up(self.pipe, self._arguments(key), decode=not self.warm)
            self.warm.add(arm.name)
            if self.folder.arms[arm.name].warmup_seconds is None:
                self.folder.update(arm.name, warmup_seconds=seconds)
        made, reports = [], []
        for _ in range(self.options.repeats):
            with arm.entered(self.pipe) as handle:
                if handle is not None:
                    handle.recorder.timed = True
                made.append(generate(self.pipe, self._arguments(key), trajectory=True))
                if handle is not None:
                    reports.append(handle.report())
        return made, reports

    def _result(self, arm: Arm, key, runs, reports, reference: Reference | None) -> ClipResult:
        return clip_result(
            runs,
            index=self.folder.index(key),
            prompt=key[0],
            seed=key[1],
            metrics=self.metrics,
            lpips_weights=self.options.lpips_weights,
            reference=reference,
            report=reports[0] if arm.method is not None else None,
            parts=reports,
        )

    def _write(self, name: str, clip: ClipResult, made: Made) -> None:
        video = f"{CLIPS}/{name}/{clip.index}.mp4"
        path = self.folder_path / video
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, made.video, self.folder.arms[name].fps)
        self.folder.add(name, replace(clip, video=video))

    def _repeat(self, key: tuple[str, int], reference: Reference) -> ClipResult:
        """The dense clip once more, through sparsediff where a method will run: it must not change a bit."""
        method = next((a.method for a in self.arms.values() if a.method is not None), "auto")
        with sparsediff.enable(self.pipe, method, schedule=Schedule(dense_steps=1.0)) as handle:
            handle.recorder.timed = True
            made = generate(self.pipe, self._arguments(key), trajectory=True)
            report = handle.report()
        return self._result(DENSE, key, [made], [report], reference)

    def _observe(self, arm: Arm, key: tuple[str, int], captured: Path | None) -> dict[int, float]:
        """Errors of attention by step; with `captured`, masks too, and the attention they hold where that fits."""
        from sparsediff.eval.capture import CaptureTooLargeError

        try:
            return self._observe_once(arm, key, captured, scores=True)
        except CaptureTooLargeError as problem:  # known at the first call
            note = f"attention mass was not captured: {problem}"
            self.folder.update(arm.name, notes=(*self.folder.arms[arm.name].notes, note))
            return self._observe_once(arm, key, captured, scores=False)

    def _observe_once(
        self, arm: Arm, key: tuple[str, int], captured: Path | None, *, scores: bool
    ) -> dict[int, float]:
        from sparsediff.eval.capture import capture

        steps = self.call.get("num_inference_steps")
        error = SampledAttentionError()
        with watch(self.pipe, error, method=arm.method, schedule=arm.schedule) as handle:
            arguments = {**self._arguments(key), "output_type": "latent"}
            if captured is None:
                self.pipe(**arguments)
                return error.by_step()
            layers = sum(len(state.layers) for state in handle.states)
            chosen_layers = list(_spread(layers, CAPTURED_LAYERS))
            chosen_steps = list(_spread(steps, CAPTURED_STEPS)) if steps else [-1]
            with capture(handle, layers=chosen_layers, steps=chosen_steps, scores=scores) as seen:
                self.pipe(**arguments)
            seen.about |= {"prompt": key[0], "seed": str(key[1])}
            captured.parent.mkdir(parents=True, exist_ok=True)
            seen.save(captured)
        return error.by_step()

    def _dense_best(self) -> tuple[Arm | None, str]:
        """What an earlier run in this folder found, else what is fastest now."""
        kept = self.folder_path / "arms" / "dense-best.json"
        if kept.is_file():
            from sparsediff.eval.results import load_arm

            backend = load_arm(kept).attention_backend
            return Arm(role="dense-best", label="dense-best", backend=backend), "as before"
        backend, note = best_backend(self.pipe, self._arguments(self.keys[0]))
        if backend is None:
            return None, note
        return Arm(role="dense-best", label="dense-best", backend=backend), note


def _spread(count: int, wanted: int) -> Iterator[int]:
    """Up to `wanted` numbers from 0 to `count - 1`, evenly, the last among them."""
    places = torch.linspace(0, count - 1, min(count, wanted)).round().long()
    yield from dict.fromkeys(places.tolist())


def _ad_hoc_suite(prompts: Sequence[str]) -> Suite:
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of texts, or a suite")
    return Suite(name="prompts", version="0", prompts=tuple(prompts))
