"""Every kernel under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("backend", ["triton", "gluon", "gluon_int8"])
def test_clean(tool, backend):
    from sparsediff.kernels.attention import available_backends

    if why_not := available_backends()[backend]:
        pytest.skip(f"{backend}: {why_not}")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    run = subprocess.run(
        [*command, sys.executable, "-m", "sparsediff.kernels.smoke", backend],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
