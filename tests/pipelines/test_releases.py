"""What is said of each release of diffusers holds in the one that is installed."""

import tomllib
from pathlib import Path

import diffusers
import pytest

import sparsediff.eval  # noqa: F401  (mapped folders)
from sparsediff.eval.models_table import as_text
from sparsediff.pipelines.cards import CARDS
from sparsediff.pipelines.releases import (
    FLOOR,
    REVISION,
    SINCE,
    family_since,
    installed,
    reaches,
    since,
)

ROOT = Path(__file__).parents[2]
LANGUAGE = {"LLaDA2MoeModelLM", "DiffusionGemmaForBlockDiffusion"}  # not diffusers' classes
NAMES = {name for card in CARDS for name in (card.transformer, *card.pipelines)} - LANGUAGE


def test_the_floor_is_what_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"diffusers>={FLOOR}" in project["dependencies"]


def test_the_release_that_was_read_is_the_pinned_one():
    assert f"diffusers=={REVISION}" in (ROOT / "constraints.txt").read_text().splitlines(), (
        f"the adapters were read in diffusers {REVISION}, constraints.txt pins another. With the new one installed, "
        "`python tests/pipelines/upstream.py` shows what changed in the sources they stand on. Read it and the new "
        "pipelines, mend adapters and cards, set REVISION in pipelines/releases.py, then add --record"
    )


def test_what_came_after_the_floor_is_on_a_card():
    assert set(SINCE) <= NAMES
    assert all(reaches(FLOOR, first) and not reaches(first, FLOOR) for first in SINCE.values())


def test_a_class_is_there_from_its_release_on():
    there = set(dir(diffusers))
    assert {name for name in NAMES if name in there} == {n for n in NAMES if reaches(since(n))}


@pytest.mark.parametrize(
    ("first", "version", "there"),
    [
        ("0.40", "0.40.0", True),
        ("0.40", "0.39.3", False),
        ("0.40", "0.100.0", True),
        ("0.40", "1.0", True),
        ("0.40", "0.40.0.dev0", True),
        ("0.9", "0.10.1", True),
    ],
)
def test_releases_are_compared_as_numbers(first, version, there):
    assert reaches(first, version) == there


def test_a_family_needs_its_transformer_and_a_pipeline():
    assert family_since("WanTransformer3DModel", ["WanPipeline"]) == FLOOR
    assert family_since("MiniMaxH3Transformer3DModel", []) == "0.40"
    assert family_since("LTX2VideoTransformer3DModel", ["LTX2DFRPipeline"]) == "0.41"
    assert family_since("LTX2VideoTransformer3DModel", ["LTX2DFRPipeline", "LTX2Pipeline"]) == FLOOR


def test_the_table_marks_what_an_old_release_lacks(monkeypatch):
    for module in ("releases", "model_card"):
        monkeypatch.setattr(f"sparsediff.pipelines.{module}.installed", lambda: "0.40.1")
    text = as_text()
    assert "MiniMax-H3 came with" not in text
    assert "LTX2HDRPipeline (from 0.39)" in text
    assert "LTX2DFRPipeline (not here: from 0.41)" in text
    assert "not here    Kandinsky 6 came with diffusers 0.42, this is 0.40.1; pip install" in text
    for module in ("releases", "model_card"):
        monkeypatch.setattr(f"sparsediff.pipelines.{module}.installed", lambda: "0.38.1")
    text = as_text()
    assert "not here    MiniMax-H3 came with diffusers 0.40, this is 0.38.1; pip install" in text
    assert "not here    DiffusionGemma came with diffusers 0.39, this is 0.38.1; pip" in text
    lacking = ("AnyFlow", "DiffusionGemma", "Flux.3", "Kandinsky 6", "MiniMax-H3", "Motif-Video")
    assert text.count("    not here    ") == len(lacking)
    assert all(f"not here    {name} came with" in text for name in lacking)


def test_the_table_says_what_is_installed():
    text = as_text()
    assert text.startswith(f"diffusers {installed()} is installed")
    assert text.count("    not here    ") == sum(not reaches(card.since) for card in CARDS)
