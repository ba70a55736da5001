"""VBench's dimensions on finished clips, by the package `vbench` in an environment of its own.

VBench 0.1.5 pins numpy below 2 and a transformers of 2023, so it cannot be imported beside this library.  It judges the
MP4 files, which all arms have at the same quality.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sparsediff.eval.metric_names import METRICS
from sparsediff.eval.results import ArmResult, Results, load_results, save_arm

PREFIX = "vbench_"
DIMENSIONS = tuple(name.removeprefix(PREFIX) for name in METRICS if name.startswith(PREFIX))
# Run by the other interpreter: device, folder of clips, output folder, prompts by path, dimensions.
SCRIPT = """
import json, sys
from vbench import VBench
job = json.loads(sys.argv[1])
VBench(job["device"], "", job["out"]).evaluate(
    videos_path=job["videos"], name="clips", prompt_list=job["prompts"], dimension_list=job["dimensions"],
    mode="custom_input",
)
"""


def add_vbench(
    folder: str | Path, dimensions: Sequence[str] | None = None, *, python: Path | None = None
) -> Results:
    """Measure every arm and add the figures to the results; a dimension that all clips have is not measured again.

    Args:
        folder: of results.
        dimensions: names in `DIMENSIONS`; None: all.
        python: interpreter of an environment with `vbench`; None: this one.

    Raises:
        ValueError: an unknown dimension.
        ImportError: that interpreter has no `vbench`.
        FileNotFoundError: no results, or a clip without its file.
        RuntimeError: VBench failed; the message ends with what it said.
    """
    chosen = tuple(dimensions or DIMENSIONS)
    if unknown := [d for d in chosen if d not in DIMENSIONS]:
        raise ValueError(f"unknown dimension {', '.join(unknown)}; known: {', '.join(DIMENSIONS)}")
    interpreter = str(python or sys.executable)
    _require_vbench(interpreter)
    results = load_results(folder)
    for arm in results.arms:
        missing = [d for d in chosen if any(PREFIX + d not in c.metrics for c in arm.clips)]
        if missing and arm.clips:
            save_arm(results.folder, _measured(results, arm, missing, interpreter))
    return load_results(folder)


def read_scores(text: str, dimensions: Sequence[str]) -> dict[str, dict[str, float]]:
    """What VBench wrote, `{dimension: [mean, [{video_path, video_results}]]}`, as file name -> metric -> value.

    Raises:
        ValueError: JSON of another form.
    """
    data = json.loads(text)
    found: dict[str, dict[str, float]] = {}
    for dimension in dimensions:
        try:
            _, clips = data[dimension]
            pairs = [(Path(c["video_path"]).name, float(c["video_results"])) for c in clips]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"VBench's results of {dimension} have an unknown form") from None
        for name, value in pairs:
            found.setdefault(name, {})[PREFIX + dimension] = value
    return found


def _measured(
    results: Results, arm: ArmResult, dimensions: Sequence[str], interpreter: str
) -> ArmResult:
    files = {clip.key: results.video_path(clip) for clip in arm.clips}
    if lost := [clip for clip in arm.clips if files[clip.key] is None]:
        raise FileNotFoundError(
            f"{arm.arm} lacks the video of {lost[0].prompt!r}, seed {lost[0].seed}"
        )
    with tempfile.TemporaryDirectory() as out:
        job = {
            "device": "cuda" if "cuda" in arm.environment else "cpu",
            "videos": str(next(iter(files.values())).parent),
            "out": out,
            "prompts": {files[clip.key].name: clip.prompt for clip in arm.clips},
            "dimensions": list(dimensions),
        }
        run = subprocess.run(
            [interpreter, "-c", SCRIPT, json.dumps(job)],
            capture_output=True,
            text=True,
            check=False,
        )
        written = Path(out) / "clips_eval_results.json"
        if run.returncode or not written.is_file():
            said = run.stderr.strip().splitlines()
            raise RuntimeError(
                f"VBench failed on {arm.arm}: {said[-1] if said else 'it wrote nothing'}"
            )
        scores = read_scores(written.read_text(), dimensions)
    clips = [
        replace(clip, metrics={**clip.metrics, **scores.get(files[clip.key].name, {})})
        for clip in arm.clips
    ]
    return replace(arm, clips=tuple(clips))


def _require_vbench(interpreter: str) -> None:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vbench') is None)"
    try:
        run = subprocess.run([interpreter, "-c", code], capture_output=True, check=False)
    except OSError as error:
        raise FileNotFoundError(f"cannot run {interpreter}: {error.strerror}") from None
    if run.returncode:
        raise ImportError(
            f"{interpreter} has no package vbench: make an environment of its own (python -m venv vbench-env; "
            "vbench-env/bin/pip install vbench) and name its interpreter with --python"
        )
