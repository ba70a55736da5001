"""A run held to limits, for other people's continuous integration."""

from __future__ import annotations

from collections.abc import Sequence

from sparsediff.eval.limits import FIGURES, Limit, directions
from sparsediff.eval.results import Results
from sparsediff.eval.summary import ArmSummary, summarise


def gate(
    results: Results,
    limits: Sequence[Limit],
    *,
    arms: Sequence[str] = (),
    confident: bool = False,
    heed_checks: bool = True,
) -> list[str]:
    """What does not pass, a sentence each; empty if everything does.

    Args:
        results: of a run.
        limits: for every arm.
        arms: identifiers or labels of those to hold to them; none: every method.
        confident: hold the worse end of the 95 % interval to the limit, not the mean.
        heed_checks: a failed self-check fails the gate too, and so does one that was never made.

    Raises:
        ValueError: no limits, an arm that is not there, or no arm at all.
    """
    if not limits:
        known = ", ".join(f"--{'min' if least else 'max'}-{name.replace('_', '-')}" for name, (least, _) in directions().items())  # fmt: skip
        raise ValueError(f"a gate needs a limit: {known}")
    chosen = _chosen(results, arms)
    problems = [
        f"{summary.label}: {problem}"
        for summary in chosen
        for limit in limits
        if (problem := _problem(summary, limit, confident))
    ]
    problems += [p for s in chosen if (p := _unfinished(results, s.arm, heed_checks))]
    if heed_checks:
        names = {s.arm for s in chosen} | {a.arm for a in results.arms if a.role == "dense"}
        problems += [
            f"{arm.label}: self-check {check.name!r} failed: {check.detail}"
            for arm in results.arms
            if arm.arm in names
            for check in arm.checks
            if check.passed is False
        ]
    return problems


def _chosen(results: Results, arms: Sequence[str]) -> list[ArmSummary]:
    summaries = summarise(results)
    if not arms:
        found = [s for s in summaries if s.role == "sparse"]
        if not found:
            raise ValueError("the results hold no method; name an arm with --arm")
        return found
    known = {key: s for s in summaries for key in (s.arm, s.label)}
    if missing := [a for a in arms if a not in known]:
        names = ", ".join(s.arm for s in summaries)
        raise ValueError(f"no arm {missing[0]!r} with clips; there are {names}")
    return [known[a] for a in arms]


def _unfinished(results: Results, name: str, heed_checks: bool) -> str | None:
    """An interrupted run has figures of its first prompts only, and no self-checks yet."""
    arm, dense = results.arm(name), results.dense
    owed = 0 if dense is None else sum(arm.clip(clip.key) is None for clip in dense.clips)
    if owed:
        what = f"{owed} of {len(dense.clips)} clips are missing"
    elif heed_checks and not arm.checks:
        what = "its self-checks were never made"
    else:
        return None
    return f"{arm.label}: the run is unfinished, {what}; the same `sparsediff eval run` goes on with it"


def _problem(summary: ArmSummary, limit: Limit, confident: bool) -> str | None:
    name = limit.figure
    value = getattr(summary, name) if name in FIGURES else summary.metrics.get(name)
    if value is None:
        return f"{name} was not measured"
    if confident and value.low is None:
        return f"{name} has no interval: one prompt is too few for --confident"
    side = "at least" if limit.is_minimum else "at most"
    found = value.mean if not confident else value.low if limit.is_minimum else value.high
    passes = found >= limit.bound if limit.is_minimum else found <= limit.bound
    what = "the 95 % interval's end is" if confident else "is"
    return None if passes else f"{name} {what} {found:.4g}, {side} {limit.bound:g} was asked for (n = {value.n} prompts)"  # fmt: skip
