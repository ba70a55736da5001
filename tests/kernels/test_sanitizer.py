"""Every kernel under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory.

racecheck does not know the barriers that Hopper's copy engine and warpgroups meet at (mbarriers, and named barriers
between Triton's partitions): it takes every hand-over of the Hopper kernels for a race, those of Triton's own
`warp_specialize` among them.  So it looks at the portable ones that load by pointers; the others are held to equal bits in repeated runs.
"""

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


@pytest.mark.parametrize(
    ("tool", "backend"),
    [
        ("memcheck", "triton"),
        ("memcheck", "triton_tma"),
        ("memcheck", "gluon"),
        ("memcheck", "gluon_pairs"),
        ("memcheck", "gluon_int8"),
        ("memcheck", "gluon_fp8"),
        ("racecheck", "triton"),
    ],
)
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
