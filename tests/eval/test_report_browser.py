"""The report in a real Chromium, from a file and without a network."""

import dataclasses

import pytest
import torch
from browser import Watched, launch

from sparsediff.block_mask import pack_bits
from sparsediff.eval.captured import Capture, CapturedCall
from sparsediff.eval.report import write_report
from sparsediff.eval.results import load_results, save_arm
from sparsediff.token_grid import TokenGrid

HOSTILE = "</script><img src=x onerror=\"window.broken=1\"><script>window.broken=2</script> {{script}} & 'q'"
ARM, FLOOR = "auto-density=0.3", "random-density=0.3"
GRID = TokenGrid.video(3, 4, 6, text=8)  # 80 tokens
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser():
    with launch() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(make_results_folder, tmp_path_factory):
    """Four arms, two prompts (the second hostile), masks of one layer at two steps."""
    folder = make_results_folder(
        tmp_path_factory.mktemp("report"), prompts=("a large red circle moves left", HOSTILE)
    )
    capture = Capture(calls=[call(step, block=8) for step in (2, 5)])
    capture.save(folder / "captures" / f"{ARM}.safetensors")
    return write_report(folder)


def call(step, *, block, mass=True):
    """Head 0 reads its own block; head 1, in windows of 1 x 2 x 4, every second one from the first on; text all."""
    blocks = 80 // block
    keep = torch.zeros(1, 2, blocks, blocks, dtype=torch.bool)
    keep[0, 0] = torch.eye(blocks, dtype=torch.bool)
    keep[0, 1, :, ::2] = True
    keep[..., 72 // block :] = True
    return CapturedCall(
        layer="transformer.blocks.0.attn1", step=step, num_steps=8, sigma=0.5, branch="cond", grid=GRID,
        block_size=(block, block), dense_reason=None, heads=(0, 1), windows=((3, 4, 6), (1, 2, 4)),
        head_windows=torch.tensor([[0, 1]], dtype=torch.uint8), bitmap=pack_bits(keep),
        mass=torch.full((1, 2, blocks, blocks), 1 / blocks).half() if mass else None,
    )  # fmt: skip


@pytest.fixture
def opened(browser):
    """`opened(path, ...)` gives a page that has drawn itself; what it should not have done fails the test at its end."""
    contexts, seen = [], Watched()

    def start(path, *, viewport=DESKTOP, scheme="light"):
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme))
        page = contexts[-1].new_page()
        seen.watch(page)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield start
    for context in contexts:
        context.close()
    assert seen.errors == []
    assert seen.requests == []


def wait_for_pair(page, frame):
    page.wait_for_function(
        "frame => document.querySelector('.player').dataset.pairFrame === String(frame)", arg=frame
    )


def times(page):
    return page.evaluate("[...document.querySelectorAll('.player video')].map(v => v.currentTime)")


def test_it_opens_and_draws_every_part(opened, report):
    page = opened(report)
    assert page.inner_text("#headline").startswith("auto density=0.3 makes the denoiser 1.90 times")
    assert page.locator("#summary tbody tr").count() == 4
    assert page.locator("[data-plot] svg [role=button]").count() == 8
    assert page.locator("[data-curve] svg path").count() > 8
    assert page.locator("#time-bars .bar").count() == 4
    assert page.locator("#time-bars .bar .part-mask").count() == 3, "a dense arm chooses no blocks"
    assert page.locator("[data-heat=steps] rect[data-row]").count() == 6 * 8
    assert page.locator("[data-heat=heads] rect[data-row]").count() == 6 * 4
    for part in ("results", "tradeoff", "time", "clips", "curves", "density", "masks", "checks", "caveats", "environment", "reproduce"):  # fmt: skip
        assert page.locator(f"#{part}").is_visible(), part


def test_clips_play_and_stay_together(opened, report):
    page = opened(report)
    wait_for_pair(page, 0)
    for frame in (5, 8, 2):
        page.evaluate(
            "f => { const s = document.querySelector('.scrub input'); s.value = f; s.dispatchEvent(new Event('input')); }",
            frame,
        )
        wait_for_pair(page, frame)
        a, b = times(page)
        assert a == pytest.approx(b, abs=1e-6)
        assert int(a * 16) == frame
    page.click("text=Play")
    page.wait_for_function("() => document.querySelectorAll('.player video')[0].currentTime > 0.3")
    page.wait_for_function("() => document.querySelectorAll('.player video')[0].currentTime < 0.2")
    page.click("text=Pause")
    page.wait_for_function(
        "() => [...document.querySelectorAll('video')].every(v => v.paused && !v.seeking)"
    )
    a, b = times(page)
    assert a == pytest.approx(b, abs=1e-6)
    page.select_option("label:has-text('Speed') select", "2")
    rates = page.evaluate("[...document.querySelectorAll('video')].map(v => v.playbackRate)")
    assert rates == [2, 2]


