"""The page: where everything stands, and what happens when something is clicked."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import gradio as gr

from sparsediff.demo.controls import Form, build_form, build_more, preset_named
from sparsediff.demo.jobs import Cancelled, Job
from sparsediff.demo.meters import Phase, meter, notice
from sparsediff.demo.sessions import Session, Sessions
from sparsediff.demo.settings import Settings, from_query
from sparsediff.demo.studio import Studio
from sparsediff.demo.view import example, framed
from sparsediff.demo.work import Result, all_methods, comparison, shared
from sparsediff.eval.compare import Request

VISITORS = 16  # handlers that may wait for the pipeline at a time
WAITING = 64  # requests that may queue for a handler
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError, RuntimeError)
KEPT_NOTE = (
    "The dense {} is kept: with another method or parameter only the sparse run is made again."
)
STUDY_NOTE = "Click a point of a plot to look at that method's {}."
# A report beyond this is sent to the second tab only when somebody opens it.
EAGER_CHARACTERS = 8 << 20
NOTHING_YET = '<p class="sd-hint">Nothing yet: generate a comparison first.</p>'
# Settings stay in the address, so that it can be sent to somebody; Gradio's own parameters are left alone.
PUT_IN_ADDRESS = """(query) => {
  if (!query) return "";
  const url = new URL(window.location.href), own = [...url.searchParams].filter(([name]) => name.startsWith("__"));
  url.search = new URLSearchParams([...new URLSearchParams(query), ...own]).toString();
  window.history.replaceState(null, "", url);
  return url.href;
}"""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where on the page a job shows itself, and what is said when it is done."""

    meter: gr.HTML
    button: gr.Button
    cancel: gr.Button
    done: str


