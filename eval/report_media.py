"""Clips for the report: embedded while they fit, linked beyond."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from sparsediff.eval.results import Results

if TYPE_CHECKING:
    from sparsediff.eval.report import Blobs


def page_videos(
    results: Results, blobs: Blobs, page_folder: Path
) -> tuple[dict[str, dict[int, dict[str, str]]], list[str]]:
    """`{arm: {clip index: {"inline": blob} or {"href": relative path}}}`, and what to tell the reader.

    The first prompts of all arms come first: a clip is of no use without those it is compared with.
    """
    videos: dict[str, dict[int, dict[str, str]]] = {arm.arm: {} for arm in results.arms}
    linked = missing = 0
    full = False
    clips = sorted(
        ((clip.index, arm.arm, clip) for arm in results.arms for clip in arm.clips),
        key=lambda x: x[0],
    )
    for index, arm, clip in clips:
        path = results.video_path(clip)
        if path is None:
            missing += clip.video is not None
            continue
        full = full or not blobs.fits(path.stat().st_size)
        if full:
            where = os.path.relpath(path.resolve(), page_folder.resolve())
            videos[arm][index] = {"href": quote(Path(where).as_posix())}
            linked += 1
        else:
            videos[arm][index] = {"inline": blobs.add(path.read_bytes())}
    notes = []
    if linked:
        notes.append(
            f"{linked} of {len(clips)} clips did not fit into this page ({blobs.limit / 2**20:.0f} MiB) and are linked: they "
            "play while the page lies in its folder, and browsers then draw no difference."
        )
    if missing:
        notes.append(f"{missing} of {len(clips)} clips are no longer where the results say.")
    return videos, notes
