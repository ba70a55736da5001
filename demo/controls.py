"""The form of the page: what is asked for, as Gradio components, and back."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import gradio as gr

from sparsediff.demo.forms import Field, method_fields, needs_calibration, schedule_fields
from sparsediff.demo.presets import AS_IT_COMES, Preset, presets
from sparsediff.demo.settings import Settings, changed
from sparsediff.demo.studio import Studio
from sparsediff.eval.compare import Request
from sparsediff.eval.suites import load_suite
from sparsediff.methods import METHODS
from sparsediff.pipelines import tiny

EXAMPLES = 4
NUMBERS = ("seed", "steps", "guidance", "height", "width", "frames")
WHOLE = ("seed", "steps", "height", "width", "frames")


@dataclass
class Form:
    """The components that hold a `Settings`.

    Attributes:
        prompt, negative_prompt, method, preset: one component each; `about` says what the method is.
        numbers: name in `Request` -> component.
        groups: method -> the parts of the page with its parameters.
        parameters: method -> parameter -> component.
        own_schedule: whether `schedule` counts.
        schedule: field of `Schedule` -> component.
    """

    studio: Studio
    prompt: gr.Textbox = None
    negative_prompt: gr.Textbox = None
    method: gr.Dropdown = None
    preset: gr.Dropdown = None
    about: gr.HTML = None
    numbers: dict[str, gr.Number] = field(default_factory=dict)
    groups: dict[str, list[gr.Column]] = field(default_factory=dict)
    parameters: dict[str, dict[str, object]] = field(default_factory=dict)
    own_schedule: gr.Checkbox = None
    schedule: dict[str, object] = field(default_factory=dict)

    @property
    def inputs(self) -> set[object]:
        """Every component that a handler reads."""
        found = {self.prompt, self.negative_prompt, self.method, self.own_schedule}
        found |= set(self.numbers.values()) | set(self.schedule.values())
        return found | {c for group in self.parameters.values() for c in group.values()}

    @property
    def outputs(self) -> list[object]:
        """Every component that settings can be written to."""
        return [*self.inputs, self.preset, self.about, *self.columns]

    @property
    def columns(self) -> list[gr.Column]:
        """What is shown for one method and hidden for the others."""
        return [column for columns in self.groups.values() for column in columns]

    def read(self, data: Mapping[object, object]) -> Settings:
        """What the page says.

        Raises:
            ValueError: something that is no value; the message names the field.
        """
        numbers = {name: data[c] for name, c in self.numbers.items()}
        for name in WHOLE:
            value = numbers[name]
            numbers[name] = int(value) if value is not None and value == int(value) else value
        if numbers["seed"] is None:
            numbers["seed"] = 0
        method = data[self.method]
        schedule = None
        if data[self.own_schedule]:
            schedule = changed(schedule_fields(), {n: data[c] for n, c in self.schedule.items()})
        return Settings(
            request=Request(
                prompt=data[self.prompt] or "",
                negative_prompt=data[self.negative_prompt] or None,
                **numbers,
            ),
            method=method,
            parameters=self.read_parameters(data),
            schedule=schedule,
        )

    def read_parameters(self, data: Mapping[object, object]) -> dict[str, object]:
        """What the page says of the picked method's parameters, where it differs from their defaults.

        Raises:
            ValueError: something that is no value; the message names the field.
        """
        method = data[self.method]
        shown = {name: data[c] for name, c in self.parameters[method].items()}
        return changed(method_fields(method), shown)

    def write(self, settings: Settings) -> dict[object, object]:
        """Updates that make the page say so."""
        request = settings.request
        updates = {
            self.prompt: request.prompt,
            self.negative_prompt: request.negative_prompt or "",
            self.own_schedule: settings.schedule is not None,
            **{c: getattr(request, name) for name, c in self.numbers.items()},
        }
        for one in schedule_fields():
            value = (settings.schedule or {}).get(one.name, one.default)
            updates[self.schedule[one.name]] = one.show(value)
        return updates | self.write_method(settings.method, settings.parameters)

    def write_method(self, method: str, parameters: Mapping[str, object]) -> dict[object, object]:
        """Updates for a method and its parameters alone."""
        updates = {self.method: method}
        for one in method_fields(method):
            value = parameters.get(one.name, one.default)
            updates[self.parameters[method][one.name]] = one.show(value)
        return updates | self.show_method(method, parameters)

    def show_method(
        self, method: str, parameters: Mapping[str, object] | None
    ) -> dict[object, object]:
        """Show the parameters of this method and no other's, and the preset that these are, if any.

        `parameters`: those that differ from their defaults; None if they are no values.
        """
        known = presets(method, self.studio.presets)
        same = [p.label for p in known if p.parameters == parameters]
        label = AS_IT_COMES if parameters == {} else next(iter(same), None)
        return {
            self.about: about_method(method),
            self.preset: gr.update(choices=[p.label for p in known], value=label),
        } | {
            column: gr.update(visible=name == method)
            for name, columns in self.groups.items()
            for column in columns
        }


def build_form(studio: Studio) -> Form:
    """Lay out what everybody sets, where the caller is in the page; `build_more` lays out the rest."""
    form = Form(studio)
    form.prompt = gr.Textbox(
        studio.defaults.get("prompt", ""),
        label="Prompt",
        lines=2,
        max_lines=6,
        elem_id="prompt",
        placeholder=f"What the {studio.served.noun} shows",
    )
    with gr.Column(elem_id="examples"):
        gr.HTML('<p class="sd-hint">Try</p>')
        for text in example_prompts(studio.model):
            # Gradio's own examples are cut after so many letters, wherever the line ends.
            gr.Button(text, size="sm").click(
                None, None, form.prompt, js=f"() => {json.dumps(text)}", api_visibility="private"
            )
    with gr.Row(elem_classes="sd-tight"):
        form.method = gr.Dropdown(list(studio.methods), value="auto", label="Method", elem_id="method", min_width=120)  # fmt: skip
        form.preset = gr.Dropdown([p.label for p in presets("auto", ())], value=AS_IT_COMES, label="Preset", elem_id="preset", min_width=120)  # fmt: skip
    form.about = gr.HTML(about_method("auto"), elem_id="about-method")
    for name in studio.methods:
        _build_parameters(form, name, main=True)
    return form


def build_more(form: Form) -> None:
    """Lay out what few people set."""
    studio = form.studio
    title = f"{studio.served.noun.capitalize()}: seed, steps, size"
    with gr.Accordion(title, open=False, elem_id="clip-settings"):
        _build_numbers(form)
        form.negative_prompt = gr.Textbox(
            studio.defaults.get("negative_prompt", ""),
            label="Negative prompt",
            elem_id="negative_prompt",
            visible="negative_prompt" not in studio.fixed,
        )
    with gr.Accordion("More parameters", open=False, elem_id="more"):
        for name in studio.methods:
            _build_parameters(form, name, main=False)
    with gr.Accordion("When to stay dense", open=False, elem_id="when"):
        form.own_schedule = gr.Checkbox(False, label="Choose it myself", info="otherwise the method's published choice", elem_id="own_schedule")  # fmt: skip
        for one in schedule_fields():
            form.schedule[one.name] = widget(one, f"schedule-{one.name}")
    if hint := calibration_hint(studio):
        gr.Markdown(hint, elem_classes="sd-hint", elem_id="calibrate-hint")


def _build_numbers(form: Form) -> None:
    known = {"seed": 0, **form.studio.defaults}
    labels = {"seed": "Seed", "steps": "Steps", "guidance": "Guidance", "height": "Height", "width": "Width", "frames": "Frames"}  # fmt: skip
    for row in (("seed", "steps", "guidance"), ("width", "height", "frames")):
        with gr.Row(elem_classes="sd-tight"):
            for name in row:
                form.numbers[name] = gr.Number(
                    known.get(name),
                    label=labels[name],
                    elem_id=name,
                    min_width=80,
                    visible=name not in form.studio.fixed,
                )


def _build_parameters(form: Form, method: str, *, main: bool) -> None:
    part = "main" if main else "more"
    with gr.Column(visible=method == "auto", elem_id=f"{part}-{method}") as column:
        for one in (f for f in method_fields(method) if f.main == main):
            form.parameters.setdefault(method, {})[one.name] = widget(one, f"{method}-{one.name}")
    form.groups.setdefault(method, []).append(column)


def widget(one: Field, elem_id: str) -> object:
    """The component that suits a field."""
    about = {"label": one.name, "info": one.help or None, "elem_id": elem_id}
    value = one.show(one.default)
    if one.kind == "slider":
        return gr.Slider(one.low, one.high, value, step=one.step, **about)
    if one.kind == "choice":
        return gr.Dropdown(list(one.choices), value=value, **about)
    if one.kind == "switch":
        return gr.Checkbox(value, **about)
    return gr.Textbox(value, **about)


def about_method(method: str) -> str:
    """What a method does and where it was published, as HTML."""
    cls = METHODS[method]
    return f'<p class="sd-hint">{html.escape(f"{cls.summary} ({cls.citation})")}</p>'


def example_prompts(model: str) -> tuple[str, ...]:
    """Held-out captions for the bundled models, ordinary prompts for others."""
    bundled = model in tiny.MODELS or model == "random-wan"
    return load_suite("standard-tiny" if bundled else "standard").prompts[:EXAMPLES]


def calibration_hint(studio: Studio) -> str:
    """What is not offered, and how to get it."""
    missing = [
        n for n, cls in METHODS.items() if needs_calibration(cls) and n not in studio.methods
    ]
    if not missing:
        return ""
    return (
        f"{' and '.join(missing)} must be measured before they can run: `sparsediff calibrate` does that, and "
        "`sparsediff demo --calibration FOLDER` then offers them."
    )


def preset_named(method: str, label: str, studio: Studio) -> Preset | None:
    """A preset of a method by what the page calls it."""
    return next((p for p in presets(method, studio.presets) if p.label == label), None)
