"""The table of steps: the fastest dense kernel counts, and one that could not run is passed over."""

from sparsediff.eval.step_table import table


def test_a_row_says_what_was_measured():
    records = [
        {"what": "dense", "ms": 1000.4, "peak_gib": 2.31, "kernel": "cuDNN"},
        {"what": "dense", "kernel": "flash", "unavailable": "no"},
        {"what": "dense", "ms": 900.2, "peak_gib": 2.26, "kernel": "PyTorch's choice"},
        {"what": "no self-attention", "ms": 300.1, "peak_gib": 2.0, "over_dense": 3.0},
        *(
            {"what": what, "ms": ms + extra, "peak_gib": 2.5, "density": d, "over_dense": round(900 / ms, 3)}
            for d, ms in ((0.5, 600.0), (0.3, 480.0), (0.2, 420.0), (0.1, 360.0))
            for what, extra in (("sparse", 0), ("sparse, choosing blocks", 90))
        ),
        {"what": "report", "grid": "512 text + 1x128x128"},
    ]  # fmt: skip
    result = {
        "what": "one denoising step of A Model, 2048x2048, random weights, batch 1",
        "layers": {"num_layers": 5, "num_single_layers": 10},
        "of_layers": {"num_layers": 19, "num_single_layers": 38},
        "records": records,
    }
    head, rule, row = table([result]).splitlines()
    assert len(head.split("|")) == len(rule.split("|")) == len(row.split("|"))
    assert row == (
        "| A Model, 2048x2048 | 512 text + 1x128x128 | 15 of 57 | 900 (2.3) | 600, **1.50** | 480, **1.88** | 420, **2.14** "
        "| 300, 3.00 | 2.5 |"
    )
