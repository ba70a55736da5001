"""Tables and picture of the study, from small JSON; intervals against a computation of their own."""

import itertools
import json

import pytest

from sparsediff.eval import study
from sparsediff.eval.study_report import cost_table, paired, table


def arm(method, density, psnr, target=None, error=0.1):
    clips = [{"psnr": x, "ssim": 0.9} for x in psnr]
    return {
        "label": f"{method} {density}",
        "method": method,
        "series": method,
        "target": target,
        "density": density,
        "attention_error": error,
        "clips": clips,
    }


def result(*arms, seeds=1, model="tiny-wan", grid="5x8x8"):
    return {
        "model": model,
        "grid": grid,
        "prompts": len(arms[0]["clips"]) // seeds,
        "seeds": seeds,
        "call": {"num_inference_steps": 5},
        "dense_share": 0.2,
        "device": "cpu",
        "torch": "2",
        "date": "2026-11-22",
        "arms": list(arms),
    }


AUTO = [arm("auto", 0.3, [20.0, 22.0, 27.0], 0.3), arm("auto", 0.5, [30.0, 36.0, 31.0], 0.5)]


def test_differences_are_to_auto_interpolated_at_the_arms_density():
    """At 0.35, a quarter of the way: 22.5, 25.5 and 28 of auto."""
    other = arm("sparse_d", 0.35, [21.5, 25.5, 28.5])
    text = paired(other, AUTO, "psnr", 1)
    assert text.startswith("-0.17 (")
    # All 27 resamples of three prompts, counted: the ends of the middle 95 % are at -1 and +0.5.
    draws = sorted(
        sum(draw) / 3 for draw in itertools.product([21.5 - 22.5, 0.0, 28.5 - 28.0], repeat=3)
    )
    low, high = draws[0], draws[-1]  # each has probability 1/27 > 2.5 %
    assert text == f"-0.17 ({low:+.2f} to {high:+.2f})"


def test_a_constant_difference_has_no_width():
    other = arm("sparse_d", 0.4, [26.0, 30.0, 30.0])
    assert paired(other, AUTO, "psnr", 1) == "+1.00 (+1.00 to +1.00)"


def test_seeds_of_a_prompt_count_once():
    """Two seeds that differ by +5 and -5 are no difference, and no evidence of one."""
    auto = [arm("auto", 0.3, [20.0] * 6), arm("auto", 0.5, [20.0] * 6)]
    other = arm("adaspa", 0.4, [25.0, 15.0] * 3)
    assert paired(other, auto, "psnr", 2) == "+0.00 (+0.00 to +0.00)"
    assert paired(other, auto, "psnr", 1) != "+0.00 (+0.00 to +0.00)"


@pytest.mark.parametrize("density", [0.27, 0.53, 1.0])
def test_far_from_autos_densities_nothing_is_compared(density):
    assert paired(arm("x", density, [1.0, 2.0, 3.0]), AUTO, "psnr", 1) == ""
    assert paired(arm("x", 0.3, [1.0, 2.0, 3.0]), AUTO[:1], "psnr", 1) == ""


def test_equal_densities_of_auto_are_no_division_by_zero():
    auto = [AUTO[0], {**AUTO[1], "density": 0.3}]
    assert paired(arm("x", 0.3, [20.0, 22.0, 27.0]), auto, "psnr", 1).startswith("+0.00")


def test_the_table_holds_means_and_provenance():
    other = arm("sparse_d", 0.3, [20.5, 22.5, 27.5], 0.3, error=0.1234)
    text = "\n".join(table(result(*AUTO, other)))
    assert "### tiny-wan, 5x8x8 tokens" in text
    assert (
        "3 held-out prompts x 1 seeds = 3 clips, 5 steps of which 20% dense, cpu, torch 2" in text
    )
    assert "| auto 0.3 | 0.300 | 23.00 | 0.9000 | 0.100 |  |" in text
    assert "| sparse_d 0.3 | 0.300 | 23.50 | 0.9000 | 0.123 | +0.50 (+0.50 to +0.50) |" in text
    rows = [line for line in text.splitlines() if line.startswith(("| auto", "| sparse"))]
    assert [row.split(" |")[0] for row in rows] == ["| auto 0.5", "| sparse_d 0.3", "| auto 0.3"]


def test_shards_are_merged_by_model_and_size_and_drawn(tmp_path):
    files = {
        "a": result(*AUTO),
        "b": result(arm("sparse_d", 0.3, [20.0, 21.0, 22.0], 0.3)),
        "c": result(*AUTO, grid="9x8x8"),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    cost = {
        "grid": [21, 45, 80], "heads": 40, "head_dim": 128, "dtype": "torch.bfloat16", "device": "a GPU",
        "date": "2026-11-22", "dense_ms": 200.0, "steps": 50,
        "methods": [
            {"method": "auto()", "search_ms": 100.0, "later_search_ms": 0.0, "sample_ms": 12.5, "searches": 1,
             "share_of_dense": 0.01125, "reorder_ms": 1.5, "reorder_share_of_dense": 0.006}
        ],
    }  # fmt: skip
    (tmp_path / "cost").write_text(json.dumps(cost))
    out = tmp_path / "new" / "docs"
    paths = [str(tmp_path / name) for name in files]
    study.main(["report", *paths, "--cost", str(tmp_path / "cost"), "--out", str(out)])
    text = (out / "methods-figures.md").read_text()
    assert text.count("### tiny-wan") == 2
    assert text.count("| sparse_d 0.3 |") == 1
    assert "| `auto()` | 100.00 | - | 1 | 12.50 | 1.12% | 1.50 | 0.60% |" in text
    assert "21x45x80 tokens, 40 heads of 128" in "\n".join(cost_table(cost))
    picture = (out / "methods.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
