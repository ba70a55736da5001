"""Flags that several commands share, and what they become.

Heavy imports happen inside functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from pathlib import Path

from sparsediff.eval.literals import parse_settings

DEFAULT_MODEL = "tiny-wan"
DEFAULT_METHOD = "auto"
# Flag -> argument of the pipeline's call, type, help.
CALL_FLAGS = {
    "negative_prompt": ("negative_prompt", str, "what it must not show"),
    "steps": ("num_inference_steps", int, "denoising steps"),
    "guidance": ("guidance_scale", float, "scale of classifier-free guidance"),
    "height": ("height", int, "pixels"),
    "width": ("width", int, "pixels"),
    "frames": ("num_frames", int, "frames of the clip"),
}


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """What to generate, how to attend, where to run."""
    what = add_request_flags(parser)
    what.add_argument("--fps", type=int, default=16, help="frames a second of the written clip")

    how = parser.add_argument_group("how to attend")
    how.add_argument(
        "--method",
        help=f"see `sparsediff methods`; {DEFAULT_METHOD}, or the one that --calibration is for",
    )
    add_set_flag(how)
    how.add_argument(
        "--dense-steps",
        type=count_or_fraction,
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
    add_place_flags(parser)


def add_request_flags(parser: argparse.ArgumentParser, *, many: bool = False):
    """What to generate; with `many`, any number of prompts.  Returns the group."""
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
    add_call_flags(what)
    what.add_argument("--seed", type=int, default=0, help="of the initial noise")
    return what


def add_call_flags(group) -> None:
    """Arguments of the pipeline's call."""
    for name, (_, kind, text) in CALL_FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def add_set_flag(group) -> None:
    """`--set`, for parameters of a method."""
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the method, e.g. --set density=0.25; may be repeated",
    )


def add_calibration_flag(parser: argparse.ArgumentParser) -> None:
    """`--calibration`."""
    parser.add_argument(
        "--calibration",
        metavar="FOLDER",
        help="what `sparsediff calibrate` wrote, or a repository of the Hugging Face hub; brings its method along",
    )


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    """Device and precision."""
    where = parser.add_argument_group("where to run")
    where.add_argument("--device", help="cuda if there is one, else cpu")
    where.add_argument(
        "--dtype", help="float32, bfloat16 or float16; bfloat16 on cuda, float32 on cpu"
    )


# -- from flags to objects ------------------------------------------------------------------------------------------


def ready_method(arguments: argparse.Namespace):
    """The method with its calibration; a calibration without a `--method` brings its own."""
    from sparsediff.api import with_calibration
    from sparsediff.calibration import Calibration

    calibration = arguments.calibration
    if calibration is not None:
        calibration = Calibration.from_pretrained(calibration)
    if arguments.method is None:
        arguments.method = DEFAULT_METHOD if calibration is None else calibration.method
    return with_calibration(
        configured_method(arguments), calibration, parse_settings(arguments.set, "--set")
    )


def all_prompts(arguments: argparse.Namespace) -> list[str]:
    """`--prompt`, then what is in the file of `--prompts`."""
    prompts = list(arguments.prompt)
    if arguments.prompts is not None:
        lines = [
            line.strip() for line in arguments.prompts.read_text(encoding="utf-8").splitlines()
        ]
        if not any(lines):
            raise ValueError(f"{arguments.prompts} holds no prompts; write one a line")
        prompts += filter(None, lines)
    return prompts


def configured_method(arguments: argparse.Namespace):
    """`--method` with what `--set` says."""
    from sparsediff.methods import build_method

    return build_method(arguments.method, **parse_settings(arguments.set, "--set"))


def configured_schedule(arguments: argparse.Namespace):
    """The flags of the schedule; None if none was given."""
    from sparsediff.schedule import Schedule

    flags = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Schedule)}
    given = {name: value for name, value in flags.items() if value is not None}
    return Schedule(**given) if given else None


def pipeline_and_request(arguments: argparse.Namespace):
    """The pipeline, loaded, and what it is to generate; wrong numbers are refused before anything is loaded."""
    from sparsediff.eval.compare import Request
    from sparsediff.eval.models import check_name, default_request, load_pipeline

    check_name(arguments.model)
    flags = (f.name for f in dataclasses.fields(Request) if hasattr(arguments, f.name))
    given = {name: getattr(arguments, name) for name in flags}
    check_call(arguments)
    defaults = default_request(arguments.model)
    if given["prompt"] is None and "prompt" not in defaults:
        raise ValueError(f"{arguments.model} needs a --prompt")
    request = Request(**{**defaults, **{k: v for k, v in given.items() if v is not None}})
    pipe = load_pipeline(arguments.model, device=arguments.device, dtype=arguments.dtype)
    return pipe, request


def check_call(arguments: argparse.Namespace) -> None:
    """Refuse numbers that no pipeline can take, before anything is loaded.

    Raises:
        ValueError: the message names the flag.
    """
    for name in ("steps", "height", "width", "frames", "fps"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if arguments.guidance is not None and not math.isfinite(arguments.guidance):
        raise ValueError(f"--guidance must be a finite number, got {arguments.guidance}")
    seeds = getattr(arguments, "seeds", None) or [getattr(arguments, "seed", 0)]
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise ValueError(f"--seed must be in [0, 2^63), got {seed}")


def warn_if_random(model: str) -> None:
    """Say that random weights show nothing about quality."""
    from sparsediff.eval.models import RANDOM

    if model == RANDOM:
        print(
            "random-wan has random weights: its clips show that everything runs, and nothing about quality\n"
        )


def count_or_fraction(text: str) -> int | float:
    """`5` or `0.2`."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"a count (5) or a fraction (0.2) is needed, got {text!r}")


def require_suffix(path: Path, suffix: str) -> None:
    """Refuse a file of another kind."""
    if path.suffix != suffix:
        raise ValueError(f"--out must end in {suffix}, got {path}")


def quiet_libraries() -> None:
    """Loading bars and notices of other libraries would bury the one bar that matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line that names the help."""

    def error(self, message: str):
        """One line, like every other mistake."""
        self.exit(2, f"sparsediff: error: {message}; see {self.prog} --help\n")


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that says defaults where there are any."""

    def _get_help_string(self, action):
        # "(default: None)" says nothing.
        return action.help if action.default in (None, []) else super()._get_help_string(action)