def test_the_difference_is_that_of_the_two_clips(opened, report):
    """The floor is farther from dense than the method, dense from itself not at all."""
    page = opened(report)
    apart = {}
    for arm in (ARM, FLOOR, "dense"):
        page.select_option("#arm", arm)
        wait_for_pair(page, 0)
        apart[arm] = float(page.get_attribute(".player", "data-apart"))
    assert apart["dense"] == 0
    assert 0 < apart[ARM] < apart[FLOOR] / 2
    dark = page.evaluate(
        "(() => { const c = document.querySelector('.pane.d canvas');"
        " return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].reduce((a, b) => Math.max(a, b % 255)); })()"
    )
    assert dark == 4, "no difference is drawn in the darkest colour"


def test_the_wipe_moves_with_its_slider_and_with_the_pointer(opened, report):
    page = opened(report)
    page.click("text=Wipe")
    edge = "getComputedStyle(document.querySelector('.pane.b .screen')).clipPath"
    assert page.evaluate(edge) == "inset(0px 0px 0px 50%)"
    page.locator(".wipe input").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(edge) == "inset(0px 0px 0px 51%)"
    box = page.locator(".pane.a .screen").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 20)
    page.mouse.down()
    page.mouse.up()
    left = float(page.evaluate(edge).rstrip("%)").rsplit(" ", 1)[1])
    assert left == pytest.approx(25, abs=1)


def test_pickers_change_the_figures(opened, report):
    page = opened(report)
    before = page.inner_text("#clip-figures")
    assert "PSNR 29.0 dB" in before
    page.select_option("#prompt", "1")
    assert "PSNR 30.0 dB" in page.inner_text("#clip-figures")
    page.select_option("#arm", FLOOR)
    assert "PSNR 15.0 dB" in page.inner_text("#clip-figures")
    assert page.inner_text("#density-of") == "random density=0.3"
    assert page.locator("tr.chosen").get_attribute("data-arm") == FLOOR
    page.locator("[data-plot=density] [role=button]", has=page.locator("circle")).nth(1).press(
        "Enter"
    )
    assert page.input_value("#arm") == ARM
    lines = page.locator("[data-curve=frames] svg > path[fill=none]")
    before = [line.get_attribute("d") for line in lines.all()]
    page.select_option("#frames-kind", "flicker")
    assert [line.get_attribute("d") for line in lines.all()] != before


def test_numbers_under_the_pointer_and_the_keys(opened, report):
    page = opened(report)
    cell = page.locator("[data-heat=steps] rect[data-row='1'][data-column='4']")
    cell.hover()
    assert page.inner_text("#tip").splitlines() == [
        f"density {0.3 * 0.88:.3f}",
        "transformer.blocks.1.attn1",
        "step 4",
    ]
    page.locator("[data-curve=frames] svg").focus()
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#tip").splitlines()[0] == "frame 7"
    assert "auto density=0.3: 27.6 dB" in page.inner_text("#tip")
    page.keyboard.press("Enter")
    wait_for_pair(page, 7)


