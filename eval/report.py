"""One self-contained HTML file from a folder of results: figures, clips, masks, and whether to believe them.

The page needs no network and no server; prompts, labels and paths reach it as JSON and are shown as text only.
"""

from __future__ import annotations

import base64
import html
import json
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from sparsediff.eval.report_figures import page_figures
from sparsediff.eval.report_masks import page_masks
from sparsediff.eval.report_media import page_videos
from sparsediff.eval.report_words import page_words
from sparsediff.eval.results import load_results
from sparsediff.eval.summary import summarise
from sparsediff.eval.typed_json import encode

MAX_BYTES = 48 << 20
MASK_SHARE = 0.25  # of the cap; clips take the rest
STYLES = ("style.css",)
SCRIPTS = ("core.js", "charts.js", "player.js", "masks.js", "page.js")


def write_report(
    folder: str | Path, *, out: str | Path | None = None, max_bytes: int = MAX_BYTES
) -> Path:
    """Write the report of a folder of results; returns its path.

    Args:
        folder: with `arms/`, `clips/` and `captures/`, as `sparsediff eval run` writes it.
        out: the HTML file; `report.html` in the folder if left out.
        max_bytes: of embedded clips and masks together.  Clips beyond it are linked and must then travel with the page;
            masks beyond it are left out.  The page says so.

    Raises:
        FileNotFoundError: no results there.
        ValueError: a damaged file, or arms that do not belong together.
        OSError: `out` cannot be written.
    """
    results = load_results(folder)
    summaries = summarise(results)
    if not summaries:
        raise ValueError(
            f"{folder} holds arms without a single clip; let `sparsediff eval run` finish one"
        )
    path = Path(out) if out is not None else results.folder / "report.html"
    blobs = Blobs(limit=int(max_bytes * MASK_SHARE))
    masks, mask_notes = page_masks(results, blobs)
    blobs.limit = max_bytes
    videos, video_notes = page_videos(results, blobs, path.parent)
    data = page_figures(results, summaries, videos)
    data |= page_words(results, summaries, focus=data["focus"], notes=[*mask_notes, *video_notes])
    data["masks"] = masks
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(data, blobs), encoding="utf-8")
    return path


@dataclass
class Blobs:
    """Bytes that the page carries as base64, each under an identifier, up to a limit.

    Attributes:
        limit: bytes of base64 text.
        texts: identifier -> base64.
    """

    limit: int
    texts: dict[str, str] = field(default_factory=dict)
    _size: int = 0

    def fits(self, count: int) -> bool:
        """Whether `count` more bytes would."""
        return self._size + -(-count // 3) * 4 <= self.limit

    def add(self, content: bytes) -> str:
        """Take some bytes in, whether they fit or not; returns their identifier."""
        text = base64.b64encode(content).decode("ascii")
        name = f"blob-{len(self.texts)}"
        self.texts[name] = text
        self._size += len(text)
        return name


def _page(data: dict[str, object], blobs: Blobs) -> str:
    assets = resources.files("sparsediff.eval") / "report_assets"
    read = {
        name: (assets / name).read_text(encoding="utf-8")
        for name in ("page.html", *STYLES, *SCRIPTS)
    }
    parts = {
        "title": html.escape(str(data["title"])),
        "style": "\n".join(read[name] for name in STYLES),
        "data": json_for_script(data),
        "blobs": "\n".join(
            f'<script type="text/plain" id="{name}">{text}</script>'
            for name, text in blobs.texts.items()
        ),
        "script": "\n".join(read[name] for name in SCRIPTS),
    }
    # One pass over the template: what is filled in is never searched for places to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read["page.html"])


def json_for_script(data: object) -> str:
    """JSON that can stand inside a `<script>` element: no text in it can end the element or open a comment."""
    text = json.dumps(encode(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
