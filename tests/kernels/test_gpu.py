"""Every kernel against float64 on a real GPU: the checks that the benchmark runs before it times anything."""

import pytest
import torch

pytest.importorskip("triton")

from sparsediff.kernels import bench
from sparsediff.kernels.attention import available_backends

CHECKS = [name for name in bench.PARTS if name.startswith("check_")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("part", CHECKS)
def test_kernels_hold_against_float64(part):
    backend = {
        "check_gluon": "gluon",
        "check_gluon_more": "gluon",
        "check_pairs": "gluon_pairs",
        "check_8bit": "gluon_fp8",
        "check_tma": "triton_tma",
    }.get(part, "triton")
    if why_not := available_backends()[backend]:
        pytest.skip(f"{backend}: {why_not}")
    for record in bench.PARTS[part]():
        assert record["ok"], record