def test_a_click_lights_up_what_the_patch_attends(opened, report):
    page = opened(report)
    viewer = page.locator("#mask-viewer")

    def click(frame, row, column):
        canvas = viewer.locator(f"canvas[data-frame='{frame}']")
        box = canvas.bounding_box()
        canvas.click(
            position={"x": (column + 0.5) * box["width"] / 6, "y": (row + 0.5) * box["height"] / 4}
        )

    def facts():
        names, values = (viewer.locator(f".facts {tag}").all_inner_texts() for tag in ("dt", "dd"))
        return dict(zip(names, values, strict=True))

    def lit():
        return viewer.locator("> div", has=page.locator(".facts")).get_attribute("data-lit")

    click(1, 2, 3)
    assert facts()["Patch"] == "frame 1, row 2, column 3"
    assert facts()["Reads"] == "2 of 10 blocks"  # its own and the text's
    assert lit() == "8"
    assert facts()["Of its attention"] == "20 %"
    assert facts()["Other tokens"] == "8 text"
    click(0, 0, 0)
    # Head 1: every second block of windows of 2 x 4 tokens; what lights up is what Python says is read.
    viewer.locator("select").nth(2).select_option("1")
    assert facts()["Reads"] == "6 of 10 blocks"
    assert lit() == str(5 * 8)
    assert facts()["Order"] == "windows of 1 x 2 x 4"
    read = call(2, block=8).attended_patch((0, 0, 0), 1)
    bright = page.evaluate(
        "() => [...document.querySelectorAll('#mask-viewer canvas[data-frame]')].map(c => {"
        " const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " return Array.from({length: 24}, (_, i) => {"
        "  const x = Math.floor((i % 6 + 0.5) * c.width / 6), y = Math.floor((Math.floor(i / 6) + 0.5) * c.height / 4);"
        "  return [0, 1, 2].reduce((sum, k) => sum + pixels[4 * (y * c.width + x) + k], 0); }); })"
    )
    # A dark patch shows a fifth of its picture, whose darkest colour has 165 levels in all.
    assert (torch.tensor(bright).view(3, 4, 6) > 110).equal(read)
    viewer.locator("canvas[data-frame='0']").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("PageDown")
    assert facts()["Patch"] == "frame 1, row 1, column 0"
    page.click("text=Attention >> nth=-1")
    viewer.locator(".map canvas").click(position={"x": 5, "y": 5})
    assert facts()["Patch"] == "frame 0, row 0, column 0"


def test_colours_follow_the_system_and_the_button(opened, report):
    background = "getComputedStyle(document.body).backgroundColor"
    light = opened(report, scheme="light").evaluate(background)
    page = opened(report, scheme="dark")
    dark = page.evaluate(background)
    assert dark != light
    page.click("#theme")
    assert page.evaluate(background) == light
    page.click("#theme")
    assert page.evaluate(background) == dark


def test_paper_is_light_and_whole(opened, report):
    page = opened(report, scheme="dark", viewport={"width": 720, "height": 1000})
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#arm").is_visible()
    assert page.locator(".pickers .picked").nth(1).inner_text() == "auto density=0.3"
    table = page.locator("#summary").bounding_box()
    assert table["x"] + table["width"] <= 720


@pytest.mark.parametrize("viewport", [PHONE, {"width": 320, "height": 640}], ids=["390", "320"])
def test_a_phone_scrolls_down_only(opened, report, viewport):
    page = opened(report, viewport=viewport)
    wait_for_pair(page, 0)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= viewport["width"]
    # Nothing sticks out and is cut off either, but for tables that scroll by themselves.
    outside = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg, .hidden') &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []


def test_hostile_text_is_text(opened, report):
    page = opened(report)
    page.select_option("#prompt", "1")
    assert page.evaluate("window.broken") is None
    assert page.locator("img").count() == 0
    assert page.locator("#prompt option").nth(1).inner_text() == HOSTILE


def test_folders_with_less_in_them(opened, make_results_folder, tmp_path):
    """Dense alone; a method alone; no clips; identical and missing figures."""
    dense = make_results_folder(tmp_path / "dense", arms=("dense",))
    opened(write_report(dense))
    folder = make_results_folder(tmp_path / "bare", arms=("dense", ARM), videos=False)
    arm = load_results(folder).arm(ARM)
    clips = tuple(
        dataclasses.replace(
            clip,
            metrics={"psnr": float("inf")},
            frame_curves={"psnr": (float("inf"), float("nan"), 30.0)},
            layers=(),
            steps=(),
        )
        for clip in arm.clips
    )
    save_arm(folder, dataclasses.replace(arm, clips=clips[:1], checks=()))
    page = opened(write_report(folder))
    assert "identical" in page.inner_text("#summary")
    assert page.inner_text(".pane.a .screen p") == "No clip was kept."
    page.select_option("#prompt", "1")
    assert page.inner_text("#clip-figures") == "This arm has no clip of this prompt."
    assert page.locator("#masks").count() == 0


def test_linked_clips_play_and_say_what_is_missing(opened, make_results_folder, tmp_path):
    folder = make_results_folder(tmp_path, arms=("dense", ARM))
    page = opened(write_report(folder, max_bytes=0))
    page.wait_for_function(
        "() => [...document.querySelectorAll('video')].every(v => v.readyState >= 2)"
    )
    page.wait_for_selector(".pane.d p:not([hidden])")
    assert "needs clips inside this page" in page.inner_text(".pane.d p")
