"""`make matrix`, but for what needs the network."""

import sys
from pathlib import Path

import diffusers_matrix as matrix
import pytest
from diffusers_matrix import Outcome, choose

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("releases", "with_pre", "chosen"),
    [
        (["0.42.1", "0.39.0", "0.38.0", "0.9.0"], ["0.42.1"], {"0.38.0": "floor", "0.42.1": "newest"}),
        (["0.100.0", "0.38.2"], ["0.101.0rc1"], {"0.38.2": "floor", "0.100.0": "newest", "0.101.0rc1": "next"}),
        (["0.38.0", "0.37.1"], ["0.38.0", "0.38.0rc1"], {"0.38.0": "floor"}),
        (["1.0", "0.40.0"], ["1.0"], {"0.40.0": "floor", "1.0": "newest"}),
    ],
)  # fmt: skip
def test_floor_newest_and_a_pre_release_after_it(releases, with_pre, chosen):
    assert choose(releases, with_pre, "0.38") == chosen


def test_the_floor_is_read_from_the_project():
    floor = matrix.asked_for((ROOT / "pyproject.toml").read_text())
    assert f'"diffusers>={floor}"' in (ROOT / "pyproject.toml").read_text()


def test_only_diffusers_and_its_hub_client_are_free():
    pinned = (ROOT / "constraints.txt").read_text()
    held = matrix.without_free(pinned)
    gone = set(pinned.splitlines()) - set(held.splitlines())
    assert sorted(line.partition("==")[0] for line in gone) == ["diffusers", "huggingface_hub"]


def test_a_real_run_is_counted(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "0")  # a worker takes seconds to start
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    slow\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n"
        "def test_one(): pass\n\n"
        "def test_two(): pass\n\n"
        "def test_bad(): assert False\n\n"
        "def test_broken(nothing): pass\n\n"
        "def test_skipped(): pytest.skip('no')\n\n"
        "@pytest.mark.slow\ndef test_slow(): pass\n"
    )
    counts = matrix.run_tests(sys.executable, ["test_it.py"], tmp_path / "results.xml")
    assert counts == {"passed": 2, "failed": 1, "broken": 1, "skipped": 1}
    assert "test_bad" in capfd.readouterr().out
    assert matrix.run_tests(sys.executable, ["--no-such-flag"], tmp_path / "results.xml") == {}


@pytest.mark.parametrize(
    ("role", "installed", "counts", "passed"),
    [
        ("floor", True, {"passed": 5, "skipped": 2}, True),
        ("newest", True, {"passed": 5, "failed": 1}, False),
        ("next", True, {"passed": 5, "failed": 1}, False),
        ("newest", True, {"passed": 5, "broken": 1}, False),
        ("newest", True, {"skipped": 5}, False),
        ("newest", True, {}, False),
        ("newest", False, {}, False),
        ("next", False, {}, True),
    ],
)
def test_what_is_good_enough(role, installed, counts, passed):
    outcome = Outcome(release="0.1", role=role, counts=counts, installed=installed, sources="same")
    assert outcome.passed == passed
    said = str(outcome)
    assert said.startswith("FAILED") != passed
    assert f"diffusers 0.1 ({role}): " in said
    assert ("does not install" in said) != installed
    assert all(f"{number} {what}" in said for what, number in counts.items())
