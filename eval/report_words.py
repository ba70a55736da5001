"""The sentences of the report: what it says at a glance, and what to bear in mind."""

from __future__ import annotations

from sparsediff.eval.metric_names import METRICS
from sparsediff.eval.report_again import reproduce
from sparsediff.eval.report_figures import headline_metric, is_faster, title
from sparsediff.eval.results import ArmResult, Results
from sparsediff.eval.stats import FEW, Estimate
from sparsediff.eval.suites import suite_names
from sparsediff.eval.summary import PSNR_CAP, ArmSummary

# What differences of video clips look like at a PSNR, from that many decibels on: a rule of thumb, and said to be one.
EYES = (
    (40.0, "the eye hardly finds a difference at that"),
    (30.0, "differences at that show side by side, hardly alone"),
    (25.0, "that is the same scene with visible differences"),
    (float("-inf"), "that is a visibly different clip"),
)
DECIMALS = {"psnr": 1}


def page_words(
    results: Results, summaries: tuple[ArmSummary, ...], *, focus: str, notes: list[str]
) -> dict[str, object]:
    """Headline, tiles, badges, checks, caveats, environment and how to do it again."""
    chosen = next(s for s in summaries if s.arm == focus)
    first = results.arms[0]
    checks = _checks(results)
    return {
        "title": f"{first.model}: sparse attention against dense",
        "kicker": f"sparsediff evaluation · {first.model} · {_suite(first)}",
        "headline": [_headline(chosen, results)],
        "lede": " ".join(_lede(chosen, summaries)),
        "badges": _badges(results, chosen, checks),
        "tiles": _tiles(chosen),
        "tableNote": "Small figures are 95 % bootstrap intervals over prompts, clip against dense clip; the forecast comes "
        "from operation counts. Bold is the best method of a column.",
        "checks": checks,
        "caveats": _caveats(results, summaries, notes),
        "environment": _environment(results),
        "reproduce": reproduce(results),
        "footer": f"Made by sparsediff {first.environment.get('sparsediff', '')} from {first.created[:10] or 'undated'} results. "
        "This file needs no network.",
    }


def _headline(arm: ArmSummary, results: Results) -> str:
    if arm.role == "dense":
        return "Only dense clips so far: add a method to compare with."
    if results.dense is None or arm.denoiser_speedup is None:
        return "There is no dense arm to compare with: these are densities and times alone."
    quality = f", at {said}" if (said := _quality(arm)) else ""
    speed = arm.denoiser_speedup.mean
    if is_faster(arm):
        return (
            f"{arm.label} makes the denoiser {speed:.2f} times as fast as dense attention{quality}."
        )
    if sum(other.role == "sparse" for other in results.arms) == 1:
        return f"{arm.label} is not reliably faster than dense attention here: {speed:.2f} times its speed{quality}."
    said = f"{said} and " if said else ""
    return f"No method is reliably faster here. {arm.label} comes closest to dense attention, at {said}{speed:.2f} times its speed."


def _quality(arm: ArmSummary) -> str:
    """How close its clips are, to follow "at"; "" if nobody measured."""
    if arm.clips and arm.identical == arm.clips:
        return "identical clips"
    name = headline_metric([arm])
    if name is None:
        return ""
    value = format_metric(name, arm.metrics[name].mean)
    return (
        f"{value} PSNR to the dense clips"
        if name == "psnr"
        else f"{METRICS[name].label} {value} to the dense clips"
    )


def _lede(arm: ArmSummary, summaries: tuple[ArmSummary, ...]) -> list[str]:
    said = []
    if arm.role == "sparse" and "psnr" in arm.metrics and arm.identical < arm.clips:
        mean = arm.metrics["psnr"].mean
        said.append(f"As a rule of thumb, {next(text for least, text in EYES if mean >= least)}.")
    floor = next((s for s in summaries if s.role == "random" and "psnr" in s.metrics), None)
    if floor is not None:
        said.append(
            f"Blocks drawn at random reach {format_metric('psnr', floor.metrics['psnr'].mean)} at density "
            f"{floor.density.mean:.2f}."
        )
    rivals = [s for s in summaries if s.role == "sparse" and s.denoiser_speedup is not None]
    fastest = max(rivals, key=lambda s: s.denoiser_speedup.mean, default=None)
    if fastest is not None and fastest.arm != arm.arm and is_faster(fastest):
        quality = _quality(fastest)
        said.append(
            f"Fastest is {fastest.label}: {fastest.denoiser_speedup.mean:.2f} times as fast"
            + (f", at {quality}." if quality else ".")
        )
    said.append(
        "Look at the clips below: figures say how far a clip is from the dense one, not how good it is."
    )
    return said


def _suite(arm: ArmResult) -> str:
    return (
        f"suite {arm.suite}, version {arm.suite_version}"
        if arm.suite in suite_names()
        else "own prompts"
    )


