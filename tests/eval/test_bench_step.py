"""The benchmark of a whole step, at a toy size on a CPU: every kind of step runs, and runs what it says."""

import pytest
import torch

from sparsediff.eval import bench_step

TOY = {
    **bench_step.WAN_14B,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
}


def test_every_kind_of_step(monkeypatch):
    monkeypatch.setattr("sparsediff.state.CPU_BREAK_EVEN", 2.0)
    model = bench_step.build(TOY, 1, "cpu")
    *records, report = bench_step.measure(model, (1, 16, 5, 32, 32), compiled=False)
    assert [(r["what"], r["density"]) for r in records] == [
        ("dense", None),
        ("no self-attention", None),
        *(
            (kind, d)
            for d in (0.5, 0.3, 0.2, 0.1)
            for kind in ("sparse", "sparse, choosing blocks")
        ),
    ]
    assert report["backends"] == {"cpu": "CPU tensors: gathered blocks in plain torch"}
    assert report["dense_calls"] == {}
    # 1280 tokens are 20 blocks of 64; every density is held for four timesteps.
    want = [d for d in (0.5, 0.3, 0.2, 0.1) for _ in range(bench_step.CALLS)]
    assert report["densities"] == pytest.approx(want, abs=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs there")
def test_a_machine_without_a_gpu_is_told():
    with pytest.raises(ValueError, match="needs a CUDA device"):
        bench_step.main()
