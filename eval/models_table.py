"""The table of models: what is supported, how it is built, what was checked, and what is left dense and why.

Everything is read from the code (`sparsediff.pipelines.cards` and the adapters); `docs/models.md` is this table, written by
`sparsediff models --markdown`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sparsediff.adapter import ModelAdapter, Preset, adapter_of
from sparsediff.pipelines.cards import ABSENT, CARDS, CONFORMANCE, NOT_SPARSE
from sparsediff.pipelines.model_card import ModelCard
from sparsediff.pipelines.releases import FLOOR, REVISION, installed, reaches, since

INTRO = f"""\
# Models

Written by `sparsediff models --markdown` from the code; read in diffusers {REVISION}. `sparsediff.enable()` takes a pipeline of
any class below, or its bare transformer, and refuses every other one with this list.

- **Tokens** are those of one eligible attention call, in order. Rows and columns of everything that is not the grid (video
  or image) stay exact; references as large as the grid leave a quarter of the pairs to choose from.
- **Masks**: what becomes of an attention mask that the model brings. Nothing is ignored: what is not understood runs dense,
  counted with its reason.
- **Begin with**: settings and where they come from: *published* for this model, *measured here*, or a *guess*.
- **Checked**: the {CONFORMANCE} (`tests/pipelines/test_families.py`): a dense schedule is bit-identical to stock
  diffusers, keeping every block is within rounding, half density is finite and repeats, `disable()` restores, an odd size,
  every form of guidance, padding, LoRA, offload in either order, one graph under `torch.compile`.
- **At real size**: single steps at full width with random weights have been timed where it says so (docs/performance.md, "Whole steps"); pictures of
  the published weights have not been looked at for any family, for want of the weights.
- **Releases of diffusers**: {FLOOR} and later. Nearly everything below is in {FLOOR}; what is not says which release it came with,
  and `sparsediff models` says what of it the installed one lacks. `make matrix` runs the checks in the oldest and the newest release.
"""


def as_text() -> str:
    """For a terminal: what the installed diffusers lacks is marked."""
    parts = [
        f"diffusers {installed()} is installed; the adapters were read in {REVISION}, and need {FLOOR} at least"
    ]
    parts += [_text_card(card, adapter_of(card.transformer)) for card in CARDS]
    parts.append(
        "Without an adapter (enable() refuses them):\n" + _lines(NOT_SPARSE.items(), "    {}: {}")
    )
    parts.append(f"Not in diffusers {REVISION}:\n" + _lines(ABSENT.items(), "    {}: {}"))
    return "\n\n".join(parts)


def as_markdown() -> str:
    """`docs/models.md`."""
    head = "| family | tokens | masks | guidance | begin with | at real size |\n|---|---|---|---|---|---|"
    rows = [_row(card, adapter_of(card.transformer)) for card in CARDS]
    details = [_details(card) for card in CARDS]
    return "\n".join(
        [
            INTRO,
            head,
            *rows,
            "\n## Pipelines and checks\n",
            *details,
            "\n## Left dense\n",
            "Transformers that have no adapter, all for video and some for images, and why:\n",
            _lines(NOT_SPARSE.items(), "- `{}`: {}"),
            f"\nNot in diffusers {REVISION}:\n",
            _lines(ABSENT.items(), "- {}: {}"),
            "",
        ]
    )


def _text_card(card: ModelCard, adapter: ModelAdapter) -> str:
    facts = {
        "not here": card.lacking,
        "pipelines": _pipelines(card, "{}", lambda first: "" if reaches(first) else "not here: "),
        "tokens": card.tokens,
        "masks": _masks(adapter),
        "guidance": card.guidance,
        **{"begin with": "; ".join(map(_preset, adapter.presets)) or "auto, a guess"},
        "checked": f"{CONFORMANCE}: {', '.join(card.checked)}",
        "real size": card.real,
        "note": card.note,
    }
    lines = [f"    {name:<11} {fact}" for name, fact in facts.items() if fact]
    return "\n".join([f"{card.family}  ({card.transformer})", *lines])


def _row(card: ModelCard, adapter: ModelAdapter) -> str:
    presets = "<br>".join(map(_preset, adapter.presets)) or "`auto`, a guess"
    cells = (card.family, card.tokens, _masks(adapter), card.guidance, presets, card.real)
    return f"| {' | '.join(cells)} |"


def _details(card: ModelCard) -> str:
    pipelines = _pipelines(card, "`{}`")
    checks = ", ".join(f"`{name}`" for name in card.checked)
    note = f" {card.note}" if card.note else ""
    release = "" if card.since == FLOOR else f" In diffusers from {card.since} on."
    return f"- **{card.family}** (`{card.transformer}`): {pipelines}. Checked as {checks}.{release}{note}"


def _pipelines(card: ModelCard, form: str, remark: Callable[[str], str] = lambda _: "") -> str:
    """Its pipelines, and the release that one came with, where that is later than the family's."""
    later = {name: since(name) for name in card.pipelines if since(name) != card.since}
    names = (
        form.format(name) + (f" ({remark(later[name])}from {later[name]})" if name in later else "")
        for name in card.pipelines
    )
    return ", ".join(names) or "modular pipelines"


def _masks(adapter: ModelAdapter) -> str:
    if adapter.reads_masks:
        return "whole blocks and an unused end hidden; dense with padding between"
    if adapter.padding_mask is not None:
        return "padding hidden"
    if adapter.mask_reason != ModelAdapter.mask_reason:
        return f"dense with {adapter.mask_reason}"
    return "none come; dense with any"


def _preset(preset: Preset) -> str:
    settings = "".join(f", {name}={value!r}" for name, value in preset.parameters.items())
    return f"`{preset.method}`{settings} ({preset.provenance}: {preset.source})"


def _lines(items: Iterable[tuple[str, str]], form: str) -> str:
    return "\n".join(form.format(*item) for item in sorted(items))
