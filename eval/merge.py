"""Several folders of one run put together: arms that ran on different machines of a kind, or prompts in shards."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from sparsediff.eval.checks import check_results
from sparsediff.eval.results import (
    CAPTURES,
    CLIPS,
    ArmResult,
    ClipResult,
    Results,
    load_results,
    replace_clip,
    require_same_run,
    save_arm,
)
from sparsediff.eval.run_folder import IDENTITY
from sparsediff.eval.typed_json import encode


def merge(folders: Sequence[str | Path], out: str | Path) -> Results:
    """Write all arms and clips of `folders` into a new folder.

    Raises:
        ValueError: fewer than two folders, arms of different runs, one clip with two outcomes, or an `out` that holds
            results.
        FileNotFoundError: a folder without results.
    """
    if len(folders) < 2:
        raise ValueError("merging needs at least two folders")
    out = Path(out)
    if (out / "arms").is_dir() and any((out / "arms").iterdir()):
        raise ValueError(f"{out} holds results already; choose another --out")
    sources = [load_results(folder) for folder in folders]
    for other in sources[1:]:
        require_same_run(sources[0].arms[0], other.arms[0])
    merged: dict[str, ArmResult] = {}
    videos: dict[tuple[str, tuple[str, int]], Path] = {}
    indices: dict[tuple[str, int], int] = {}
    for source in sources:
        for arm in source.arms:
            merged[arm.arm] = _join(merged.get(arm.arm), arm, indices)
            for clip in arm.clips:
                if (path := source.video_path(clip)) is not None:
                    videos.setdefault((arm.arm, clip.key), path)
    for arm in merged.values():
        save_arm(out, _with_files(arm, videos, out))
    for source in sources:
        for arm in source.arms:
            _copy(source.capture_path(arm), out / CAPTURES / f"{arm.arm}.safetensors")
    results = load_results(out)
    for name, checks in check_results(results).items():
        save_arm(out, dataclasses.replace(results.arm(name), checks=checks))
    return load_results(out)


def _join(
    before: ArmResult | None, arm: ArmResult, indices: dict[tuple[str, int], int]
) -> ArmResult:
    """One arm with the clips of both, numbered anew."""
    base = before if before is not None else dataclasses.replace(arm, clips=())
    for name in IDENTITY:
        if encode(getattr(base, name)) != encode(getattr(arm, name)):
            raise ValueError(f"arm {arm.arm} is not the same in all folders: {name} differs")
    for clip in arm.clips:
        known = base.clip(clip.key)
        if known is not None and known.frames_sha256 != clip.frames_sha256:
            raise ValueError(
                f"arm {arm.arm} holds two different clips of {clip.prompt!r}, seed {clip.seed}: the machines do not "
                "agree bit by bit, so their figures cannot be put together"
            )
        if known is None:
            number = indices.setdefault(clip.key, len(indices))
            base = replace_clip(base, dataclasses.replace(clip, index=number))
    notes = tuple(dict.fromkeys([*base.notes, *arm.notes]))
    seeds = tuple(dict.fromkeys([*base.seeds, *arm.seeds]))
    return dataclasses.replace(base, notes=notes, seeds=seeds, repeat=base.repeat or arm.repeat)


def _with_files(arm: ArmResult, videos: dict, out: Path) -> ArmResult:
    clips = []
    for clip in arm.clips:
        source = videos.get((arm.arm, clip.key))
        path = None if source is None else f"{CLIPS}/{arm.arm}/{clip.index}.mp4"
        if source is not None:
            _copy(source, out / path)
        clips.append(_moved(clip, path))
    return dataclasses.replace(arm, clips=tuple(clips))


def _moved(clip: ClipResult, path: str | None) -> ClipResult:
    return dataclasses.replace(clip, video=path)


def _copy(source: Path | None, target: Path) -> None:
    if source is None or target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
