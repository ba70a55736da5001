"""`study cost` at a size for a CPU: every method has a row, and shares are what the times say."""

import json

import pytest

from sparsediff.eval import study, study_cost


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("cost") / "new" / "cost.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsediff.eval.study_cost.HEAD_DIM", 16)
        study.main(
            ["cost", "--grid", "3", "8", "16", "--heads", "5", "--device", "cpu", "--out", str(out)]
        )
    return json.loads(out.read_text())


def test_every_method_but_hybrids_of_ones_own_has_a_row(result):
    named = [row["method"].split("(")[0] for row in result["methods"]]
    assert {*named} == {
        "auto", "adaspa", "sparse_d", "draft_attention", "lite_attention", "paro_attention", "sparse_vdit",
    }  # fmt: skip
    assert len(named) == len(study_cost.METHODS)


def test_shares_follow_from_times(result):
    run = result["dense_ms"] * result["steps"]
    for row in result["methods"]:
        assert row["search_ms"] > 0
        later = row["searches"] - 1
        assert (row["later_search_ms"] > 0) == (later > 0)
        assert (row["sample_ms"] > 0) == ("model_percentile" in row["method"])
        choosing = row["search_ms"] + later * row["later_search_ms"]
        choosing += row["searches"] * row["sample_ms"]
        assert row["share_of_dense"] == pytest.approx(choosing / run, rel=0.05, abs=1e-3 / run)
        assert row["reorder_share_of_dense"] == pytest.approx(
            row["reorder_ms"] * 40 / run, rel=0.05, abs=1e-2 / run
        )


def test_what_reorders_pays_for_it_and_static_blocks_are_looked_up_once_a_stretch(result):
    rows = {row["method"].split("(")[0]: row for row in result["methods"][::-1]}
    for name in ("auto", "draft_attention", "paro_attention", "sparse_vdit"):
        assert rows[name]["reorder_ms"] > 0, name
    for name in ("adaspa", "sparse_d", "lite_attention"):
        assert rows[name]["reorder_ms"] == 0, name
    searches = {name: row["searches"] for name, row in rows.items()}
    # Steps 10 to 49 of 50 meet all four stretches; AdaSpa looks at 20 % and 60 %, auto at 20 % and half.
    assert searches == {
        "auto": 2, "adaspa": 2, "sparse_d": 1, "draft_attention": 40, "lite_attention": 1,
        "paro_attention": 4, "sparse_vdit": 4,
    }  # fmt: skip


def test_it_says_what_it_was_made_of(result):
    assert result["grid"] == [3, 8, 16]
    assert result["arguments"]["heads"] == 5
    assert {"commit", "torch", "device", "date", "seed", "dtype"} <= result.keys()
