"""The page in a real Chromium, served on loopback, with a real pipeline behind it."""

import re
import sys
import time
import urllib.request

import pytest
from browser import Watched, launch

gradio = pytest.importorskip("gradio", reason="the extra `demo` is not installed")

from whole_pipelines import whole_flux  # noqa: E402

from sparsediff.demo.jobs import Job  # noqa: E402
from sparsediff.demo.page import Page  # noqa: E402
from sparsediff.demo.serve import serve  # noqa: E402
from sparsediff.demo.studio import Studio  # noqa: E402
from sparsediff.eval.compare import Request  # noqa: E402

LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0")
SIZE = "height=128&width=128&frames=29"  # 512 tokens, enough for every method
SHORT = "height=128&width=128&frames=9&set.block=32"
DONE, SECONDS = "Done", 1000
LONG = 120 * SECONDS  # a busy machine must not fail these tests


@pytest.fixture(scope="module")
def outside():
    """Addresses that this process asked for, other than this machine's own."""
    found, listening = [], [True]

    def hook(event, args):
        if listening[0] and event == "socket.connect" and isinstance(args[1], tuple):
            found.extend([args[1]] if args[1][0] not in LOOPBACK else [])
        if listening[0] and event == "socket.getaddrinfo" and args[0] not in (*LOOPBACK, None):
            found.append(args[0])

    sys.addaudithook(hook)  # cannot be taken away again, only deafened
    yield found
    listening[0] = False


@pytest.fixture(scope="module")
def url(studio, outside):
    page, url = serve(studio, port=None, block=False)
    yield url
    page.blocks.close()


@pytest.fixture(scope="module")
def browser():
    with launch() as browser:
        yield browser


@pytest.fixture
def visit(browser, url):
    """`visit(query)` opens the page as a new visitor; afterwards nobody may have complained or called home."""
    watched, contexts = Watched(), []

    def visit(query=f"prompt=a+star&steps=3&{SIZE}", *, at=url, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LONG)
        watched.watch(page, allow=(at, "data:", "blob:"))
        page.goto(f"{at}?{query}")
        page.wait_for_selector("#run")
        page.wait_for_selector("#result iframe")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert watched.errors == []
    assert watched.requests == []


def frame(page, where="#result"):
    """The report inside the page, once it is ready."""
    found = page.wait_for_selector(f"{where} iframe").content_frame()
    found.wait_for_selector("html[data-ready=true]", state="attached")
    return found


def generate(page, label=DONE):
    page.click("#run")
    page.wait_for_selector(f"#meter .sd-head b:text-is('{label}')")
    return frame(page)


def watch_meter(page, where="#meter"):
    """From now on, keep what the meter says in `window.seen`."""
    page.evaluate(
        """(where) => {
      window.seen = [];
      const look = () => {
        const meter = document.querySelector(`${where} .sd-meter`);
        if (!meter || !meter.dataset.phase) return;
        const dials = Object.fromEntries([...meter.querySelectorAll(".sd-dial")].map((d) => [d.dataset.dial, d.querySelector("b").textContent]));
        const said = { phase: meter.dataset.phase, step: Number(meter.dataset.step), ...dials, head: meter.querySelector(".sd-head").textContent,
          bar: Number(meter.querySelector("[role=progressbar]").getAttribute("aria-valuenow")) };
        if (JSON.stringify(window.seen.at(-1)) !== JSON.stringify(said)) window.seen.push(said);
      };
      new MutationObserver(look).observe(document.querySelector(where), { subtree: true, childList: true, attributes: true });
    }""",
        where,
    )


def test_it_opens_with_something_to_look_at_and_asks_nobody(visit, outside):
    page = visit("")
    assert "Stored example" in page.inner_text("#result")
    example = frame(page)
    assert example.is_visible("#clips")
    assert "PSNR" in example.inner_text(".tiles")
    assert "Denoiser" not in example.inner_text(".tiles")
    assert example.locator("#steps-kind option").all_inner_texts() == [
        "latents, distance to dense",
        "density",
        "noise level",
    ]
    assert not example.is_visible("#environment")
    assert "random-wan on cpu" in page.inner_text("#header")
    assert page.input_value("#prompt textarea") == "a small red circle moves left"
    assert outside == []