class Page:
    """The page of a studio; `blocks` is what Gradio serves."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.noun = studio.served.noun
        self.sessions = Sessions()
        with gr.Blocks(title="sparsediff", analytics_enabled=False) as self.blocks:
            self._build()
            self._connect()
        self.blocks.queue(max_size=WAITING, default_concurrency_limit=VISITORS)

    # -- where everything stands -----------------------------------------------------------------------------------------

    def _build(self) -> None:
        self.header = gr.HTML(self._header(), elem_id="header")
        self.address = gr.Textbox(visible="hidden", elem_id="address")
        self.timer = gr.Timer(1.0)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Compare", id="compare"):
                self._build_compare()
            with gr.Tab("Look inside", id="inside") as self.inside_tab:
                self.inside = gr.HTML(NOTHING_YET, elem_id="inside")
            with gr.Tab("Methods", id="methods"):
                self._build_methods()
            with gr.Tab("Share", id="share"):
                self._build_share()

    def _build_compare(self) -> None:
        with gr.Row(elem_classes="sd-columns"):
            with gr.Column(scale=4, min_width=320, elem_classes="sd-side"):
                self.form: Form = build_form(self.studio)
                with gr.Row(elem_classes="sd-tight sd-actions"):
                    self.run = gr.Button("Generate both", variant="primary", elem_id="run", scale=4)  # fmt: skip
                    self.cancel = gr.Button("Cancel", elem_id="cancel", scale=1, min_width=90, interactive=False)  # fmt: skip
                build_more(self.form)
            with gr.Column(scale=8, min_width=320, elem_classes="sd-results"):
                self.meter = gr.HTML(elem_id="meter")
                self.result = gr.HTML(elem_id="result")

    def _build_methods(self) -> None:
        gr.HTML(
            f'<p class="sd-hint">Runs {len(self.studio.methods)} methods as they come on the prompt and clip settings of the '
            "first tab, against one dense clip. It goes on while you look at the other tabs.</p>"
        )
        with gr.Row(elem_classes="sd-tight sd-actions"):
            self.run_all = gr.Button("Run all methods", variant="primary", elem_id="run-all", scale=0, min_width=220)  # fmt: skip
            self.cancel_all = gr.Button("Cancel", elem_id="cancel-all", scale=0, min_width=90, interactive=False)  # fmt: skip
        self.all_meter = gr.HTML(elem_id="all-meter")
        self.all_result = gr.HTML(elem_id="all-result")

    def _build_share(self) -> None:
        self.share_note = gr.HTML(NOTHING_YET, elem_id="share-note")
        with gr.Row(elem_classes="sd-tight"):
            self.downloads = {
                "report": gr.DownloadButton("Report (HTML)", interactive=False, elem_id="download-report"),
                "dense": gr.DownloadButton(f"Dense {self.noun}", interactive=False, elem_id="download-dense"),
                "sparse": gr.DownloadButton(f"Sparse {self.noun}", interactive=False, elem_id="download-sparse"),
            }  # fmt: skip
        self.link = gr.Code("", language=None, label="The address with these settings", elem_id="link", interactive=False, lines=1, elem_classes="sd-code", wrap_lines=True)  # fmt: skip
        self.python = gr.Code("", language="python", label="In Python", elem_id="python", interactive=False, lines=1, elem_classes="sd-code", wrap_lines=True)  # fmt: skip
        self.shell = gr.Code("", language="shell", label="As a command", elem_id="command", interactive=False, lines=1, elem_classes="sd-code", wrap_lines=True)  # fmt: skip

    def _header(self) -> str:
        studio = self.studio
        # Where a folder lies is nobody's business.
        name = Path(studio.model).name if Path(studio.model).is_dir() else studio.model
        if studio.failure is not None:
            state, text = "failed", f"not loaded: {studio.failure}"
        elif studio.loaded:
            state, text = "ready", f"{name} on {studio.device}"
        else:
            state, text = "loading", f"loading {name} …"
        return (
            f'<div class="sd-top"><div><h1>sparsediff</h1><p>the same {"video" if studio.served.video else "picture"} with less attention, beside the dense one</p></div>'
            f'<span class="sd-state {state}" role="status">{html.escape(text)}</span></div>'
        )

    # -- what happens ------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        light = {**quiet, "queue": False}
        form = self.form
        self.blocks.load(self.restore, None, [*form.outputs, self.meter, self.result], **quiet)
        self.blocks.unload(self.leave)
        numbers = list(form.numbers.values())
        self.timer.tick(self.tick, set(numbers), [self.header, self.timer, *numbers], **light)
        parameters = [c for group in form.parameters.values() for c in group.values()]
        form.method.input(self.pick_method, {form.method, *parameters}, [form.about, form.preset, *form.columns], **light)  # fmt: skip
        for component in parameters:  # by hand: no longer any preset's
            component.input(None, None, form.preset, js="() => null", **quiet)
        form.preset.input(self.pick_preset, [form.method, form.preset], form.outputs, **light)
        self.run.click(
            self.compare,
            form.inputs,
            [self.meter, self.result, self.run, self.cancel, self.address, self.inside, self.share_note,
             self.link, self.python, self.shell, *self.downloads.values()],
            **quiet,
        )  # fmt: skip
        self.run_all.click(
            self.study,
            form.inputs,
            [self.all_meter, self.all_result, self.run_all, self.cancel_all],
            **quiet,
        )
        self.cancel.click(self.stop, None, None, **light)
        self.cancel_all.click(self.stop_study, None, None, **light)
        self.inside_tab.select(self.look_inside, None, self.inside, **quiet)
        self.address.change(
            None, self.address, self.link, js=PUT_IN_ADDRESS, api_visibility="private"
        )

    def restore(self, request: gr.Request) -> dict[object, object]:
        """A page opens: what its address asks for, and the stored example to look at meanwhile."""
        updates: dict[object, object] = {self.result: example("compare")}
        query = {k: v for k, v in dict(request.query_params).items() if not k.startswith("__")}
        if not query:
            return updates
        defaults = Request(**{"prompt": "", **self.studio.defaults})
        try:
            settings = from_query(query, defaults, self.studio.methods)
        except USER_ERRORS as error:
            return updates | {self.meter: notice(_sentence(error), kind="error", title="Address")}
        return updates | self.form.write(settings)

    def leave(self, request: gr.Request) -> None:
        """A page closes."""
        for kind in ("compare", "study"):
            self.sessions.leave(_visitor(request, kind))

    def tick(self, data: Mapping[object, object]) -> dict[object, object]:
        """Until the model is there: say so, and then fill in what it makes by default where nothing stands."""
        updates: dict[object, object] = {self.header: self._header()}
        if self.studio.loaded:
            updates[self.timer] = gr.Timer(active=False)
        limits = self.studio.limits
        if limits is not None:
            for name, component in self.form.numbers.items():
                own = name in ("seed", "guidance") or name in self.studio.fixed
                if not own and data[component] is None:
                    updates[component] = getattr(limits.defaults, name)
        return updates

    def pick_method(self, data: Mapping[object, object]) -> dict[object, object]:
        """Another method: show its parameters as they stand, and offer its presets."""
        try:
            parameters = self.form.read_parameters(data)
        except ValueError:  # a half-written value is no preset's
            parameters = None
        return self.form.show_method(data[self.form.method], parameters)

    def pick_preset(self, method: str, label: str | None) -> dict[object, object]:
        """Another preset: fill in the method's parameters."""
        preset = preset_named(method, label, self.studio) if label else None
        if preset is None:
            return {}
        updates = self.form.write_method(method, preset.parameters)
        del updates[self.form.preset]  # it has just been picked
        return updates

    def compare(self, data: dict[object, object], request: gr.Request) -> Iterator[dict]:
        """The button of the first tab."""
        session = self.sessions.of(_visitor(request, "compare"))
        at = Place(
            meter=self.meter, button=self.run, cancel=self.cancel, done=KEPT_NOTE.format(self.noun)
        )

        def show(result: Result) -> dict[object, object]:
            session.keep(result)
            return self._show_comparison(result)

        yield from self._running(session, data, comparison, at, show)

    def study(self, data: dict[object, object], request: gr.Request) -> Iterator[dict]:
        """The button of the third tab."""
        session = self.sessions.of(_visitor(request, "study"))
        at = Place(
            meter=self.all_meter,
            button=self.run_all,
            cancel=self.cancel_all,
            done=STUDY_NOTE.format(self.noun),
        )

        def show(result: Result) -> dict[object, object]:
            session.keep(result)
            return {self.all_result: framed(_text(result), "methods")}

        yield from self._running(session, data, all_methods, at, show)

    def _show_comparison(self, result: Result) -> dict[object, object]:
        travels = shared(self.studio, result.settings)
        query, report = urlencode(travels.query), _text(result)
        return {
            self.result: framed(report, "compare"),
            self.inside: framed(report, "inside") if len(report) < EAGER_CHARACTERS else "",
            self.address: query,
            self.share_note: '<p class="sd-hint">Of the last comparison:</p>',
            self.python: travels.python,
            self.shell: travels.command,
            self.downloads["report"]: _file(result.report),
            self.downloads["dense"]: _file(result.dense),
            self.downloads["sparse"]: _file(result.sparse),
        }

    def _running(
        self,
        session: Session,
        data: dict[object, object],
        work: Callable[[Studio, Settings], Callable[[Job], None]],
        at: Place,
        show: Callable[[Result], dict[object, object]],
    ) -> Iterator[dict]:
        """Run a job, and say how far it is; whatever happens, the buttons end as they began."""
        free = {at.button: gr.update(interactive=True), at.cancel: gr.update(interactive=False)}
        try:
            settings = self.form.read(data)
            job = session.start(Job(work(self.studio, settings)))
            yield {
                at.meter: meter(Phase(name="Starting", id="starting")),
                at.button: gr.update(interactive=False),
                at.cancel: gr.update(interactive=True),
            }
            for event in job.events():
                yield {at.meter: meter(event)} if isinstance(event, Phase) else show(event)
        except Cancelled:
            said = notice("The next run starts afresh.", title="Cancelled")
        except USER_ERRORS as error:
            # What diffusers or the device refuses in mid-run may need more than its sentence.
            log.warning("refused: %s", error, exc_info=isinstance(error, RuntimeError))
            said = notice(_sentence(error), kind="error", title="Not possible")
        except Exception as error:
            log.exception("a run failed")
            where = (
                f"The run failed ({type(error).__name__}); the terminal of the server says where."
            )
            said = notice(where, kind="error", title="Sorry")
        else:
            said = notice(at.done, title="Done")
        yield {at.meter: said, **free}

    def look_inside(self, request: gr.Request) -> object:
        """The second tab opens: what is not there yet, a large report or the stored example, is sent now."""
        result = self.sessions.of(_visitor(request, "compare")).result
        if result is not None:
            report = _text(result)
            return gr.skip() if len(report) < EAGER_CHARACTERS else framed(report, "inside")
        return example("inside")

    def stop(self, request: gr.Request) -> None:
        """Cancel on the first tab."""
        self.sessions.of(_visitor(request, "compare")).cancel()

    def stop_study(self, request: gr.Request) -> None:
        """Cancel on the third tab."""
        self.sessions.of(_visitor(request, "study")).cancel()


def _visitor(request: gr.Request, kind: str) -> str:
    """A visitor may compare and study at once; the two wait for each other as two visitors do."""
    return f"{kind}:{request.session_hash}"


def _text(result: Result) -> str:
    return result.report.read_text(encoding="utf-8")


def _file(path: Path) -> Mapping[str, object]:
    return gr.update(value=str(path), interactive=True)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "?", "!")) else f"{text}."
