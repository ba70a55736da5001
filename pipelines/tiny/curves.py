"""Training curves from the log of all chunks.

python -m sparsediff.pipelines.tiny.curves docs/tiny/training-log.jsonl docs/tiny/training.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# what is drawn, in order; a chunk of the same line goes on where the one before ended
AUTOENCODER = {
    "start": "17 frames, two GPUs",
    "longer": "61 frames, two GPUs",
    "decoder": "33 frames, decoder only",
}
LINES = {
    "tiny-wan": ("start", "main", "more"),
    "tiny-cogvideox": ("whole",),
    "tiny-cogvideox, 5 layers of 4 heads": ("whole, 5 layers",),
}


def plot(records: list[dict], path: Path) -> None:
    """Two panels: PSNR of the autoencoder's batches, and the loss of the transformers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    offset = 0
    for recipe, label in AUTOENCODER.items():
        points = [r for r in records if r.get("recipe") == recipe and "psnr_noisy" in r]
        x = [offset + r["iteration"] for r in points]
        left.plot(x, [r["psnr_noisy"] for r in points], "o-", ms=3, label=label)
        offset = x[-1]
    left.set(title="Autoencoder: PSNR of a training batch, noise on the latents")
    left.set(xlabel="iteration", ylabel="dB")
    left.legend()
    for (line, chunks), style in zip(LINES.items(), ("C0-", "C3-", "C3:"), strict=True):
        offset, x, y = 0, [], []
        for chunk in chunks:
            points = [r for r in records if r.get("chunk") == chunk and "loss" in r]
            points = [
                r for r in points if line.startswith(r["stage"]) and r["iteration"] % 100 == 0
            ]
            x += [offset + r["iteration"] for r in points[1:]]
            y += [r["loss"] for r in points[1:]]
            offset = x[-1]
            right.plot(x[-1], y[-1], style[:2] + "|", ms=14)
        right.plot(x, y, style, label=line)
    right.set(title="Transformer: flow-matching loss, a bar ends a chunk", yscale="log")
    right.set(xlabel="iteration")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)


if __name__ == "__main__":
    log, picture = map(Path, sys.argv[1:])
    plot([json.loads(line) for line in log.read_text().splitlines()], picture)
