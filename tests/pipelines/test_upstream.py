"""What adapters rely on in diffusers: any change of it must be read before it is trusted.

In the release that was read a change fails.  In another one it is listed, and the other tests of this folder say whether
it matters.
"""

import json

import pytest
import upstream

from sparsediff.pipelines.releases import REVISION, installed

NAME = "diffusers.models.transformers.transformer_wan.WanAttnProcessor"


def test_stock_attention_is_what_was_read():
    changed = upstream.differences(upstream.read(), upstream.now())
    words = upstream.in_words(changed)
    if changed and installed() != upstream.REVISION:
        pytest.skip(
            f"in diffusers {installed()} {words}. `python tests/pipelines/upstream.py` shows each"
        )
    assert not changed, f"{words}. {upstream.INSTRUCTION}"


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """A record of what is installed, with one class as `change` leaves it."""

    def planted(release, **change):
        here = upstream.now()
        here[NAME] = {**here[NAME], **change}
        path = tmp_path / "upstream.json"
        path.write_text(json.dumps({release: here}))
        monkeypatch.setattr(upstream, "RECORD", path)
        monkeypatch.setattr(upstream, "REVISION", release)

    return planted


@pytest.mark.parametrize(
    ("what", "named"), [("signature", "signature and source"), ("sha256", "source")]
)
def test_a_change_in_the_release_that_was_read_fails_with_what_to_do(what, named, recorded):
    recorded(installed(), **{what: "something else"})
    with pytest.raises(AssertionError, match=rf"WanAttnProcessor \({named}\).*Read their sources"):
        test_stock_attention_is_what_was_read()


def test_a_change_in_another_release_is_listed(recorded):
    recorded("0.1", sha256="something else")
    with pytest.raises(
        pytest.skip.Exception, match=r"1 of \d+ .* 0\.1: WanAttnProcessor \(source\)\. `python"
    ):
        test_stock_attention_is_what_was_read()


def test_nothing_changed_in_another_release_passes(recorded):
    recorded("0.1")
    test_stock_attention_is_what_was_read()


def test_classes_that_came_or_went_are_named():
    there = {"signature": "self", "sha256": "1"}
    changed = upstream.differences({"a": there, "gone": there}, {"a": there, "come": there})
    assert changed == {"come": "new", "gone": "not here"}


def test_recording_wants_the_release_that_is_said_to_be_read(recorded):
    recorded("0.1")
    with pytest.raises(SystemExit, match=r"releases.py says that 0\.1 was read"):
        upstream.main(["--record"])
    recorded(installed(), sha256="something else")
    upstream.main(["--record"])
    assert upstream.read() == upstream.now()


def test_the_change_of_a_source_is_shown_beside_its_adapter(tmp_path):
    module, _, cls = NAME.rpartition(".")
    for folder, line in (("old", "return 1"), ("new", "return 2")):
        path = tmp_path / folder / (module.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True)
        path.write_text(
            f"X = 0\n\n\n@decorated\nclass {cls}:\n    def f(self):\n        {line}\n\n\nY = 0\n"
        )
    lines = list(upstream.explained({NAME: "source"}, tmp_path / "old", tmp_path / "new"))
    assert lines[:2] == [f"\n{NAME}: source", "  read beside pipelines/wan.py"]
    assert "-        return 1" in lines
    assert "+        return 2" in lines
    assert " @decorated" in lines
    assert not [line for line in lines if "X = 0" in line or "Y = 0" in line]
    assert upstream.source_in(tmp_path, "no.module.Here") == ""


def test_the_command_says_it_in_one_line(capsys):
    upstream.main(["--brief"])
    said = capsys.readouterr().out.strip()
    assert said.startswith(f"diffusers {installed()}: ")
    assert "\n" not in said
    assert ("all " in said) or installed() != REVISION