def _tiles(arm: ArmSummary) -> list[dict[str, str]]:
    if arm.role == "dense":
        return []
    tiles = []

    def add(label: str, value: Estimate | None, text: str, unit: str, interval: str) -> None:
        if value is not None:
            tiles.append({"label": label, "value": text, "unit": unit, "note": interval})

    for label, value in (("Denoiser", arm.denoiser_speedup), ("Whole call", arm.speedup)):
        if value is not None:
            add(
                label,
                value,
                f"{value.mean:.2f}",
                "\N{MULTIPLICATION SIGN} dense",
                _interval(value, 2),
            )
    names = [n for n in METRICS if n in arm.metrics and METRICS[n].against_dense][:2]
    for name in names:
        value, metric = arm.metrics[name], METRICS[name]
        same = name == "psnr" and arm.identical == arm.clips
        text = "identical" if same else f"{value.mean:.{DECIMALS.get(name, 3)}f}"
        better = "more is better" if metric.higher_is_better else "less is better"
        note = "" if same else _interval(value, DECIMALS.get(name, 3)) or better
        add(f"{title(name)} to dense", value, text, "" if same else metric.unit, note)
    add("Density", arm.density, f"{arm.density.mean:.3f}", "", "of dense attention, all steps")
    return tiles


def _interval(value: Estimate, decimals: int) -> str:
    if value.low is None:
        return f"one prompt, {value.clips} clip{'s' * (value.clips > 1)}"
    return f"{value.low:.{decimals}f} to {value.high:.{decimals}f} ({value.n} prompts)"


def _badges(
    results: Results, arm: ArmSummary, checks: list[dict[str, object]]
) -> list[dict[str, str]]:
    failed = sum(check["passed"] is False for check in checks)
    passed = sum(check["passed"] is True for check in checks)
    badges = []
    if failed:
        badges.append(
            {
                "text": f"{failed} self-check{'s' * (failed > 1)} failed: do not trust these figures yet",
                "kind": "bad",
                "href": "#checks",
            }
        )
    elif passed:
        badges.append({"text": f"{passed} self-checks passed", "kind": "good", "href": "#checks"})
    n = arm.density.n
    badges.append(
        {
            "text": f"{n} prompt{'s' * (n > 1)}, {arm.clips} clip{'s' * (arm.clips > 1)} an arm",
            "kind": "",
        }
    )
    if device := results.arms[0].environment.get("device"):
        badges.append({"text": device, "kind": ""})
    return badges


def _checks(results: Results) -> list[dict[str, object]]:
    """Failures first; what several arms say alike is said once."""
    found: dict[tuple, list[str]] = {}
    for arm in results.arms:
        for check in arm.checks:
            found.setdefault((check.name, check.passed, check.detail), []).append(arm.label)
    order = {False: 0, None: 1, True: 2}
    return [
        {"name": name, "passed": passed, "detail": detail, "arms": arms}
        for (name, passed, detail), arms in sorted(found.items(), key=lambda x: order[x[0][1]])
    ]


def _caveats(results: Results, summaries: tuple[ArmSummary, ...], notes: list[str]) -> list[str]:
    prompts = summaries[0].density.n
    said = list(notes)
    if prompts == 1:
        said.append(
            "One prompt is an anecdote: there is no interval, and another prompt may say the opposite."
        )
    elif prompts < FEW:
        said.append(
            f"{prompts} prompts are few: a bootstrap interval over fewer than {FEW} is narrower than the truth."
        )
    said.append(
        "PSNR, SSIM and LPIPS compare with the dense clip of the same seed. A clip can differ from it and be as good, or be "
        "close and have lost what matters."
    )
    if any(s.identical for s in summaries):
        said.append(f"In means, the infinite PSNR of identical clips counts as {PSNR_CAP:.0f} dB.")
    device = results.arms[0].environment.get("device", "")
    gpu = any(word in device.lower() for word in ("nvidia", "geforce", "tesla", "rtx"))
    if device and not gpu:
        said.append(
            f"Times are of this device ({device}) and this size; elsewhere another method may be the fastest."
        )
    if len({tuple(sorted(arm.environment.items())) for arm in results.arms}) > 1:
        said.append(
            "The arms were not all measured in the same environment; their times do not compare."
        )
    if len({arm.git_hash for arm in results.arms}) > 1:
        said.append("The arms were measured with different versions of the code.")
    counts = {s.arm: s.clips for s in summaries}
    if len(set(counts.values())) > 1:
        said.append(
            "Not all arms are complete: "
            + ", ".join(f"{arm} {n}" for arm, n in counts.items())
            + " clips."
        )
    if not any(results.capture_path(arm) for arm in results.arms):
        said.append(
            "No masks were captured; `sparsediff eval run --captures` shows what each patch attends."
        )
    said += dict.fromkeys(note for arm in results.arms for note in arm.notes)
    return said


def _environment(results: Results) -> list[list[str]]:
    first = results.arms[0]
    rows = [
        ("model", first.model + (f" @ {first.revision}" if first.revision else "")),
        ("layout", _settings(first.layout)),
        ("call", _settings(first.call)),
        *(first.configuration | first.environment).items(),
        ("commit", first.git_hash),
        ("measured", first.created),
    ]
    rows += [
        (arm.label, f"{arm.method}({_settings(arm.parameters)}); {arm.schedule}")
        for arm in results.others
        if arm.method
    ]
    return [[name, value] for name, value in rows if value]


def _settings(values: dict[str, object]) -> str:
    plain = {
        name: " + ".join(map(str, value.values())) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return ", ".join(f"{name}={value}" for name, value in plain.items())


def format_metric(name: str, value: float) -> str:
    """With its unit, and as many places as mean something."""
    unit = METRICS[name].unit
    return f"{value:.{DECIMALS.get(name, 3)}f}" + (f" {unit}" if unit else "")
