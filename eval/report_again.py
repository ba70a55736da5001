"""How to measure the same again, as a reader of the report would type it."""

from __future__ import annotations

import shlex

from sparsediff.eval.cli_flags import CALL_FLAGS
from sparsediff.eval.results import ArmResult, Results
from sparsediff.eval.suites import EXTERNAL, load_suite, suite_names

FEW_PROMPTS = 4  # so many are typed out


def reproduce(results: Results) -> dict[str, str]:
    """A command, and lines of Python."""
    first = results.arms[0]
    clips = [clip for arm in results.arms for clip in arm.clips]
    prompts = list(dict.fromkeys(clip.prompt for clip in clips))
    seeds = list(dict.fromkeys(clip.seed for clip in clips))
    arms = [_arm_argument(arm) for arm in results.arms if arm.role == "sparse"]
    words, suite, note = _prompt_words(first, prompts)
    command = ["sparsediff", "eval", "run", "--model", first.model, *words]
    if seeds != [0]:
        command += ["--seeds", ",".join(map(str, seeds))]
    for flag, (field, *_) in CALL_FLAGS.items():
        if field in first.call:
            command += [f"--{flag.replace('_', '-')}", str(first.call[field])]
    command += [word for arm in arms for word in ("--arm", arm)]
    if any(arm.role == "random" for arm in results.arms):
        command.append("--random")
    if any(results.capture_path(arm) for arm in results.arms):
        command.append("--captures")
    command += ["--out", "report"]
    lines = [
        "from sparsediff.eval.models import load_pipeline",
        "from sparsediff.eval.report import write_report",
        "from sparsediff.eval.runner import evaluate",
        *(["from sparsediff.eval.suites import load_suite"] if "load_suite" in suite else []),
        "",
        f"pipe = load_pipeline({first.model!r})",
        f"evaluate(pipe, {suite}, {arms!r}, folder='report', call={first.call!r})",
        "write_report('report')",
    ]
    return {"command": shlex.join(command) + note, "python": "\n".join(lines)}


def _prompt_words(first: ArmResult, prompts: list[str]) -> tuple[list[str], str, str]:
    """What to type for the prompts: words of the command, an expression of Python, and a remark."""
    if first.suite in suite_names() and first.suite not in EXTERNAL:
        whole = len(prompts) == len(load_suite(first.suite).prompts)
        limit = [] if whole else ["--limit", str(len(prompts))]
        return ["--suite", first.suite, *limit], f"load_suite({first.suite!r})", ""
    if len(prompts) <= FEW_PROMPTS:
        return [word for prompt in prompts for word in ("--prompt", prompt)], f"{prompts!r}", ""
    named = ["--suite", first.suite] if first.suite in EXTERNAL else []
    load = f"load_suite({first.suite if named else None!r}, 'prompts.txt')"
    note = f"\n# prompts.txt: the {len(prompts)} prompts of this report, one a line"
    return [*named, "--prompts", "prompts.txt"], load, note


def _arm_argument(arm: ArmResult) -> str:
    """As `parse_arm` reads it; a label is the method's name and what was set."""
    name, _, settings = arm.label.partition(" ")
    return f"{name}:{settings.replace(', ', ',')}" if settings else name
