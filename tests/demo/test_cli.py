"""`sparsediff demo` and the file that starts a Space."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from sparsediff.eval.cli import build_parser, main

ROOT = Path(__file__).resolve().parents[2]


def test_it_listens_on_this_machine_alone_unless_told():
    found = build_parser().parse_args(["demo"])
    assert (found.model, found.host, found.port, found.share) == (
        "tiny-wan",
        "127.0.0.1",
        7860,
        False,
    )
    found = build_parser().parse_args(["demo", "--calibration", "a", "--calibration", "b"])
    assert found.calibration == ["a", "b"]


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    assert main(["demo"]) == 2
    assert "pip install 'sparsediff[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nothing"], "unknown model 'nothing'"),
        (["--port", "0"], "--port must lie between 1 and 65535"),
        (["--calibration", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_flags_are_one_line(words, said, capsys):
    assert main(["demo", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def save_index(folder, pipeline, transformer):
    """A folder of a pipeline without its weights."""
    index = {"_class_name": pipeline, "transformer": ["diffusers", transformer]}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("pipeline", "transformer", "words", "said"),
    [
        ("WanImageToVideoPipeline", "WanTransformer3DModel", [], "this page serves WanPipeline"),
        ("FluxPipeline", "FluxTransformer2DModel", ["--frames", "9"], "FluxPipeline takes no frames"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_served_is_one_line(pipeline, transformer, words, said, tmp_path, capsys):  # fmt: skip
    save_index(tmp_path, pipeline, transformer)
    assert main(["demo", "--model", str(tmp_path), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sparsediff: error: ")
    assert said in line


@pytest.mark.slow
def test_a_server_whose_model_cannot_be_loaded_ends(tmp_path):
    save_index(tmp_path, "WanPipeline", "WanTransformer3DModel")
    ended = subprocess.run(
        [sys.executable, "-m", "sparsediff.eval", "demo", "--model", str(tmp_path), "--port", free_port()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "sparsediff: error: The model could not be loaded: cannot load" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_taken_port_is_named(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--model", "random-wan", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_file_of_a_space_serves_and_ends_on_interrupt():
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "demo" / "app.py")],
        env={**os.environ, "SPARSEDIFF_MODEL": "random-wan", "GRADIO_SERVER_PORT": port, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        assert said.startswith(f"sparsediff demo: http://127.0.0.1:{port}")
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode()
        assert '"title":"sparsediff"' in page
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130, -signal.SIGINT)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
