"""A headless Chromium for tests of pages: found on the path, driven by playwright, cut off from any network."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# No sandbox: containers lack the namespaces for it.  The rest keeps the browser itself from calling home.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
)


def chromium_path() -> str | None:
    """Where a Chromium is, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def require_chromium() -> str:
    """Where Chromium is; skips the test that asks if there is none."""
    pytest.importorskip("playwright", reason="the Python package playwright is not installed")
    path = chromium_path()
    if path is None:
        pytest.skip("no Chromium on the path; `make browser` installs it or says how")
    return path


@dataclass
class Watched:
    """What a page did that it should not have, filled while it is open.

    Attributes:
        errors: uncaught exceptions, and messages on the console that are errors or warnings.
        requests: addresses asked for, other than the file itself and what it carries.
    """

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def watch(self, page, *, allow: tuple[str, ...] = ("file:", "data:", "blob:")) -> None:
        """Listen to a page; `allow`: starts of addresses that are no network."""
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console",
            lambda message: (
                self.errors.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(allow) else self.requests.append(request.url)
            ),
        )


@contextlib.contextmanager
def launch() -> Iterator[object]:
    """A playwright `Browser`."""
    path = require_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()
