"""The `sparsediff` command.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import os
import shlex
import sys
from pathlib import Path

DEFAULT_MODEL = "tiny-wan"
DEFAULT_METHOD = "auto"
CONSTANTS = {"true": "True", "false": "False", "none": "None"}
# Arguments of the pipeline's call that a calibration is bound to, or better repeated.
MEASURED_CALL = ("num_inference_steps", "height", "width", "num_frames", "max_sequence_length")
# What wrong input raises, here and in diffusers; `--debug` shows where.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "run"):
        parser.print_help()
        return 0
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if arguments.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"sparsediff: error: {text}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = _Parser(
        prog="sparsediff",
        description="Training-free sparse attention for diffusers pipelines, with a stated error.",
        epilog="Start with:  sparsediff compare --prompt 'a large red circle moves right'",
    )
    parser.add_argument("--version", action=_Version, help="print the version and leave")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="generate one clip, sparse",
        description="Generate one clip with sparse attention and say what was skipped.",
        formatter_class=_Help,
    )
    _add_generation_flags(generate)
    generate.add_argument(
        "--out",
        type=Path,
        default=Path("sparse.mp4"),
        metavar="FILE.mp4",
        help="where the clip goes",
    )
    generate.add_argument(
        "--report", type=Path, metavar="FILE.json", help="also write the report of the run here"
    )
    _add_calibration_flag(generate)
    generate.set_defaults(run=_generate)

    compare = commands.add_parser(
        "compare",
        help="generate one clip dense and sparse, and say what it cost and gained",
        description="Generate one clip twice, dense and sparse, with the same prompt and seed; print density, PSNR, "
        "SSIM and time, and write both clips, the clips side by side, a sheet of frames and the figures as JSON.",
        formatter_class=_Help,
    )
    _add_generation_flags(compare)
    compare.add_argument(
        "--out", type=Path, default=Path("out"), metavar="FOLDER", help="where the files go"
    )
    _add_calibration_flag(compare)
    compare.set_defaults(run=_compare)

    calibrate = commands.add_parser(
        "calibrate",
        help="measure what a method needs to know about a model before it can run",
        description="Run prompts through a model, measure what a method needs, and say what density and attention "
        "error it then reaches.  Stop it with Ctrl-C whenever you like: the same command goes on where it was.",
        formatter_class=_Help,
    )
    _add_request_flags(calibrate, many=True)
    measure = calibrate.add_argument_group("what to measure")
    measure.add_argument("--method", required=True, help="see `sparsediff methods`")
    _add_set_flag(measure)
    _add_place_flags(calibrate)
    calibrate.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the calibration goes"
    )
    calibrate.set_defaults(run=_calibrate)

    bench = commands.add_parser(
        "bench",
        help="check and time the attention kernels, or time a whole step, on this machine",
        description="kernels: check every kernel against float64, then time it beside dense attention and other "
        "packages' kernels.  step: one denoising step of Wan 2.1 14B, dense and sparse.  A few minutes each on a GPU.",
    )
    bench.add_argument("what", choices=["kernels", "step"], help="what to measure")
    bench.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results here")
    bench.set_defaults(run=_bench)

    methods = commands.add_parser("methods", help="list the methods, their parameters and papers")
    methods.set_defaults(run=_methods)

    doctor = commands.add_parser(
        "doctor", help="versions, devices, which kernel will run and why, and a short self-test"
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    what = _add_request_flags(parser)
    what.add_argument("--fps", type=int, default=16, help="frames a second of the written clip")

    how = parser.add_argument_group("how to attend")
    how.add_argument(
        "--method",
        help=f"see `sparsediff methods`; {DEFAULT_METHOD}, or the one that --calibration is for",
    )
    _add_set_flag(how)
    how.add_argument(
        "--dense-steps",
        type=_count_or_fraction,
        metavar="N",
        help="first steps that stay dense: a count (5) or a fraction (0.2)",
    )
    how.add_argument(
        "--dense-above-sigma",
        type=float,
        metavar="S",
        help="steps above this noise level (sigma in flow matching, the same share of noise elsewhere) stay dense",
    )
    how.add_argument("--dense-layers", type=int, metavar="N", help="first layers that stay dense")
    how.add_argument(
        "--min-dense-share",
        type=float,
        metavar="SHARE",
        help="beside --dense-above-sigma: the least share of the steps that stay dense",
    )
    _add_place_flags(parser)


def _add_request_flags(parser: argparse.ArgumentParser, *, many: bool = False):
    what = parser.add_argument_group("what to generate")
    what.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="a bundled model (tiny-wan; random-wan has random weights), a folder, or a model id for diffusers",
    )
    if many:
        what.add_argument(
            "--prompt", action="append", default=[], help="what a clip shows; may be repeated"
        )
        what.add_argument("--prompts", type=Path, metavar="FILE", help="more prompts, one a line")
    else:
        what.add_argument("--prompt", help="what the clip shows; the bundled models have a default")
    what.add_argument("--negative-prompt", help="what it must not show")
    what.add_argument("--steps", type=int, help="denoising steps")
    what.add_argument("--guidance", type=float, help="scale of classifier-free guidance")
    what.add_argument("--height", type=int, help="pixels")
    what.add_argument("--width", type=int, help="pixels")
    what.add_argument("--frames", type=int, help="frames of the clip")
    what.add_argument("--seed", type=int, default=0, help="of the initial noise")
    return what


def _add_set_flag(group) -> None:
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the method, e.g. --set density=0.25; may be repeated",
    )


def _add_calibration_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        metavar="FOLDER",
        help="what `sparsediff calibrate` wrote, or a repository of the Hugging Face hub; brings its method along",
    )


def _add_place_flags(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where to run")
    where.add_argument("--device", help="cuda if there is one, else cpu")
    where.add_argument(
        "--dtype", help="float32, bfloat16 or float16; bfloat16 on cuda, float32 on cpu"
    )


# -- commands -----------------------------------------------------------------------------------------------------


def _generate(arguments: argparse.Namespace) -> None:
    from sparsediff.eval.video import check_writable, write_mp4

    _require_suffix(arguments.out, ".mp4")
    check_writable(arguments.out)
    if arguments.report is not None:
        check_writable(arguments.report, "--report")
    method, schedule = _ready_method(arguments), _schedule(arguments)
    _quiet_libraries()
    import sparsediff
    from sparsediff.eval.measure import generate

    pipe, request = _pipeline_and_request(arguments)
    _warn_if_random(arguments.model)
    with sparsediff.enable(pipe, method, schedule=schedule) as handle:
        timed = generate(pipe, request.arguments())
        write_mp4(arguments.out, timed.video, arguments.fps)
        print(handle.summary())
        if arguments.report is not None:
            arguments.report.write_text(handle.report().to_json())
    print(f"\n{arguments.out}  {len(timed.video)} frames in {timed.total_seconds:.1f} s")


def _compare(arguments: argparse.Namespace) -> None:
    from sparsediff.eval.video import check_writable

    check_writable(arguments.out / "comparison.json")
    method, schedule = _ready_method(arguments), _schedule(arguments)
    _quiet_libraries()
    from sparsediff.eval.compare import compare, save_comparison

    pipe, request = _pipeline_and_request(arguments)
    _warn_if_random(arguments.model)
    comparison, dense, sparse = compare(
        pipe, request, method, schedule=schedule, model=arguments.model
    )
    files = save_comparison(arguments.out, comparison, dense, sparse, fps=arguments.fps)
    print(f"\n{comparison.report}\n\n{comparison}\n")
    for file in files:
        print(f"  {file}")


def _calibrate(arguments: argparse.Namespace) -> None:
    from sparsediff.calibration import FILE
    from sparsediff.eval.video import check_writable
    from sparsediff.methods import METHODS, CalibratedMethod

    check_writable(arguments.out / FILE)
    method = _method(arguments)
    if not isinstance(method, CalibratedMethod):
        names = [name for name, cls in METHODS.items() if issubclass(cls, CalibratedMethod)]
        raise ValueError(
            f"{method.name} measures nothing beforehand and runs as it is; methods that do: {', '.join(names)}"
        )
    prompts = _prompts(arguments)
    arguments.prompt = prompts[0] if prompts else None
    _quiet_libraries()
    import sparsediff

    pipe, request = _pipeline_and_request(arguments)
    _warn_if_random(arguments.model)
    call = request.arguments()
    for name in ("prompt", "generator", "output_type"):
        del call[name]
    calibration = sparsediff.calibrate(
        pipe,
        method,
        prompts or [request.prompt],
        seed=request.seed,
        folder=arguments.out,
        call=call,
    )
    print(f"\n{calibration}\n{arguments.out / FILE}\n\nUse it with")
    print(f'  sparsediff.enable(pipe, "{method.name}", calibration="{arguments.out}")')
    matter = [f", {name}={call[name]!r}" for name in MEASURED_CALL if name in call]
    print(f"  pipe(prompt{''.join(matter)})")
    command = ["sparsediff", "generate", "--model", arguments.model]
    command += ["--calibration", str(arguments.out)]
    for name in ("steps", "height", "width", "frames"):
        if (value := getattr(arguments, name)) is not None:
            command += [f"--{name}", str(value)]
    print(f"  {shlex.join(command)}")


def _methods(arguments: argparse.Namespace) -> None:
    from sparsediff.methods import METHODS, CalibratedMethod

    for name, cls in METHODS.items():
        print(f"{name}  ({cls.citation})\n    {cls.summary}")
        if issubclass(cls, CalibratedMethod):
            need = "needs" if cls.needs_calibration else "can use"
            print(f"      {need} a calibration: sparsediff calibrate --method {name} --out FOLDER")
        for field in dataclasses.fields(cls):
            if field.repr:
                print(f"      --set {field.name}={field.default!r}")
        print(
            f"      default schedule: {_non_default(cls().default_schedule()) or 'no dense steps or layers'}\n"
        )


def _bench(arguments: argparse.Namespace) -> None:
    import torch

    from sparsediff.eval.video import check_writable

    if arguments.out is not None:
        check_writable(arguments.out)
    if arguments.what == "step":
        from sparsediff.eval.bench_step import main as bench_step

        bench_step(arguments.out)
        return
    if torch.cuda.is_available():
        from sparsediff.kernels.bench import main as bench
    else:
        from sparsediff.kernels.bench_cpu import main as bench
    bench([] if arguments.out is None else ["--output", str(arguments.out)])


def _doctor(arguments: argparse.Namespace) -> int:
    from sparsediff.eval.doctor import diagnose

    return diagnose()


# -- from flags to objects ----------------------------------------------------------------------------------------


def _ready_method(arguments: argparse.Namespace):
    """The method with its calibration; a calibration without a `--method` brings its own."""
    from sparsediff.api import with_calibration
    from sparsediff.calibration import Calibration

    calibration = arguments.calibration
    if calibration is not None:
        calibration = Calibration.from_pretrained(calibration)
    if arguments.method is None:
        arguments.method = DEFAULT_METHOD if calibration is None else calibration.method
    return with_calibration(_method(arguments), calibration, _parameters(arguments.set))


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts is not None:
        lines = [
            line.strip() for line in arguments.prompts.read_text(encoding="utf-8").splitlines()
        ]
        if not any(lines):
            raise ValueError(f"{arguments.prompts} holds no prompts; write one a line")
        prompts += filter(None, lines)
    return prompts


def _method(arguments: argparse.Namespace):
    from sparsediff.methods import build_method

    return build_method(arguments.method, **_parameters(arguments.set))


def _parameters(items: list[str]) -> dict[str, object]:
    """What `--set` says: Python literals, true, false and none in any case, otherwise text."""
    params = {}
    for item in items:
        name, sign, text = item.partition("=")
        if not sign:
            raise ValueError(f"--set takes NAME=VALUE, got {item!r}")
        text = CONSTANTS.get(text.strip().lower(), text)
        try:
            params[name.strip().replace("-", "_")] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            params[name.strip().replace("-", "_")] = text
    return params


def _schedule(arguments: argparse.Namespace):
    from sparsediff.schedule import Schedule

    flags = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Schedule)}
    given = {name: value for name, value in flags.items() if value is not None}
    return Schedule(**given) if given else None


def _pipeline_and_request(arguments: argparse.Namespace):
    from sparsediff.eval.compare import Request
    from sparsediff.eval.models import check_name, default_request, load_pipeline

    check_name(arguments.model)
    flags = (f.name for f in dataclasses.fields(Request) if hasattr(arguments, f.name))
    given = {name: getattr(arguments, name) for name in flags}
    for name, value in {**given, "fps": getattr(arguments, "fps", None)}.items():
        if (
            name in ("steps", "height", "width", "frames", "fps")
            and value is not None
            and value < 1
        ):
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if arguments.guidance is not None and not math.isfinite(arguments.guidance):
        raise ValueError(f"--guidance must be a finite number, got {arguments.guidance}")
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed must be in [0, 2^63), got {arguments.seed}")
    defaults = default_request(arguments.model)
    if given["prompt"] is None and "prompt" not in defaults:
        raise ValueError(f"{arguments.model} needs a --prompt")
    request = Request(**{**defaults, **{k: v for k, v in given.items() if v is not None}})
    pipe = load_pipeline(arguments.model, device=arguments.device, dtype=arguments.dtype)
    return pipe, request


def _warn_if_random(model: str) -> None:
    from sparsediff.eval.models import RANDOM

    if model == RANDOM:
        print(
            "random-wan has random weights: its clips show that everything runs, and nothing about quality\n"
        )


def _count_or_fraction(text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"a count (5) or a fraction (0.2) is needed, got {text!r}")


def _require_suffix(path: Path, suffix: str) -> None:
    if path.suffix != suffix:
        raise ValueError(f"--out must end in {suffix}, got {path}")


def _non_default(record: object) -> str:
    changed = [
        f"{f.name}={getattr(record, f.name)!r}"
        for f in dataclasses.fields(record)
        if getattr(record, f.name) != f.default
    ]
    return ", ".join(changed)


def _quiet_libraries() -> None:
    """Loading bars and notices of other libraries would bury the one bar that matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, like every other mistake."""
        self.exit(2, f"sparsediff: error: {message}; see {self.prog} --help\n")


class _Version(argparse.Action):
    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        import sparsediff

        print(f"sparsediff {sparsediff.__version__}")
        parser.exit()


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        # "(default: None)" says nothing.
        return action.help if action.default in (None, []) else super()._get_help_string(action)


if __name__ == "__main__":
    sys.exit(main())
