"""The summary as Markdown, for a pull request or a model card."""

from __future__ import annotations

from sparsediff.eval.metric_names import METRICS
from sparsediff.eval.results import Results
from sparsediff.eval.stats import FEW
from sparsediff.eval.summary import ArmSummary, summarise
from sparsediff.eval.tables import heading, summary_table


def to_markdown(results: Results) -> str:
    """A table of all arms with 95 % intervals, what the figures depend on, and every caveat."""
    summaries = summarise(results)
    first = results.arms[0]
    prompts = len({clip.prompt for arm in results.arms for clip in arm.clips})
    head, rows = summary_table(summaries)
    rows = [[_cell(c) for c in row] for row in rows]
    lines = [
        f"**{_escape(first.model)}**, suite {_escape(first.suite)} (version {_escape(first.suite_version)}): "
        f"{prompts} prompts, seeds {', '.join(map(str, first.seeds)) or 'none'}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Means over prompts with 95 % bootstrap intervals; speed-ups are of the dense arm's time, paired clip by clip. "
        "The forecast is from operation counts.",
        "",
        *_alone(summaries),
        *_caveats(results, prompts),
        f"Measured on {_escape(first.environment.get('device', 'an unknown device'))} with {_versions(first.environment)}; "
        f"configuration `{first.config_hash[:12]}`, commit `{first.git_hash or 'unknown'}`.",
    ]
    return "\n".join(lines) + "\n"


def _alone(summaries: tuple[ArmSummary, ...]) -> list[str]:
    """Metrics of one clip alone, as differences to the dense clips'."""
    told = [n for n in METRICS if any(n in s.differences for s in summaries)]
    if not told:
        return []
    head = ["less the dense clip's", *(heading(n) for n in told)]
    rows = [
        [
            s.label,
            *(s.differences[n].format(3, sign=True) if n in s.differences else "" for n in told),
        ]
        for s in summaries
        if s.differences
    ]
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(_cell(c) for c in row)} |" for row in rows),
        "",
    ]  # fmt: skip


def _caveats(results: Results, prompts: int) -> list[str]:
    found = [
        f"{arm.label}: {check.detail} (self-check {check.name!r})"
        for arm in results.arms
        for check in arm.checks
        if check.passed is False
    ]
    if prompts < FEW:
        found.append(
            f"{prompts} prompt{'s' if prompts != 1 else ''}: too few to rank methods; intervals are too narrow"
        )
    found += dict.fromkeys(note for arm in results.arms for note in arm.notes)
    if not found:
        return []
    return ["Caveats:", "", *(f"- {_escape(text)}" for text in found), ""]


def _versions(environment: dict[str, str]) -> str:
    return ", ".join(
        f"{n} {environment[n]}" for n in ("torch", "diffusers", "sparsediff") if n in environment
    )


def _cell(text: str) -> str:
    return _escape(text).replace("|", "\\|")


def _escape(text: str) -> str:
    """What people wrote does not become markup."""
    for sign in "\\`*_[]<>#":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
