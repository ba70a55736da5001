"""Tables and a picture from what `study run` and `study cost` wrote."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from sparsediff.eval.stats import estimate

METRICS = {"psnr": "PSNR dB", "ssim": "SSIM", "st_lpips": "ST-LPIPS"}
# Okabe and Ito's palette, told apart by people who see fewer colours
COLOURS = {
    "auto": "#000000",
    "adaspa": "#0072b2",
    "sparse_d": "#56b4e9",
    "paro_attention": "#009e73",
    "sparse_vdit": "#e69f00",
    "draft_attention": "#d55e00",
    "lite_attention": "#cc79a7",
    "lite_attention centre-out": "#f0e442",
    "random": "#999999",
}


def add_command(commands: argparse._SubParsersAction) -> None:
    """`report`."""
    parser = commands.add_parser("report", help="tables (methods-figures.md) and a picture")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--cost", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.set_defaults(command=report)


def report(args: argparse.Namespace) -> None:
    """Merge shards of one model and size, write."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for path in args.results:
        result = json.loads(path.read_text())
        groups[(result["model"], result["grid"])].append(result)
    merged = [
        {**parts[0], "arms": [a for p in parts for a in p["arms"]]} for parts in groups.values()
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for result in merged:
        lines += table(result)
    if args.cost:
        lines += cost_table(json.loads(args.cost.read_text()))
    (args.out / "methods-figures.md").write_text("\n".join(lines) + "\n")
    picture(merged, args.out / "methods.png")


def table(result: dict) -> list[str]:
    """Markdown: arms by density, with the paired difference to `auto` at the same density over all steps."""
    metrics = [m for m in METRICS if m in result["arms"][0]["clips"][0]]
    count = len(result["arms"][0]["clips"])
    lines = [
        f"### {result['model']}, {result['grid']} tokens",
        "",
        f"{result['prompts']} held-out prompts x {result['seeds']} seeds = {count} clips, "
        f"{result['call']['num_inference_steps']} steps of which {result['dense_share']:.0%} dense, "
        f"{result['device']}, torch {result['torch']}, {result['date']}.",
        "",
        f"| method | density | {' | '.join(METRICS[m] for m in metrics)} | attention error | PSNR less auto's at this density (95 %) "
        "| PSNR less that of random blocks |",
        "|---|---|" + "---|" * (len(metrics) + 3),
    ]
    auto, random = ([a for a in result["arms"] if a["series"] == s] for s in ("auto", "random"))
    for arm in sorted(result["arms"], key=lambda a: (-(a["target"] or 0), -mean(a, "psnr"))):
        values = " | ".join(f"{mean(arm, m):.{2 if m == 'psnr' else 4}f}" for m in metrics)
        to_auto, to_random = (
            "" if arm in line else paired(arm, line, "psnr", result["seeds"])
            for line in (auto, random)
        )
        lines.append(
            f"| {arm['label']} | {arm['density']:.3f} | {values} | {arm['attention_error']:.3f} | {to_auto} | {to_random} |"
        )
    return [*lines, ""]


def cost_table(cost: dict) -> list[str]:
    """Markdown: time of a search, and its share of a run's dense attention."""
    lines = [
        "### What choosing blocks costs",
        "",
        f"{'x'.join(map(str, cost['grid']))} tokens, {cost['heads']} heads of {cost['head_dim']}, {cost['dtype']}, random queries and keys, "
        f"{cost['device']}, {cost['date']}. A dense call (cuDNN's on a GPU) takes {cost['dense_ms']:.0f} ms; a run has {cost['steps']} steps.",
        "",
        "Reordering is queries, keys and values there and the output back, in every sparse step.",
        "",
        "| method | first search, ms | later ones, ms | searches a run | sampling before each, ms | share of the run's dense attention | reordering a call, ms | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['method']}` | {row['search_ms']:.2f} | {_or_dash(row['later_search_ms'])} | {row['searches']} | "
        f"{_or_dash(row['sample_ms'])} | {row['share_of_dense']:.2%} | "
        f"{row['reorder_ms']:.2f} | {row['reorder_share_of_dense']:.2%} |"
        for row in cost["methods"]
    ]
    return [*lines, ""]


def _or_dash(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds else "-"


def mean(arm: dict, metric: str) -> float:
    """Over the clips."""
    return mean_of([clip[metric] for clip in arm["clips"]])


def paired(arm: dict, others: list[dict], metric: str, seeds: int) -> str:
    """Mean difference to another method clip by clip, with a bootstrap interval over the prompts.

    Budgets round differently, so the clips of the `others` are interpolated between the two of their densities on either
    side; empty far from all of these.
    """
    line = sorted(others, key=lambda a: a["density"])
    slack = 0.02  # past the ends of the line
    if (
        len(line) < 2
        or not line[0]["density"] - slack <= arm["density"] <= line[-1]["density"] + slack
    ):
        return ""
    right = next((i for i, a in enumerate(line) if a["density"] >= arm["density"]), len(line) - 1)
    low, high = line[max(right, 1) - 1], line[max(right, 1)]
    span = high["density"] - low["density"]
    share = (arm["density"] - low["density"]) / span if span else 0.0
    differences = [
        clip[metric] - (a[metric] + share * (b[metric] - a[metric]))
        for clip, a, b in zip(arm["clips"], low["clips"], high["clips"], strict=True)
    ]
    return estimate((i // seeds, x) for i, x in enumerate(differences)).format(sign=True)


def mean_of(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def picture(results: list[dict], path: Path) -> None:
    """PSNR against density, one panel a model and size, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(results), figsize=(5.2 * len(results), 4.2), squeeze=False, layout="constrained"
    )
    for panel, result in zip(axes[0], results, strict=True):
        lines = defaultdict(list)
        for arm in result["arms"]:
            lines[arm["series"]].append((arm["density"], mean(arm, "psnr")))
        for name in (n for n in dict.fromkeys([*COLOURS, *lines]) if n in lines):
            x, y = zip(*sorted(lines[name]), strict=True)
            width = 2.4 if name == "auto" else 1.4
            panel.plot(x, y, marker="o", ms=4, color=COLOURS.get(name), lw=width, label=name)
        panel.set_title(f"{result['model']}, {result['grid']} tokens", fontsize=10)
        panel.set_xlabel("density over all steps")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("PSNR to the dense clip, dB")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
