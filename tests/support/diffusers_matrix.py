"""Run the conformance tests in several releases of diffusers, each in an environment of its own: `make matrix`.

    python tests/support/diffusers_matrix.py                     # the floor, the newest, and a pre-release after it
    python tests/support/diffusers_matrix.py 0.39.0 0.40.0       # these
    python tests/support/diffusers_matrix.py git+https://github.com/huggingface/diffusers

Everything but diffusers, and the hub client whose range each of its releases narrows, is as constraints.txt pins it.  The
environments, under build/matrix, are some gigabytes each and are used again.  Needs nothing but Python and pip.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "matrix"
SUITE = ("tests/pipelines", "tests/core")
FREE = ("diffusers", "huggingface_hub")  # not held to constraints.txt
OPTIONAL = "next"  # a pre-release need not install


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one release.

    Attributes:
        release: its version, or what was asked for.
        role: `"floor"`, `"newest"`, `"next"`, or `"asked for"`.
        counts: number of tests by outcome; empty if it did not install, or no test was reached.
        installed: whether it did.
        sources: how far the stock sources are those that were read.
    """

    release: str
    role: str
    counts: Mapping[str, int]
    installed: bool = True
    sources: str = ""

    @property
    def passed(self) -> bool:
        """Whether that is good enough."""
        if not self.installed:
            return self.role == OPTIONAL
        bad = self.counts.get("failed", 0) + self.counts.get("broken", 0)
        return bad == 0 and self.counts.get("passed", 0) > 0

    def __str__(self) -> str:
        said = ", ".join(f"{n} {what}" for what, n in self.counts.items()) or "no test was run"
        what = f"{said}; {self.sources}" if self.installed else "does not install"
        verdict = "ok" if self.passed and self.installed else "--" if self.passed else "FAILED"
        return f"{verdict:<8}diffusers {self.release} ({self.role}): {what}"


def asked_for(pyproject: str) -> str:
    """The oldest diffusers of a pyproject.toml: `"0.38"`."""
    dependencies = tomllib.loads(pyproject)["project"]["dependencies"]
    return next(d.removeprefix("diffusers>=") for d in dependencies if d.startswith("diffusers"))


def choose(releases: Sequence[str], with_pre: Sequence[str], floor: str) -> dict[str, str]:
    """Which releases to test, and as what.

    Args:
        releases: final ones, the newest first.
        with_pre: the same among pre-releases.
        floor: the oldest to take, such as `"0.38"`.
    """
    promised = [r for r in releases if _numbers(r) >= _numbers(floor)]
    chosen = {promised[-1]: "floor"}
    chosen.setdefault(promised[0], "newest")
    if with_pre[0] not in releases:
        chosen[with_pre[0]] = OPTIONAL
    return chosen


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def on_the_index(*flags: str) -> list[str]:
    """The releases of diffusers that pip finds for this Python, the newest first.

    Raises:
        SystemExit: pip finds none, in its own words.
    """
    command = [sys.executable, "-m", "pip", "index", "versions", "diffusers", *flags]
    said = subprocess.run(command, capture_output=True, text=True)
    if (listed := re.search(r"Available versions: (.+)", said.stdout)) is None:
        sys.exit(f"pip lists no releases of diffusers; name some instead\n{said.stderr.strip()}")
    return listed[1].split(", ")


def without_free(constraints: str) -> str:
    """The constraints that hold in every release."""
    lines = constraints.splitlines(keepends=True)
    return "".join(line for line in lines if line.partition("==")[0].strip() not in FREE)


def install(release: str, folder: Path) -> Path | None:
    """An environment with that release; its Python, or None if pip cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(without_free((ROOT / "constraints.txt").read_text()))
    wanted = f"diffusers @ {release}" if ":" in release else f"diffusers=={release}"
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        "-c",
        str(constraints),
        "-e",
        ".[dev]",
        wanted,
    ]
    return python if subprocess.run(pip, cwd=ROOT).returncode == 0 else None


def run_tests(python: Path | str, suite: Sequence[str], results: Path) -> dict[str, int]:
    """Number of tests by outcome; what pytest says goes to the terminal."""
    results.unlink(missing_ok=True)
    options = [
        "-q",
        "--show-capture=no",
        "-m",
        "not gpu and not slow",
        "-n",
        "auto",
        "--maxprocesses",
        "8",
    ]
    command = [str(python), "-m", "pytest", *suite, *options, f"--junitxml={results}"]
    # One thread a worker, as `make test` has it.
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return counted(results.read_text()) if results.exists() else {}


def counted(junit: str) -> dict[str, int]:
    """Of pytest's XML."""
    suite = ElementTree.fromstring(junit).find("testsuite")
    total, failed, broken, skipped = (
        int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")
    )
    passed = total - failed - broken - skipped
    counts = {"passed": passed, "failed": failed, "broken": broken, "skipped": skipped}
    return {what: number for what, number in counts.items() if number}


def sources(python: Path) -> str:
    """In one line, how far the stock sources are those that were read."""
    command = [str(python), "tests/pipelines/upstream.py", "--brief"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip().partition(": ")[2] or "its sources could not be compared"


def check(release: str, role: str) -> Outcome:
    """Install one release and test it."""
    print(f"\ndiffusers {release} ({role}): installing", flush=True)
    folder = FOLDER / re.sub(r"[^\w.]+", "-", release)
    if (python := install(release, folder)) is None:
        return Outcome(release=release, role=role, counts={}, installed=False)
    print(f"diffusers {release} ({role}): testing", flush=True)
    counts = run_tests(python, SUITE, folder / "results.xml")
    return Outcome(release=release, role=role, counts=counts, sources=sources(python))


def main(releases: Sequence[str]) -> int:
    """Test what is named, or what `choose` says; 1 if any release fails that must not."""
    if releases:
        chosen = dict.fromkeys(releases, "asked for")
    else:
        floor = asked_for((ROOT / "pyproject.toml").read_text())
        chosen = choose(on_the_index(), on_the_index("--pre"), floor)
    outcomes = [check(release, role) for release, role in chosen.items()]
    print("\n" + "\n".join(map(str, outcomes)))
    if not releases and OPTIONAL not in chosen.values():
        print(f"{'--':<8}no pre-release is newer")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
