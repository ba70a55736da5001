"""A Markdown table of what `sparsediff bench step` wrote, a row a model.

python -m sparsediff.eval.step_table docs/benchmarks/step_*_h200.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

DENSITIES = (0.5, 0.3, 0.2)
HEAD = ("model", "tokens", "layers", "dense ms (GiB)", *(f"{d:g}" for d in DENSITIES), "no self-attention", "GiB")  # fmt: skip


def table(results: Iterable[dict]) -> str:
    """Milliseconds of one step, and in bold how many times faster than the fastest dense kernel."""
    rows = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    rows += ["| " + " | ".join(_row(result)) + " |" for result in results]
    return "\n".join(rows)


def _row(result: dict) -> list[str]:
    records = result["records"]
    dense = min((r for r in records if r["what"] == "dense" and "ms" in r), key=lambda r: r["ms"])
    sparse = {r["density"]: r for r in records if r["what"] == "sparse"}
    bare = next(r for r in records if r["what"] == "no self-attention")
    grid = next(r["grid"] for r in records if r["what"] == "report")
    name = result["what"].removeprefix("one denoising step of ").split(", random weights")[0]
    layers = sum(result["layers"].values()), sum(result["of_layers"].values())
    return [
        name,
        grid,
        f"{layers[0]} of {layers[1]}",
        f"{dense['ms']:.0f} ({dense['peak_gib']:.1f})",
        *(f"{sparse[d]['ms']:.0f}, **{dense['ms'] / sparse[d]['ms']:.2f}**" for d in DENSITIES),
        f"{bare['ms']:.0f}, {dense['ms'] / bare['ms']:.2f}",
        f"{sparse[DENSITIES[-1]]['peak_gib']:.1f}",
    ]


if __name__ == "__main__":
    print(table(json.loads(Path(name).read_text()) for name in sys.argv[1:]))
