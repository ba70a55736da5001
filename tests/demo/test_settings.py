"""Settings travel: through a form, an address, a command, Python; and stay within bounds."""

import dataclasses
import re
import shlex

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparsediff.demo.forms import method_fields, offered_methods
from sparsediff.demo.limits import LARGEST_SEED, limits_of
from sparsediff.demo.served import served
from sparsediff.demo.settings import Settings, changed, command, from_query, python_lines, to_query
from sparsediff.eval.cli import build_parser
from sparsediff.eval.compare import Request
from sparsediff.eval.models import default_request
from sparsediff.pipelines import tiny
from sparsediff.schedule import Schedule

DEFAULTS = Request(
    prompt="", steps=20, guidance=3.0, height=128, width=128, frames=33, text_tokens=64
)


@st.composite
def all_settings(draw):
    method = draw(st.sampled_from(sorted(offered_methods())))
    shown = {}
    for one in method_fields(method):
        if one.kind == "slider":
            steps = round((one.high - one.low) / one.step)
            shown[one.name] = one.low + draw(st.integers(0, steps)) * one.step
        elif one.kind == "choice":
            shown[one.name] = draw(st.sampled_from(sorted(one.choices)))
        elif one.kind == "switch":
            shown[one.name] = draw(st.booleans())
    request = dataclasses.replace(
        DEFAULTS,
        prompt=draw(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1)),
        seed=draw(st.integers(0, LARGEST_SEED)),
        steps=draw(st.integers(1, 50)),
        guidance=draw(st.floats(0, 30)),
    )
    schedule = draw(
        st.sampled_from([None, {}, {"dense_steps": 2}, {"dense_steps": 0.25, "dense_layers": 1}])
    )
    parameters = changed(method_fields(method), shown)
    return Settings(request=request, method=method, parameters=parameters, schedule=schedule)


@given(all_settings())
@example(Settings(request=DEFAULTS, method="custom", parameters={"stride": None}))
@example(Settings(request=DEFAULTS, method="auto", parameters={"refresh": (), "stride": 2}))
def test_an_address_restores_settings(settings):
    query = to_query(settings)
    assert all(isinstance(value, str) for value in query.values())
    back = from_query(query, DEFAULTS, offered_methods())
    assert back.request == settings.request
    assert (back.method, back.parameters) == (settings.method, settings.parameters)
    if settings.schedule is None:
        assert back.schedule is None
    else:
        assert Schedule(**back.schedule) == Schedule(**settings.schedule)


@given(all_settings())
def test_the_command_asks_for_the_same(settings):
    words = shlex.split(command(settings, "tiny-wan", {"device": "cpu", "dtype": None}))
    prompt = words.index("--prompt")
    # argparse takes a prompt that begins with a dash for a flag, as any command line does
    words[prompt : prompt + 2] = [f"--prompt={words[prompt + 1]}"]
    found = build_parser().parse_args(words[1:])
    assert (found.prompt, found.seed) == (settings.request.prompt, settings.request.seed)
    assert (found.steps, found.guidance) == (settings.request.steps, settings.request.guidance)
    assert (found.height, found.width, found.frames) == (128, 128, 33)
    assert (found.method, found.device, found.dtype) == (settings.method, "cpu", None)
    assert len(found.set) == len(settings.parameters)


def test_python_makes_the_same_clip(studio, settings):
    """The lines are run as they stand, and give the clip that the page gave, bit by bit."""
    from sparsediff.demo.jobs import Job
    from sparsediff.demo.work import Result, comparison, shared
    from sparsediff.eval.measure import sha256
    from sparsediff.eval.results import load_results
    from sparsediff.eval.video import to_video_tensor

    asked = settings("auto", seed=5, density=0.4)
    (result,) = [e for e in Job(comparison(studio, asked)).events() if isinstance(e, Result)]
    names = {}
    exec(shared(studio, result.settings).python, names)
    (arm,) = load_results(result.folder).others
    assert sha256(to_video_tensor(names["video"])) == arm.clips[0].frames_sha256


