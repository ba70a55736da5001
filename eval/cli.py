"""The `sparsediff` command.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import shlex
import sys
from pathlib import Path

from sparsediff.eval import cli_eval
from sparsediff.eval import cli_flags as flags

# Arguments of the pipeline's call that a calibration is bound to, or better repeated.
MEASURED_CALL = ("num_inference_steps", "height", "width", "num_frames", "max_sequence_length")
# What wrong input raises, here and in diffusers; `--debug` shows where.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError, RuntimeError)


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
    parser = flags.OneLineParser(
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
        formatter_class=flags.HelpWithDefaults,
    )
    flags.add_generation_flags(generate)
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
    flags.add_calibration_flag(generate)
    generate.set_defaults(run=_generate)

    compare = commands.add_parser(
        "compare",
        help="generate one clip dense and sparse, and say what it cost and gained",
        description="Generate one clip twice, dense and sparse, with the same prompt and seed; print density, PSNR, "
        "SSIM and time, and write both clips, the clips side by side, a sheet of frames and the figures as JSON.",
        formatter_class=flags.HelpWithDefaults,
    )
    flags.add_generation_flags(compare)
    compare.add_argument(
        "--out", type=Path, default=Path("out"), metavar="FOLDER", help="where the files go"
    )
    flags.add_calibration_flag(compare)
    compare.set_defaults(run=_compare)

    calibrate = commands.add_parser(
        "calibrate",
        help="measure what a method needs to know about a model before it can run",
        description="Run prompts through a model, measure what a method needs, and say what density and attention "
        "error it then reaches.  Stop it with Ctrl-C whenever you like: the same command goes on where it was.",
        formatter_class=flags.HelpWithDefaults,
    )
    flags.add_request_flags(calibrate, many=True)
    measure = calibrate.add_argument_group("what to measure")
    measure.add_argument("--method", required=True, help="see `sparsediff methods`")
    flags.add_set_flag(measure)
    flags.add_place_flags(calibrate)
    calibrate.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the calibration goes"
    )
    calibrate.set_defaults(run=_calibrate)

    bench = commands.add_parser(
        "bench",
        help="check and time the attention kernels, or time a whole step, on this machine",
        description="kernels: check every kernel against float64, then time it beside dense attention and other "
        "packages' kernels.  step: one denoising step of a model at full width (random weights, fewer layers), dense, sparse "
        "and without self-attention.  A few minutes each on a GPU.",
    )
    bench.add_argument("what", choices=["kernels", "step"], help="what to measure")
    bench.add_argument(
        "--model",
        default="wan-14b",
        help="step: wan-14b, wan-2.2-5b, hunyuan-video, hunyuan-video-1.5, cogvideox-1.5, ltx-2, flux-2k or flux-4k",
    )
    bench.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results here")
    bench.set_defaults(run=_bench)

    cli_eval.add_commands(commands)

    methods = commands.add_parser("methods", help="list the methods, their parameters and papers")
    methods.set_defaults(run=_methods)
    models = commands.add_parser(
        "models",
        help="list the model families: what is supported, how it was checked, what stays dense",
    )
    models.add_argument("--markdown", action="store_true", help="as docs/models.md has it")
    models.set_defaults(run=_models)

    doctor = commands.add_parser(
        "doctor", help="versions, devices, which kernel will run and why, and a short self-test"
    )
    doctor.set_defaults(run=_doctor)
    # By name: the parts below the page never import it, only this command line does.
    importlib.import_module("sparsediff.demo.cli").add_parser(commands)
    return parser


# -- commands -----------------------------------------------------------------------------------------------------


def _generate(arguments: argparse.Namespace) -> None:
    from sparsediff.eval.video import check_writable, write_mp4

    flags.require_suffix(arguments.out, ".mp4")
    check_writable(arguments.out)
    if arguments.report is not None:
        check_writable(arguments.report, "--report")
    method, schedule = flags.ready_method(arguments), flags.configured_schedule(arguments)
    flags.quiet_libraries()
    import sparsediff
    from sparsediff.eval.measure import generate

    pipe, request = flags.pipeline_and_request(arguments)
    flags.warn_if_random(arguments.model)
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
    method, schedule = flags.ready_method(arguments), flags.configured_schedule(arguments)
    flags.quiet_libraries()
    from sparsediff.eval.compare import compare, save_comparison

    pipe, request = flags.pipeline_and_request(arguments)
    flags.warn_if_random(arguments.model)
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
    method = flags.configured_method(arguments)
    if not isinstance(method, CalibratedMethod):
        names = [name for name, cls in METHODS.items() if issubclass(cls, CalibratedMethod)]
        raise ValueError(
            f"{method.name} measures nothing beforehand and runs as it is; methods that do: {', '.join(names)}"
        )
    prompts = flags.all_prompts(arguments)
    arguments.prompt = prompts[0] if prompts else None
    flags.quiet_libraries()
    import sparsediff

    pipe, request = flags.pipeline_and_request(arguments)
    flags.warn_if_random(arguments.model)
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


def _models(arguments: argparse.Namespace) -> None:
    from sparsediff.eval.models_table import as_markdown, as_text

    print(
        as_markdown() if arguments.markdown else as_text(), end="" if arguments.markdown else "\n"
    )


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

        bench_step(arguments.out, arguments.model)
        return
    if torch.cuda.is_available():
        from sparsediff.kernels.bench import main as bench
    else:
        from sparsediff.kernels.bench_cpu import main as bench
    bench([] if arguments.out is None else ["--output", str(arguments.out)])


def _doctor(arguments: argparse.Namespace) -> int:
    from sparsediff.eval.doctor import diagnose

    return diagnose()


def _non_default(record: object) -> str:
    changed = [
        f"{f.name}={getattr(record, f.name)!r}"
        for f in dataclasses.fields(record)
        if getattr(record, f.name) != f.default
    ]
    return ", ".join(changed)


class _Version(argparse.Action):
    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        import sparsediff

        print(f"sparsediff {sparsediff.__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
