"""The `sparsediff demo` command."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util

from sparsediff.eval import cli_flags as flags


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of `sparsediff`."""
    parser = commands.add_parser(
        "demo",
        help="open a page that makes clips dense and sparse and shows what it cost and gained",
        description="Serve a page on this machine: prompt, method, one button, both clips side by side with live meters.  "
        "Visitors choose prompts, sizes and methods; the model is chosen here.  It loads nothing from a network.",
        formatter_class=flags.HelpWithDefaults,
    )
    parser.add_argument(
        "--model",
        default=flags.DEFAULT_MODEL,
        help="a bundled model, a folder, or a model id for diffusers",
    )
    flags.add_place_flags(parser)
    flags.add_call_flags(
        parser.add_argument_group(
            "what the page begins with",
            "the pipeline's own defaults if left out; a visitor may ask for twice the steps, pixels and frames",
        )
    )
    parser.add_argument(
        "--calibration",
        action="append",
        default=[],
        metavar="FOLDER",
        help="what `sparsediff calibrate` wrote for this model: offers its method too; may be repeated",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; this machine alone unless told"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument(
        "--share", action="store_true", help="also open a public address through Gradio's tunnel"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serve until interrupted.

    Raises:
        ImportError: Gradio is not installed.
        ValueError, OSError: no such model, calibration, host or port; or a model that the page cannot serve.
        RuntimeError: the model could not be loaded.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the demo needs Gradio: pip install 'sparsediff[demo]'")
    if not 0 < arguments.port < 65536:
        raise ValueError(f"--port must lie between 1 and 65535, got {arguments.port}")
    flags.quiet_libraries()
    print("starting, this takes a few seconds ...", flush=True)
    defaults = {name: getattr(arguments, name) for name in flags.CALL_FLAGS}
    from sparsediff.demo.serve import serve
    from sparsediff.demo.studio import Studio

    studio = Studio(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        calibrations=tuple(arguments.calibration),
        defaults={name: value for name, value in defaults.items() if value is not None},
    )
    with contextlib.closing(studio):
        serve(studio, host=arguments.host, port=arguments.port, share=arguments.share)