def wait_inside(frame, condition, seconds=30):
    """`wait_for_function` looks a second time by `eval`, which the policy of the report's frame forbids."""
    end = time.monotonic() + seconds
    while not frame.evaluate(condition):
        assert time.monotonic() < end, f"never came true: {condition}"
        frame.page.wait_for_timeout(50)


def test_one_button_makes_both_clips_and_the_meters_tell(visit):
    page = visit(f"prompt=a+star&seed=1&steps=4&{SIZE}")
    watch_meter(page)
    inside = generate(page)
    seen = page.evaluate("window.seen")
    for phase in ("dense", "sparse"):
        steps = [s["step"] for s in seen if s["phase"] == phase]
        assert steps == sorted(steps)
        assert steps[-1] == 4
        assert len(set(steps)) >= 3
    bars = [s["bar"] for s in seen]
    assert bars == sorted(bars)
    last = [s for s in seen if s["phase"] == "sparse"][-1]
    assert 0 < float(last["density"]) < 1
    assert float(last["speed-up"][:-1]) > 1
    assert re.fullmatch(r"[\d.]+ m?s", last["a step"])
    assert 0 < float(last["error"][:-1]) < 100

    # Both play, and stay on the same frame.
    wait_inside(inside, "player.playable().length === 2")
    inside.evaluate("player.play()")
    wait_inside(inside, "player.playing && player.videos.every((v) => v.currentTime > 0.3)")
    apart = inside.evaluate("Math.abs(player.videos[0].currentTime - player.videos[1].currentTime)")
    assert apart < 0.25
    inside.evaluate("player.pause()")
    inside.evaluate("player.seek(7)")
    wait_inside(inside, "player.node.dataset.pairFrame === '7'")
    times = inside.evaluate("player.videos.map((v) => Math.floor(v.currentTime * DATA.fps))")
    assert times == [7, 7]
    assert float(inside.evaluate("player.node.dataset.apart")) > 0
    assert inside.evaluate("DATA.clips.dense[0].shape") == [29, 128, 128]


@pytest.mark.slow
def test_only_the_sparse_run_is_made_again_with_another_method(visit):
    query = f"prompt=a+star&seed=1&steps=4&{SIZE}"
    generate(visit(query))
    page = visit(query)
    page.click("#method input")
    page.get_by_role("option", name="draft_attention").click()
    page.wait_for_selector("#draft_attention-sparsity", state="visible")
    assert not page.is_visible("#auto-density")
    page.click("#preset input")
    page.get_by_role("option", name="close to dense").click()
    page.wait_for_function(
        "document.querySelector('#draft_attention-sparsity input[type=number]').value === '0.5'"
    )
    watch_meter(page)
    inside = generate(page)
    assert not [s for s in page.evaluate("window.seen") if s["phase"] == "dense"]
    assert "draft_attention sparsity=0.5" in inside.inner_text("#headline")


def test_cancel_stops_and_the_next_run_is_right(visit, studio):
    page = visit(f"prompt=a+star&seed=2&steps=50&{SHORT}")
    page.click("#clip-settings button")
    assert page.input_value("#steps input") == "50"
    page.click("#run")
    page.wait_for_selector("#meter [data-phase=dense]:not([data-step='0'])")
    page.click("#cancel")
    page.wait_for_selector("#meter .sd-head b:text-is('Cancelled')")
    assert page.is_enabled("#run")
    assert page.is_disabled("#cancel")
    assert not studio.pipe.transformer._forward_pre_hooks
    page.fill("#steps input", "3")
    inside = generate(page)
    assert inside.evaluate("DATA.clips.dense[0].steps.seconds.length") == 3


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (f"prompt=&steps=3&{SIZE}", "Write a prompt first"),
        ("prompt=a&height=100", "Height must be a multiple of 16"),
        (f"prompt=a&method=custom&set.windows=(9,9)&{SIZE}", "window"),
    ],
)
def test_wrong_inputs_are_answered_with_a_sentence(visit, query, said):
    page = visit(query)
    page.click("#run")
    error = page.wait_for_selector("#meter .sd-notice.error")
    assert said in error.inner_text()
    assert "Traceback" not in page.inner_text("body")
    assert page.is_enabled("#run")


def test_a_wrong_address_is_answered_with_a_sentence(visit):
    page = visit("method=<script>alert(1)</script>")
    error = page.wait_for_selector("#meter .sd-notice.error")
    assert "the address asks for the method '<script>" in error.inner_text()


