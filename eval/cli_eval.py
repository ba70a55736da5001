"""`sparsediff eval`: run, compare two files, report, gate, merge."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from sparsediff.eval import cli_flags as flags
from sparsediff.eval.cli_flags import HelpWithDefaults, OneLineParser

DEFAULT_SUITES = {"bundled": "standard-tiny", "other": "standard"}
REPORT, MARKDOWN = "report.html", "report.md"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """The group of commands; `limits` of the gate need the metrics, which are only names."""
    parser = commands.add_parser(
        "eval",
        help="measure what methods cost and gain over many prompts, and report it",
        description="Measure what methods cost and gain, and whether to believe it.",
    )
    parts = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=OneLineParser
    )
    _add_run(parts)
    _add_compare(parts)
    _add_report(parts)
    _add_gate(parts)
    _add_merge(parts)
    _add_vbench(parts)


def _add_run(parts: argparse._SubParsersAction) -> None:
    parser = parts.add_parser(
        "run",
        help="generate prompts dense and with every method, measure, write a report",
        description="Generate every prompt dense and with every method, measure, and write results and a report. Stop "
        "it with Ctrl-C whenever you like: the same command goes on where it was.",
        formatter_class=HelpWithDefaults,
    )
    what = parser.add_argument_group("what to generate")
    what.add_argument("--model", default=flags.DEFAULT_MODEL, help="a bundled model, a folder, or a model id for diffusers")  # fmt: skip
    what.add_argument("--suite", help="smoke, standard-tiny, standard, or vbench, penguin with --prompts FILE; standard unless --prompts or --prompt is given")  # fmt: skip
    what.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line (or .json, .csv)")  # fmt: skip
    what.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    what.add_argument("--seeds", type=_numbers, metavar="0,1,...", help="seeds of every prompt; the suite's")  # fmt: skip
    flags.add_call_flags(what)
    what.add_argument("--fps", type=int, default=16, help="frames a second of the written clips")
    how = parser.add_argument_group("what to compare")
    how.add_argument("--methods", type=_names, default=[], metavar="A,B", help="methods as they come, such as auto,lite_attention,adaspa")  # fmt: skip
    how.add_argument("--arm", action="append", default=[], metavar="METHOD:NAME=VALUE,...", help="a method with settings, such as auto:density=0.3,dense_steps=2 or paro_attention:calibration=FOLDER; may be repeated")  # fmt: skip
    how.add_argument("--random", action="store_true", help="also random blocks at the density of each method: the floor")  # fmt: skip
    how.add_argument("--no-dense-best", dest="dense_best", action="store_false", help="do not look for a faster exact dense backend")  # fmt: skip
    measure = parser.add_argument_group("how to measure")
    measure.add_argument("--metrics", type=_names, metavar="A,B", help="all that can be had here; psnr, ssim, ms_ssim, lpips, st_lpips, flicker, warping_error")  # fmt: skip
    measure.add_argument("--lpips-weights", type=Path, metavar="FILE", help="network of ST-LPIPS; the installed package's")  # fmt: skip
    measure.add_argument("--repeats", type=int, default=1, help="times each clip is made, for its time")  # fmt: skip
    measure.add_argument("--attention-error", action="store_true", help="one more clip of each method, whose attention calls are compared with dense ones")  # fmt: skip
    measure.add_argument("--captures", action="store_true", help="keep block masks of each method's first clip for the report")  # fmt: skip
    flags.add_place_flags(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where results, clips and the report go")  # fmt: skip
    parser.set_defaults(run=_run)


def _add_compare(parts: argparse._SubParsersAction) -> None:
    parser = parts.add_parser("compare", help="how far two video files are from each other", formatter_class=HelpWithDefaults)  # fmt: skip
    parser.add_argument("video", type=Path, help="the one to judge")
    parser.add_argument("reference", type=Path, help="what it is compared with")
    parser.add_argument("--metrics", type=_names, metavar="A,B", help="all that can be had here")
    parser.add_argument("--lpips-weights", type=Path, metavar="FILE", help="network of ST-LPIPS")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write both side by side, and the figures as JSON")  # fmt: skip
    parser.set_defaults(run=_compare)


def _add_report(parts: argparse._SubParsersAction) -> None:
    parser = parts.add_parser("report", help="write the report of a folder of results again")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", action="store_true", help="print Markdown for a pull request instead")  # fmt: skip
    parser.set_defaults(run=_report)


def _add_gate(parts: argparse._SubParsersAction) -> None:
    from sparsediff.eval.limits import directions

    parser = parts.add_parser(
        "gate",
        help="exit with status 1 if results miss a limit, and say which",
        description="Hold every method of a run to limits. Exits with status 1 and the reasons if one is missed, or if "
        "a self-check of the run failed.",
    )
    parser.add_argument("results", type=Path, metavar="FOLDER")
    for name, (is_minimum, text) in directions().items():
        flag = f"--{'min' if is_minimum else 'max'}-{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, dest=f"limit_{name}", metavar="X", help=text)
    parser.add_argument("--arm", action="append", default=[], help="only this arm; may be repeated")
    parser.add_argument("--confident", action="store_true", help="hold the worse end of the 95 %% interval to the limits, not the mean")  # fmt: skip
    parser.add_argument("--ignore-checks", action="store_true", help="let failed self-checks pass")
    parser.set_defaults(run=_gate)


def _add_merge(parts: argparse._SubParsersAction) -> None:
    parser = parts.add_parser("merge", help="put folders of one run together: other arms, or other prompts")  # fmt: skip
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.set_defaults(run=_merge)


def _add_vbench(parts: argparse._SubParsersAction) -> None:
    parser = parts.add_parser(
        "vbench",
        help="add VBench dimensions to results, by a Python that has the package vbench",
        description="VBench pins versions that cannot live beside this library, so it runs in an environment of its "
        "own, on the clips of finished results.",
        formatter_class=HelpWithDefaults,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", type=Path, metavar="FILE", help="interpreter of that environment; this one")  # fmt: skip
    parser.add_argument("--dimensions", type=_names, metavar="A,B", help="all that need no prompts of VBench's own")  # fmt: skip
    parser.set_defaults(run=_vbench)


# -- commands -----------------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> None:
    from sparsediff.eval.arms import parse_arm
    from sparsediff.eval.models import check_name, load_pipeline
    from sparsediff.eval.runner import Options, evaluate
    from sparsediff.eval.video import check_writable

    check_name(arguments.model)
    check_writable(arguments.out / REPORT)
    arms = [parse_arm(text) for text in [*arguments.methods, *arguments.arm]]
    if not arms:
        arms = [parse_arm(flags.DEFAULT_METHOD)]
    suite = _suite(arguments)
    options = Options(
        metrics=tuple(arguments.metrics) if arguments.metrics is not None else None,
        lpips_weights=arguments.lpips_weights,
        repeats=arguments.repeats,
        dense_best=arguments.dense_best,
        random=arguments.random,
        attention_error=arguments.attention_error,
        captures=arguments.captures,
    )
    flags.quiet_libraries()
    pipe = load_pipeline(arguments.model, device=arguments.device, dtype=arguments.dtype)
    flags.warn_if_random(arguments.model)
    try:
        evaluate(
            pipe, suite, arms, folder=arguments.out, model=arguments.model, fps=arguments.fps, options=options
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\nstopped; finished clips are in {arguments.out}, and the same command goes on from there")  # fmt: skip
        raise
    _write_reports(arguments.out, show=True)


def _suite(arguments: argparse.Namespace):
    from sparsediff.eval.compare import Request
    from sparsediff.eval.models import default_request
    from sparsediff.eval.suites import EXTERNAL, Suite, load_suite

    defaults = default_request(arguments.model)
    if arguments.prompt and (arguments.suite or arguments.prompts):
        raise ValueError("give --prompt, or --suite and --prompts, not both")
    if arguments.prompt:
        suite = Suite(name="prompts", version="0", prompts=tuple(arguments.prompt))
    elif arguments.prompts is not None and arguments.suite not in EXTERNAL:
        suite = load_suite(arguments.suite, arguments.prompts)
    else:
        name = arguments.suite or DEFAULT_SUITES["bundled" if defaults else "other"]
        suite = load_suite(name, arguments.prompts)
    flags.check_call(arguments)
    given = {field: getattr(arguments, name) for name, (field, *_) in flags.CALL_FLAGS.items()}
    call = {field: value for field, value in given.items() if value is not None}
    # A bundled model's own size and steps, under what the suite says, under what the user says.
    own = Request(**{"prompt": "", **defaults}).arguments() if defaults else {}
    own = {name: own[name] for name in own if name not in ("prompt", "generator", "output_type")}
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {arguments.limit}")
    return dataclasses.replace(
        suite,
        prompts=suite.prompts[: arguments.limit],
        seeds=arguments.seeds or suite.seeds,
        call={**own, **suite.call, **call},
    )


def _compare(arguments: argparse.Namespace) -> None:
    from sparsediff.eval.metric_names import METRICS
    from sparsediff.eval.metrics import choose, score
    from sparsediff.eval.typed_json import encode
    from sparsediff.eval.video import (  # fmt: skip
        check_writable,
        read_video,
        require_same_shape,
        side_by_side,
        write_mp4,
    )

    (video, fps), (reference, _) = read_video(arguments.video), read_video(arguments.reference)
    require_same_shape(video, reference)
    size, weights = tuple(video.shape[1:3]), arguments.lpips_weights
    names, notes = choose(arguments.metrics, size, len(video), lpips_weights=weights)
    if arguments.out is not None:
        check_writable(arguments.out / "comparison.json")
    both = score(names, video, reference, lpips_weights=weights)
    alone = score([n for n in names if not METRICS[n].against_dense], reference)
    print(f"{len(video)} frames of {size[1]} x {size[0]}")
    for name in names:
        metric = METRICS[name]
        value = f"{both.clip[name]:.4f} {metric.unit}".strip()
        if name in alone.clip:
            value += f" (reference: {alone.clip[name]:.4f})"
        print(f"  {metric.label:<14}{value:<44}{metric.meaning}")
    for note in notes:
        print(f"  {note}")
    if arguments.out is not None:
        figures = {"video": str(arguments.video), "reference": str(arguments.reference)}
        figures |= {"metrics": both.clip, "frames": both.frames, "notes": list(notes)}
        (arguments.out / "comparison.json").write_text(json.dumps(encode(figures), indent=1) + "\n")
        shown = {arguments.reference.name: reference, arguments.video.name: video}
        shown["difference x4"] = ((video - reference).abs() * 4).clamp(0, 1)
        path = arguments.out / "side_by_side.mp4"
        write_mp4(path, side_by_side(shown), max(1, round(fps)))
        print(f"\n  {path}\n  {arguments.out / 'comparison.json'}")


def _report(arguments: argparse.Namespace) -> None:
    if arguments.markdown:
        from sparsediff.eval.markdown import to_markdown
        from sparsediff.eval.results import load_results

        print(to_markdown(load_results(arguments.folder)), end="")
        return
    _write_reports(arguments.folder, show=False)


def _gate(arguments: argparse.Namespace) -> int:
    from sparsediff.eval.gate import gate
    from sparsediff.eval.limits import Limit, directions
    from sparsediff.eval.results import load_results

    limits = [
        Limit(figure=name, bound=bound, is_minimum=is_minimum)
        for name, (is_minimum, _) in directions().items()
        if (bound := getattr(arguments, f"limit_{name}")) is not None
    ]
    problems = gate(
        load_results(arguments.results),
        limits,
        arms=arguments.arm,
        confident=arguments.confident,
        heed_checks=not arguments.ignore_checks,
    )
    for problem in problems:
        print(f"FAILED  {problem}")
    if not problems:
        print(f"passed  {len(limits)} limit{'s' if len(limits) != 1 else ''}")
    return 1 if problems else 0


def _merge(arguments: argparse.Namespace) -> None:
    from sparsediff.eval.merge import merge

    merge(arguments.folders, arguments.out)
    _write_reports(arguments.out, show=True)


def _vbench(arguments: argparse.Namespace) -> None:
    from sparsediff.eval.vbench import add_vbench

    add_vbench(arguments.folder, arguments.dimensions, python=arguments.python)
    _write_reports(arguments.folder, show=True)


def _write_reports(folder: Path, *, show: bool) -> None:
    """The HTML page and the Markdown; `show`: print the summary too."""
    from sparsediff.eval.markdown import to_markdown
    from sparsediff.eval.report import write_report
    from sparsediff.eval.results import load_results
    from sparsediff.eval.tables import to_text

    results = load_results(folder)
    (folder / MARKDOWN).write_text(to_markdown(results), encoding="utf-8")
    if show:
        print(f"\n{to_text(results)}\n")
    print(f"  {write_report(folder)}\n  {folder / MARKDOWN}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers are needed, such as 0,1,2, got {text!r}") from None  # fmt: skip
