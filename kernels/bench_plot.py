"""Draw what the benchmark measured: the rate of executed tiles by density, ours beside every peer.

    python -m sparsediff.kernels.bench_plot docs/benchmarks/peers_h200.json docs/kernels.png

A kernel that turns every skipped block into time draws a level line.  Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TITLES = {
    "wan75": "Wan 14B 720p",
    "hun118": "HunyuanVideo 720p",
    "wan32": "Wan 1.3B 480p",
    "cog45": "CogVideoX 1.5",
}
# Name in the records -> name in the picture, colour.  Dense kernels have one density and become level lines.
SPARSE = {
    "gluon": ("ours", "#d1495b"),
    "fa4": ("FlashAttention-4, block-sparse", "#00798c"),
    "flex_attention": ("FlexAttention", "#8d96a3"),
}
DENSE = {
    "fa4": ("FlashAttention-4, dense", "#00798c"),
    "sdpa cudnn": ("cuDNN, dense", "#30638e"),
    "sdpa flash": ("FlashAttention-2, dense", "#8d96a3"),
}


def draw(result: dict, path: Path) -> None:
    """One panel a shape from the records of the part `time_peers`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in result["parts"]["time_peers"]["records"] if r["kind"] == "time"]
    shapes = list(dict.fromkeys(r["shape"] for r in records))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(3.4 * len(shapes), 3.3), sharey=True, squeeze=False
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        mine = [r for r in records if r["shape"] == shape]
        for name, (label, colour) in DENSE.items():
            for r in (r for r in mine if r["what"] == name and r["density"] == 1):
                axis.axhline(r["tflops"], color=colour, linestyle=":", linewidth=1.2, label=label)
        for name, (label, colour) in SPARSE.items():
            points = [
                r for r in mine if r["what"] == name and (name == "gluon" or r["density"] < 1)
            ]
            if points:
                axis.plot(
                    [r["density"] for r in points],
                    [r["tflops"] for r in points],
                    color=colour,
                    marker="o",
                    markersize=4,
                    label=label,
                )
        batch, heads, seq, dim = result["shapes"][shape]
        axis.set_title(
            f"{TITLES[shape]}\n{batch} x {heads} heads x {seq:,} tokens x {dim}", fontsize=9
        )
        axis.set_xscale("log")
        axis.set_xticks([0.1, 0.2, 0.3, 0.5, 1.0], ["0.1", "0.2", "0.3", "0.5", "1"])
        axis.minorticks_off()
        axis.set_xlabel("share of blocks kept", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.set_ylim(0, 1.08 * max(r["tflops"] for r in records))
    axes[0][0].set_ylabel("TFLOP/s of executed tiles", fontsize=9)
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="lower center",
        ncols=len(handles),
        fontsize=8,
        frameon=False,
    )
    figure.text(
        0.995,
        0.005,
        f"{result['device']}, {result['date']}, {result['git']}",
        ha="right",
        fontsize=6,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