@pytest.mark.slow
def test_the_address_holds_the_settings_and_restores_them(visit):
    page = visit(
        f"prompt=a+green+star&seed=7&steps=3&{SIZE}&guidance=2.5&method=lite_attention&set.threshold=-3.0"
        "&set.tile=(64, 64)&schedule.dense_steps=1"
    )
    page.wait_for_selector("#lite_attention-threshold", state="visible")
    generate(page)
    page.wait_for_function("location.search.includes('seed=7')")
    address = page.url
    assert "set.tile=%2864%2C+64%29" in address
    other = visit(address.partition("?")[2])
    other.wait_for_selector("#lite_attention-threshold", state="visible")
    for name, value in {"seed": "7", "steps": "3", "guidance": "2.5", "frames": "29"}.items():
        if not other.is_visible(f"#{name} input"):
            other.click("#clip-settings button")
        assert other.input_value(f"#{name} input") == value
    assert other.input_value("#prompt textarea") == "a green star"
    assert other.input_value("#method input") == "lite_attention"
    assert other.input_value("#lite_attention-threshold input[type=number]") == "-3"


def test_the_mask_viewer_answers_clicks(visit):
    page = visit(f"prompt=a+star&seed=1&steps=4&{SIZE}")
    generate(page)
    page.get_by_role("tab", name="Look inside").click()
    inside = frame(page, "#inside")
    inside.wait_for_selector("#masks canvas")
    assert inside.is_visible("#density")
    assert not inside.is_visible("#clips")
    before = inside.inner_text("#masks .facts")
    pictures = (
        "[...document.querySelectorAll('#masks .frames canvas')].map((c) => c.toDataURL()).join()"
    )
    drawn = inside.evaluate(pictures)
    canvas = inside.locator("#masks .frames canvas").first
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 0.9, "y": box["height"] * 0.1})
    after = inside.inner_text("#masks .facts")
    assert "frame 0, row 0, column" in after
    assert after != before
    assert inside.evaluate(pictures) != drawn


def test_two_visitors_are_queued_and_not_mixed(visit, studio):
    one = visit(f"prompt=first&seed=31&steps=4&{SHORT}")
    two = visit(f"prompt=second&seed=32&steps=4&{SHORT}&set.density=0.5")
    with studio.turns.turn(Job(lambda job: None), lambda ahead: None):  # a third one, before both
        for page, said in ((one, "one other run first"), (two, "2 other runs first")):
            page.click("#run")
            page.wait_for_selector(f"#meter [data-phase=waiting]:has-text('{said}')")
    for page in (one, two):
        page.wait_for_selector(f"#meter .sd-head b:text-is('{DONE}')")
    assert frame(one).evaluate("DATA.prompts[0]") == {"index": 0, "prompt": "first", "seed": 31}
    assert frame(two).evaluate("DATA.prompts[0]") == {"index": 0, "prompt": "second", "seed": 32}
    assert frame(two).evaluate("DATA.arms[1].label") == "auto density=0.5, block=32"


@pytest.mark.slow
def test_leaving_ends_the_run(visit, studio):
    page = visit(f"prompt=leaving&steps=50&{SIZE}")
    page.click("#run")
    page.wait_for_selector("#meter [data-phase=dense]:not([data-step='0'])")
    page.context.close()
    next_one = visit(f"prompt=a+star&seed=1&steps=4&{SIZE}")
    generate(next_one)
    asked = Request(prompt="leaving", steps=50, height=128, width=128, frames=29, guidance=5.0)
    assert studio.limits.check(asked) not in studio.dense


def test_share_hands_out_report_clips_command_and_python(visit):
    page = visit(f"prompt=a+star&seed=1&steps=4&{SIZE}")
    generate(page)
    page.get_by_role("tab", name="Share").click()
    kinds = {"report": b"<!DOCTYPE html>", "dense": b"ftyp", "sparse": b"ftyp"}
    for name, mark in kinds.items():
        with page.expect_download() as download:
            page.click(f"#download-{name}")
        assert mark in download.value.path().read_bytes()[:32]
    assert "sparsediff compare --model random-wan --prompt 'a star' --seed 1" in page.inner_text(
        "#command"
    )
    assert "sparsediff.enable(pipe, 'auto')" in page.inner_text("#python")
    assert page.inner_text("#link .cm-content") == page.url


