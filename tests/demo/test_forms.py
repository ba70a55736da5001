"""Forms from dataclasses: every field can be shown, read back, and stays within what the class accepts."""

import dataclasses

import pytest

from sparsediff.demo.forms import (
    accepts,
    docstring_attributes,
    method_fields,
    needs_calibration,
    offered_methods,
    schedule_fields,
)
from sparsediff.demo.presets import presets
from sparsediff.methods import METHODS, Custom, build_method
from sparsediff.schedule import Schedule

each_method = pytest.mark.parametrize("method", METHODS)


@each_method
def test_fields_say_what_they_are_and_hold_what_the_class_accepts(method):
    for one in method_fields(method):
        assert len(one.help) > 10, one.name
        assert one.read(one.show(one.default)) == one.default, one.name
        for value in one.choices.values():
            assert accepts(METHODS[method], one.name, value), (one.name, value)
        if one.kind == "slider":
            assert one.low < one.high
            assert one.low <= one.default <= one.high
            for end in (one.low, one.high):
                assert accepts(METHODS[method], one.name, one.read(end)), (one.name, end)


def test_the_main_parameter_comes_first_and_is_only_one():
    for name in METHODS:
        assert [f.main for f in method_fields(name)] == [True] + [False] * (
            len(method_fields(name)) - 1
        )
    assert method_fields("sparse_d")[0].name == "select"
    assert method_fields("lite_attention")[0].name == "threshold"


def test_kinds_follow_the_types():
    kinds = {f.name: f.kind for f in method_fields("custom")}
    assert kinds == {
        "density": "slider",
        "producer": "choice",
        "budget": "choice",
        "row_share": "slider",
        "stride": "choice",
        "windows": "text",
        "block": "choice",
        "refresh": "text",
        "search": "choice",
        "vote_threshold_log2": "text",
    }
    threshold = method_fields("lite_attention")[0]
    assert (threshold.low, threshold.high) == (-20.0, -0.1)
    assert {f.name: f.kind for f in method_fields("adaspa")}["head_adaptive"] == "switch"
    assert list(next(f for f in method_fields("auto") if f.name == "block").choices) == [
        "automatic",
        "32",
        "64",
        "128",
    ]


def test_inherited_fields_keep_their_help():
    assert "mass" in docstring_attributes(METHODS["auto"])["producer"]
    assert docstring_attributes(METHODS["auto"])["density"] != ""
    assert docstring_attributes(Custom).keys() == {f.name for f in dataclasses.fields(Custom)}


@pytest.mark.parametrize("method", ["auto", "custom"])
def test_help_explains_every_choice_in_the_words_of_the_page(method):
    helps = {f.name: f.help for f in method_fields(method)}
    assert "2 halves the time" in helps["stride"]
    assert "automatic looks at 64" in helps["stride"]
    assert "None" not in helps["stride"] + helps["block"]
    assert "head_adaptive" in helps["budget"]
    assert "every row of blocks" in helps["row_share"]


def test_what_may_be_automatic_is_read_as_the_page_and_as_python_write_it():
    stride = next(f for f in method_fields("custom") if f.name == "stride")
    assert stride.default == 1
    assert [stride.read(shown) for shown in ("automatic", "None", "2")] == [None, None, 2]
    assert stride.show(None) == "automatic"


@pytest.mark.parametrize(("shown", "value"), [("()", ()), ("None", None), ("(0.5,)", (0.5,))])
def test_never_and_the_methods_own_moment_can_both_be_written(shown, value):
    refresh = next(f for f in method_fields("auto") if f.name == "refresh")
    assert refresh.read(shown) == value
    assert refresh.show(value) == shown


@pytest.mark.parametrize(
    ("method", "name", "shown", "said"),
    [
        ("auto", "density", "much", "density must be a number"),
        ("auto", "density", float("nan"), "density must be a finite number"),
        ("auto", "density", 5, "density lies between 0.01 and 1.0 on this page, got 5"),
        ("lite_attention", "threshold", -1e300, "threshold lies between -20.0 and -0.1"),
        ("draft_attention", "row_minimum", 1.5, "row_minimum must be a whole number"),
        ("auto", "producer", "guess", "producer must be one of mass, pooled"),
        ("custom", "windows", "__import__('os')", "windows takes a Python value"),
        ("custom", "refresh", "1 +", "refresh takes a Python value"),
        ("custom", "windows", "[" * 5000, "windows takes a Python value"),
    ],
)
def test_nonsense_is_a_sentence(method, name, shown, said):
    one = next(f for f in method_fields(method) if f.name == name)
    with pytest.raises(ValueError, match=said) as found:
        one.read(shown)
    assert len(str(found.value)) < 200


def test_methods_that_must_be_measured_are_offered_only_with_a_calibration():
    assert not {"paro_attention", "sparse_vdit"} & set(offered_methods())
    assert "paro_attention" in offered_methods(frozenset({"paro_attention"}))
    assert not needs_calibration(METHODS["lite_attention"])


def test_presets_can_be_built():
    for name in METHODS:
        for preset in presets(name, ()):
            build_method(name, **preset.parameters)
    labels = [p.label for p in presets("auto", ())]
    assert labels == ["close to dense", "as it comes", "fast"]


def test_the_schedule_has_a_form_too():
    assert [f.name for f in schedule_fields()] == [f.name for f in dataclasses.fields(Schedule)]
    steps = schedule_fields()[0]
    assert steps.read("0.25") == 0.25
    assert steps.read("2") == 2
