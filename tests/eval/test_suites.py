"""Prompt lists are what they say, and a file of the user's is read in the forms people have."""

import json

import pytest

from sparsediff.eval.suites import EXTERNAL, FOLDER, load_suite, suite_names
from sparsediff.pipelines.tiny.evaluate import exam


@pytest.mark.parametrize("name", [p.stem for p in FOLDER.glob("*.json")])
def test_suites_of_ours_load_and_say_what_they_are(name):
    suite = load_suite(name)
    assert suite.name == name
    assert suite.version
    assert suite_names()[name] == suite.about


def test_the_bundled_models_suites_are_captions_they_never_saw():
    _, captions = exam(16)
    assert load_suite("standard-tiny").prompts == tuple(captions)
    assert set(load_suite("smoke").prompts) <= set(captions)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "one\n\n two \none\n"),
        ("a.csv", 'index,prompt\n1,one\n2," two"\n'),
        ("b.csv", "one\ntwo\n"),
        ("a.json", json.dumps(["one", "two"])),
        ("b.json", json.dumps([{"prompt_en": "one", "dimension": ["x"]}, {"prompt": "two"}])),
        ("bom.txt", "\ufeffone\ntwo"),
    ],
)
def test_files_of_prompts(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    suite = load_suite(None, tmp_path / name)
    assert suite.prompts == ("one", "two")
    assert suite.name == name.split(".")[0]
    other = load_suite("penguin", tmp_path / name)
    assert (other.name, other.version) == ("penguin", suite.version)


def test_a_changed_file_is_another_version(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one")
    before = load_suite(None, path).version
    path.write_text("two")
    assert load_suite(None, path).version != before


def test_mistakes_name_the_fix(tmp_path):
    with pytest.raises(ValueError, match="unknown suite 'smok'; known: smoke"):
        load_suite("smok")
    for name in EXTERNAL:
        with pytest.raises(FileNotFoundError, match="--prompts FILE"):
            load_suite(name)
    (tmp_path / "p.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no prompts; write one a line"):
        load_suite(None, tmp_path / "p.txt")
    with pytest.raises(ValueError, match="not both"):
        load_suite("smoke", tmp_path / "p.txt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_suite(None, tmp_path / "q.txt")
    (tmp_path / "p.json").write_text('{"prompt": "x"}')
    with pytest.raises(ValueError, match="must hold a list"):
        load_suite(None, tmp_path / "p.json")
    (tmp_path / "p.json").write_text("[[1]]")
    with pytest.raises(ValueError, match="holds a record without"):
        load_suite(None, tmp_path / "p.json")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"p\.txt is no UTF-8 text"):
        load_suite(None, tmp_path / "p.txt")
