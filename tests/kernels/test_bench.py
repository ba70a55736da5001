"""The benchmark's own parts, where no GPU is needed."""

import pytest

pytest.importorskip("triton")

from sparsediff.kernels import bench, bench_peers, bench_plot, bench_tma


def record(what, density, tflops, shape="wan32"):
    return {"kind": "time", "shape": shape, "what": what, "density": density, "tflops": tflops}


def test_every_part_has_a_name_of_its_own_and_says_what_it_is():
    parts = [part for group in bench.GROUPS for part in group]
    assert len({part.__name__ for part in parts}) == len(parts)
    assert all(part.__name__.startswith(("check_", "time_")) and part.__doc__ for part in parts)


def test_the_picture_shows_every_kernel(tmp_path):
    pytest.importorskip("matplotlib")
    result = {
        "device": "a GPU",
        "date": "2026-01-01",
        "git": "0000000",
        "shapes": {"wan32": [1, 12, 32760, 128]},
        "parts": {
            "time_peers": {
                "records": [
                    *(record(name, 1.0, 600.0) for name in bench_peers.DENSE),
                    *(record("gluon", d, 600.0) for d in (1.0, 0.2)),
                    record("fa4", 0.2, 610.0),
                    {"kind": "absent", "peer": "fa4", "shape": "wan32", "why": "not installed"},
                ]
            }
        },
    }
    bench_plot.draw(result, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


def test_peers_of_one_name_share_a_colour():
    assert set(bench_plot.DENSE) == set(bench_peers.DENSE)
    assert bench_plot.DENSE["fa4"][1] == bench_plot.SPARSE["fa4"][1]


def test_a_case_that_fails_leaves_the_records_before_it():
    def check():
        yield record("a", 1.0, 1.0)
        raise RuntimeError("out of shared memory")

    first, failed = bench_tma.survive("the second case", check)
    assert first == record("a", 1.0, 1.0)
    assert not failed["ok"]
    assert failed["what"] == "the second case"
    assert failed["failure"] == "RuntimeError: out of shared memory"
