"""The table of models says what diffusers and the adapters say."""

import ast
import re
from pathlib import Path

import diffusers
import pytest
from families.registry import all_families

import sparsediff.eval  # noqa: F401  (mapped folders)
from sparsediff.adapter import ADAPTERS, adapter_of
from sparsediff.eval.cli import main
from sparsediff.eval.models_table import as_markdown, as_text
from sparsediff.pipelines.cards import ABSENT, CARDS, NOT_SPARSE
from sparsediff.pipelines.releases import REVISION

ROOT = Path(__file__).parents[2]
SOURCES = Path(diffusers.__file__).parent
LANGUAGE = {"LLaDA2MoeModelLM", "DiffusionGemmaForBlockDiffusion"}

same_diffusers = pytest.mark.skipif(
    diffusers.__version__ != REVISION,
    reason=f"the cards were read in diffusers {REVISION}, this is {diffusers.__version__}: read its pipelines again",
)


def test_every_adapter_has_a_card():
    assert sorted(card.transformer for card in CARDS) == sorted(ADAPTERS)
    assert not set(NOT_SPARSE) & set(ADAPTERS)


def test_every_adapter_that_is_written_is_used():
    written = {
        f"sparsediff.pipelines.{path.stem}:{node.name}"
        for path in sorted((Path(__file__).parents[2] / "pipelines").glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Adapter")
    }
    shared = {"sparsediff.pipelines.language_model:LanguageModelAdapter"}
    assert written - shared == set(ADAPTERS.values())


def test_what_is_said_to_be_checked_is():
    claimed = [name for card in CARDS for name in card.checked]
    modules = {name for name in claimed if name.startswith("test_")}
    families = [name for name in claimed if name not in modules]
    assert len(families) == len(set(families))
    assert set(families) == {family.name for family in all_families()}
    for name in modules:
        assert (Path(__file__).parent / f"{name}.py").exists(), name


def takers():
    """Pipeline classes by the transformer class that their constructors name."""
    found, exported = {}, set(dir(diffusers))
    for path in (SOURCES / "pipelines").glob("[!d]*/pipeline_*.py"):  # not deprecated/
        source = path.read_text()
        if not any(card.transformer in source for card in CARDS):
            continue
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ClassDef) or node.name not in exported:
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    for argument in method.args.args:
                        if argument.arg == "transformer" and argument.annotation:
                            named = re.findall(r"\w+", ast.unparse(argument.annotation))
                            for name in named:
                                found.setdefault(name, set()).add(node.name)
    return found


@same_diffusers
def test_pipelines_are_those_that_take_the_transformer():
    found = takers()
    assert len(found) > 20
    for card in CARDS:
        assert set(card.pipelines) <= set(dir(diffusers)), card.family
        if card.transformer not in LANGUAGE:
            assert set(card.pipelines) == found.get(card.transformer, set()), card.family


@same_diffusers
def test_every_video_transformer_is_supported_or_has_its_reason():
    source = (SOURCES / "models" / "transformers" / "__init__.py").read_text()
    exported = {name for name in re.findall(r"\w+", source) if name.endswith("Transformer3DModel")}
    assert len(exported) > 20
    assert exported <= set(ADAPTERS) | set(NOT_SPARSE)
    assert set(NOT_SPARSE) <= set(dir(diffusers))


@same_diffusers
def test_what_is_said_to_be_absent_is():
    words = {"LongCat-Video": "LongCatVideo", "Wan 2.2 S2V": "S2V"}
    assert set(words) == set(ABSENT)
    for name, word in words.items():
        assert not [found for found in dir(diffusers) if word in found], name


def test_each_family_is_printed_with_what_its_adapter_says():
    text = as_text()
    for card in CARDS:
        assert f"{card.family}  ({card.transformer})" in text
        for preset in adapter_of(card.transformer).presets:
            assert preset.source in text
    for reason in (*NOT_SPARSE.values(), *ABSENT.values()):
        assert reason in text


def test_the_page_of_models_is_up_to_date():
    page = (ROOT / "docs" / "models.md").read_text()
    assert page == as_markdown(), "run: sparsediff models --markdown > docs/models.md"


@pytest.mark.parametrize("flags", [[], ["--markdown"]])
def test_the_command_prints_it(flags, capsys):
    assert main(["models", *flags]) == 0
    assert capsys.readouterr().out.strip() == (as_markdown() if flags else as_text()).strip()


def test_no_adapter_inherits_what_was_published_for_another_model():
    for name in ADAPTERS:
        adapter = adapter_of(name)
        if any(preset.provenance != "guess" for preset in adapter.presets):
            assert "presets" in vars(type(adapter)), f"{name} needs presets of its own"