@pytest.mark.slow
def test_all_methods_fill_a_plot_and_cancel_keeps_what_is_there(visit):
    page = visit(f"prompt=a+star&seed=1&steps=4&{SIZE}")
    page.get_by_role("tab", name="Methods").click()
    page.click("#run-all")
    inside = frame(page, "#all-result")
    inside.wait_for_selector("#tradeoff svg")
    page.click("#cancel-all")
    page.wait_for_selector("#all-meter .sd-head b:text-is('Cancelled')")
    assert 2 <= frame(page, "#all-result").evaluate("DATA.arms.length") <= 7
    page.get_by_role("tab", name="Compare").click()
    generate(page)


def test_a_phone_shows_everything_without_scrolling_sideways(visit):
    for scheme in ("light", "dark"):
        page = visit(
            "", viewport={"width": 390, "height": 844}, color_scheme=scheme, is_mobile=True
        )
        inside = frame(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert inside.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert inside.evaluate("document.documentElement.dataset.theme") == scheme
        for name in ("Compare", "Look inside", "Methods", "Share"):
            assert page.get_by_role("tab", name=name).is_visible()


def test_presets_fill_in_parameters_and_are_forgotten_when_these_change(visit):
    page = visit("")
    density = "#auto-density input[type=number]"
    assert page.input_value("#preset input") == "as it comes"
    page.click("#preset input")
    page.get_by_role("option", name="fast").click()
    page.wait_for_function("document.querySelector('#auto-density input').value === '0.15'")
    page.fill(density, "0.4")
    page.wait_for_function("document.querySelector('#preset input').value === ''")
    page.locator("#examples button").nth(1).click()
    page.wait_for_function(
        "document.querySelector('#prompt textarea').value.includes('camera pans')"
    )


def test_a_model_of_pictures_shows_pictures(visit, tmp_path):
    whole_flux().save_pretrained(tmp_path)
    size = {"steps": 3, "height": 64, "width": 64, "text_tokens": 20}
    studio = Studio(str(tmp_path), device="cpu", defaults=size)
    pictures, address = serve(studio, port=None, block=False)
    studio.wait_until_loaded()
    try:
        page = visit("prompt=a+star&set.density=0.25&set.block=32", at=address)
        page.wait_for_selector(f".sd-state.ready:text-is('{tmp_path.name} on cpu')")
        assert str(tmp_path) not in page.inner_text("body")
        page.click("#clip-settings button")
        page.wait_for_selector("#width input", state="visible")  # the group opens when it likes
        assert not page.is_visible("#frames")
        assert not page.is_visible("#negative_prompt")
        inside = generate(page)
        wait_inside(inside, "player.node.dataset.apart !== undefined")
        assert float(inside.evaluate("player.node.dataset.apart")) > 0
        for name in (".play", ".scrub", ".speed"):
            assert not inside.is_visible(f".player {name}")
        text = inside.inner_text("body")
        assert "The two pictures are" in text
        assert not re.search(r"\bclips?\b|\bframes?\b", text, re.IGNORECASE)
        page.get_by_role("tab", name="Look inside").click()
        masks = frame(page, "#inside")
        masks.click("#masks .frames canvas", position={"x": 20, "y": 20})
        assert re.search(r"Patch\s+row \d+, column \d+", masks.inner_text("#masks .facts"))
        page.get_by_role("tab", name="Share").click()
        with page.expect_download() as download:
            page.click("#download-sparse")
        assert download.value.path().read_bytes()[1:4] == b"PNG"
    finally:
        pictures.blocks.close(verbose=False)
        studio.close()


def test_neither_files_nor_models_can_be_had_from_the_page(url):
    for path in ("/etc/passwd", __file__):
        with pytest.raises(urllib.error.HTTPError) as found:
            urllib.request.urlopen(f"{url}gradio_api/file={path}")
        assert found.value.code == 403
    config = urllib.request.urlopen(f"{url}config").read().decode()
    assert "model_id" not in config


def test_what_the_model_makes_by_default_is_filled_in_only_where_nothing_stands(studio):
    page = Page(studio)
    numbers = page.form.numbers
    shown = dict.fromkeys(numbers.values()) | {numbers["steps"]: 3}
    updates = page.tick(shown)
    assert numbers["steps"] not in updates
    assert updates[numbers["frames"]] == studio.limits.defaults.frames