def test_python_names_what_the_page_ran():
    settings = Settings(
        request=dataclasses.replace(DEFAULTS, prompt="it's"),
        method="paro_attention",
        parameters={"density": 0.3},
        schedule={"dense_steps": 2},
    )
    lines = python_lines(
        settings, "tiny-wan", {"device": "cuda", "dtype": "bfloat16", "calibration": "paro"}
    )
    compile(lines, "lines", "exec")
    assert (
        "sparsediff.pipelines.tiny.load('tiny-wan', torch_dtype=torch.bfloat16, device='cuda')"
        in lines
    )
    assert (
        "sparsediff.enable(pipe, 'paro_attention', schedule=sparsediff.Schedule(dense_steps=2), "
        "calibration='paro', density=0.3)"
    ) in lines
    other = python_lines(settings, "owner/name", {})
    compile(other, "lines", "exec")
    assert f"DiffusionPipeline.from_pretrained('owner/name', {tiny.dtype_keyword()}=" in other


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"steps": "many"}, "steps='many', which is no number"),
        ({"guidance": "nan"}, "guidance='nan', which is out of all bounds"),
        ({"seed": "9" * 60}, "which is out of all bounds"),
        ({"set.density": "5"}, "density lies between 0.01 and 1.0"),
        ({"schedule.dense_layers": "1e300"}, "dense_layers lies between"),
        ({"method": "magic"}, "method 'magic'"),
        ({"method": "paro_attention"}, "method 'paro_attention'"),
        ({"set.nothing": "1"}, "sets 'nothing'"),
        ({"set.density": "lots"}, "density must be a number"),
        ({"schedule.dense_layers": "x"}, "dense_layers must be a number"),
    ],
)
def test_a_wrong_address_is_a_sentence(query, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        from_query(query, DEFAULTS, offered_methods())


# -- bounds -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limits():
    return limits_of(tiny.load(), served("tiny-wan"), default_request("tiny-wan"))


def test_limits_of_the_bundled_model(limits):
    assert (limits.multiple, limits.frame_step) == (8, 4)
    assert limits.defaults == dataclasses.replace(DEFAULTS, prompt=limits.defaults.prompt)
    assert limits.frames >= 33
    assert limits.side >= 128
    whole = limits.check(Request(prompt=" a star "))
    assert (whole.prompt, whole.steps, whole.frames, whole.text_tokens) == ("a star", 20, 33, 64)


def test_the_other_bundled_model_has_limits():
    name = "tiny-cogvideox"
    limits = limits_of(tiny.load(name), served(name), default_request(name))
    assert limits.check(Request(prompt="a star")).height == 128


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "  "}, "Write a prompt first"),
        ({"prompt": "a" * 1001}, "1000 are the most"),
        ({"negative_prompt": "a" * 1001}, "The negative prompt has 1001"),
        ({"steps": 0}, "Steps must lie between 1 and 50"),
        ({"steps": 10**9}, "Steps must lie between"),
        ({"steps": 2.5}, "Steps must be a whole number"),
        ({"height": 130}, "multiple of 8 between 32 and 256 pixels, not 130; 128 would do"),
        ({"width": 4096}, "multiple of 8"),
        ({"width": -8}, "multiple of 8"),
        ({"frames": 10}, "one more than a multiple of 4, not 10; 9 would do"),
        ({"frames": 100_001}, "Frames must lie between 1 and"),
        ({"height": 256, "width": 256, "frames": 65}, "too much for this page"),
        ({"seed": -1}, "The seed must be a whole number"),
        ({"seed": 2**40}, "The seed must be a whole number"),
        ({"seed": 0.5}, "The seed must be a whole number"),
        ({"guidance": float("inf")}, "Guidance must lie between"),
        ({"guidance": -1.0}, "Guidance must lie between"),
    ],
)
def test_what_cannot_be_served_is_a_sentence(limits, change, said):
    with pytest.raises(ValueError, match=re.escape(said)) as found:
        limits.check(dataclasses.replace(Request(prompt="a star"), **change))
    assert str(found.value).endswith(".")


def test_defaults_given_at_the_start_move_the_bounds_with_them():
    pipe, model = tiny.load(), served("tiny-wan")
    limits = limits_of(pipe, model, {"steps": 30, "height": 256, "width": 256, "frames": 65})
    assert (limits.steps, limits.side, limits.frames) == (60, 512, 129)
    assert limits.check(Request(prompt="a star")).frames == 65
    with pytest.raises(ValueError, match="Height must be a multiple of 8"):
        limits_of(pipe, model, {"height": 130})


def test_what_a_sentence_recommends_is_accepted(limits):
    for name, wrong in {"height": 131, "width": 9999, "frames": 12}.items():
        with pytest.raises(ValueError, match="would do") as found:
            limits.check(Request(prompt="a star", **{name: wrong}))
        better = int(re.search(r"(\d+) would do", str(found.value))[1])
        limits.check(Request(prompt="a star", **{name: better}))
