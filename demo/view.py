"""The evaluation's report as a picture inside the page: the same file, showing one part of itself.

The report is a whole document with a style of its own, so it lives in an inline frame; a few lines of `frame.js` tell it
which part to show, take over the page's colours and fit the frame's height.
"""

from __future__ import annotations

import functools
import html
import re
import tempfile
from importlib import resources
from pathlib import Path
from typing import Literal

from sparsediff.eval.report import write_report

Part = Literal["compare", "inside", "methods"]
TITLES = {
    "compare": "Dense and sparse clip side by side, with figures",
    "inside": "Where attention is sparse, and what a patch attends",
    "methods": "All methods on one prompt",
}


# The stored clip's times were taken while the machine did other work, so the page does not show them.
EXAMPLE_NOTE = (
    '<p class="sd-label"><b>Stored example</b> a clip of tiny-wan, auto as it comes, 20 steps, seed 0; without times, '
    "since it was made on a busy machine. Press the button to make your own.</p>"
)


def framed(report: str, part: Part, *, timed: bool = True) -> str:
    """An inline frame that shows one part of a report, as HTML.

    Args:
        report: what `sparsediff.eval.report.write_report` wrote.
        part: which of its sections.
        timed: whether its times mean something; otherwise they are not shown.
    """
    extra = f"<style>{asset('frame.css')}</style>\n<script>{asset('frame.js')}</script>\n</body>"
    inside = report.replace(
        "<html ", f'<html data-part="{part}" data-timed="{str(timed).lower()}" ', 1
    )
    head, _, _ = inside.rpartition("</body>")
    source = html.escape(f"{head}{extra}\n</html>", quote=True)
    return f'<iframe class="sd-frame" title="{TITLES[part]}" data-part="{part}" srcdoc="{source}"></iframe>'


def example(part: Part) -> str:
    """Something to look at before anything has run, and labelled so."""
    return EXAMPLE_NOTE + framed(_example_report(), part, timed=False)


@functools.cache
def _example_report() -> str:
    with (
        resources.as_file(resources.files("sparsediff.demo") / "example") as folder,
        tempfile.TemporaryDirectory(prefix="sparsediff-demo-") as scratch,
    ):
        return write_report(folder, out=Path(scratch) / "report.html").read_text(encoding="utf-8")


@functools.cache
def asset(name: str) -> str:
    """A file of `assets/`."""
    return (resources.files("sparsediff.demo") / "assets" / name).read_text(encoding="utf-8")


@functools.cache
def page_css() -> str:
    """The page's own style, on the colours of the report."""
    style = (resources.files("sparsediff.eval") / "report_assets" / "style.css").read_text("utf-8")
    light = re.search(r"^:root \{(.*?)\}", style, re.M | re.S)[1]
    dark = re.search(r'^:root\[data-theme="dark"\] \{(.*?)\}', style, re.M | re.S)[1]
    return f":root, body {{{light}}}\nbody.dark {{{dark}}}\n{asset('page.css')}"
