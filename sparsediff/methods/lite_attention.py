"""LiteAttention: temporal sparse attention (Shmilovich et al., arXiv:2511.11062).

A tile whose scores all lie far below the running maximum adds nothing to the output, and what is useless at one
denoising step stays useless later.  So each attention call both uses the skip decisions of the call before and, as a
by-product of computing the surviving tiles, makes those of the next: no profiling pass (section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from sparsediff.block_mask import BlockMask, forced_blocks, pack_bits, unpack_bits
from sparsediff.calibration import Calibrator, Call, ModelLayout, per_calibration
from sparsediff.calibration_memory import relative_error
from sparsediff.kernels.attention import attend_blocks
from sparsediff.kernels.block_lists import Visits
from sparsediff.methods.base import AttentionSite, CalibratedMethod
from sparsediff.token_grid import TokenGrid

VisitingOrder = Literal["descending", "alternate", "centre-out"]
Ranges = tuple[tuple[int, int], ...]  # [start, stop) in tokens of the sequence
LOWEST, HIGHEST = -20.0, -0.01  # thresholds that a search looks between
PROBES = 12


@dataclass(frozen=True, kw_only=True)
class LiteAttention(CalibratedMethod):
    """Skip tiles that a previous step found negligible; a skipped tile never comes back within a generation.

    Attributes:
        threshold: log2 units, below 0.  A tile is dropped for the next step when, in every query row, its best score
            lies below the running maximum by this much: -10 drops what weighs under 2^-10 of the best so far.
            Nearer 0 skips more.  (The paper writes the same as `-epsilon` in natural units: epsilon = 10 ln 2.)
        tile: `(query, key)` tokens.  The published Hopper kernel uses 128 x 176 at head size 128; a power of two is
            what our kernels run.
        visiting_order: in which order a call visits the tiles of a query tile.  A tile is compared with those before it
            alone, so what comes first is kept (the first always) and an early high maximum drops more of the rest:
            "descending" (published) from the last key tile to the first, "alternate" (the authors' later code) turned
            round at every step, "centre-out" (the radial order that the paper proposes) from the query's own place
            outwards.  A ragged last tile comes first in each, and calls with padded keys are always descending.
        must_keep: token ranges whose tiles are visited by every query and whose queries visit every tile; text is so
            without being named.  Ranges grow to whole tiles.
        must_skip: token ranges that no query attends to, from the first call on; they shrink to whole tiles, ranges
            that touch as one.  What must be kept, text with it, is kept all the same.
        error: for `sparsediff calibrate`: relative L1 error of a call's output against dense attention that the skips
            so far may cause, in the middle third of the steps (published: 0.075) ...
        error_spread: ... the first third gets this much less, the last this much more (published: 0.01).

    A calibration holds a threshold for each step and layer, which then take the place of `threshold`.

    Mended against the published code: state is reset at every generation and kept apart per guidance branch (there,
    a second video inherited the first one's skips), is a bitmap (there, int32 lists of 13 GB for Wan 14B), and text
    rows and columns never take part.
    """

    name: ClassVar[str] = "lite_attention"
    summary: ClassVar[str] = (
        "tiles found negligible at one step are skipped at the next; needs no calibration"
    )
    citation: ClassVar[str] = "arXiv:2511.11062"

    threshold: float = -10.0
    tile: tuple[int, int] = (128, 128)
    visiting_order: VisitingOrder = "descending"
    must_keep: Ranges = ()
    must_skip: Ranges = ()
    error: float = 0.075
    error_spread: float = 0.01

    tensor_names: ClassVar[tuple[str, ...]] = ("thresholds",)
    superseded: ClassVar[frozenset[str]] = frozenset({"threshold"})
    needs_calibration: ClassVar[bool] = False
    bound_to_grid: ClassVar[bool] = False
    run_time: ClassVar[frozenset[str]] = frozenset({"threshold", "must_keep", "must_skip"})

    def __post_init__(self) -> None:
        self._require(
            "threshold",
            float,
            lambda x: x < 0,
            "a number of log2 units below 0 (published: -10; -3 is aggressive)",
        )
        self._require(
            "tile",
            tuple,
            lambda x: len(x) == 2 and all(isinstance(n, int) and n >= 16 for n in x),
            "two sizes >= 16, such as (128, 128)",
        )
        self._require(
            "visiting_order",
            str,
            lambda x: x in get_args(VisitingOrder),
            f"one of {', '.join(get_args(VisitingOrder))}",
        )
        for name in ("must_keep", "must_skip"):
            self._require(
                name,
                tuple,
                lambda x: all(
                    isinstance(r, tuple)
                    and len(r) == 2
                    and all(isinstance(n, int) for n in r)
                    and 0 <= r[0] < r[1]
                    for r in x
                ),
                "ranges of tokens such as ((0, 128), (512, 640))",
            )
        self._require("error", float, lambda x: x > 0, "above 0")
        self._require("error_spread", float, lambda x: 0 <= x < self.error, "in [0, error)")

    def block_size(self, grid: TokenGrid) -> tuple[int, int]:
        """The tile, whatever the grid."""
        return self.tile

    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """Everything but `must_skip`: the first call of a generation visits all tiles, later ones what its vote left."""
        (batch, tokens, heads, _), (bq, bk) = query.shape, self.tile
        columns = -(-key.shape[1] // bk)
        shape, skipped = (batch, heads, -(-tokens // bq), columns), 0
        keep = torch.ones(shape, dtype=torch.bool, device=query.device)
        for start, stop in _union(self.must_skip):
            first = -(-start // bk)
            # A last tile is whole although it is short.
            last = columns if stop >= key.shape[1] else stop // bk
            keep[..., first:last] = False
            skipped += max(0, last - first)
        if skipped == columns:
            raise ValueError(f"must_skip={self.must_skip} leaves none of {key.shape[1]} tokens")
        return keep

    def always(self, grid: TokenGrid) -> Tensor | None:
        """`must_keep` as blocks, `bool [Mq, Nk]`, or None."""
        if not self.must_keep:
            return None
        bq, bk = self.tile
        keep = torch.zeros(-(-grid.num_queries // bq), -(-grid.num_tokens // bk), dtype=torch.bool)
        asking = grid.num_tokens - grid.num_queries  # the first token that does
        for start, stop in self.must_keep:
            keep[max(0, start - asking) // bq : -(-max(0, stop - asking) // bq)] = True
            keep[:, start // bk : -(-stop // bk)] = True
        return keep

    def vote_threshold(self, site: AttentionSite) -> float:
        """`threshold`, or what was calibrated for this layer at this point of the run."""
        if self.calibration is None:
            return self.threshold
        steps = len(self.calibration.tensors["thresholds"])
        at = site.step if site.num_steps is None else site.step * steps // site.num_steps
        return _thresholds(self.calibration)[min(at, steps - 1)][self.calibration.row(site.name)]

    def visits(self, site: AttentionSite) -> Visits:
        """`visiting_order` at this step."""
        if self.visiting_order == "alternate":
            return "ascending" if site.step % 2 else "descending"
        return self.visiting_order

    def calibrator(self, layout: ModelLayout) -> Calibrator:
        """One pass: at every call the threshold whose skips change the output by as much as the step allows."""
        return _LiteCalibrator(self, layout)


def _union(ranges: Ranges) -> list[tuple[int, int]]:
    """The same tokens in ranges that neither touch nor overlap."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


@per_calibration
def _thresholds(calibration) -> list[list[float]]:
    return calibration.tensors["thresholds"].tolist()


def error_target(step: int, num_steps: int, error: float, spread: float) -> float:
    """Three equal stretches of the run with rising targets: early errors have the longest to grow (section 3.4)."""
    return error + spread * (min(2, 3 * step // num_steps) - 1)


class _LiteCalibrator(Calibrator):
    def __init__(self, method: LiteAttention, layout: ModelLayout) -> None:
        self.method, self.layers = method, {name: i for i, name in enumerate(layout.layers)}
        self.found: dict[int, Tensor] = {}  # step -> float32 [layers]
        self.steps = 0
        self.masks: dict[tuple[str, str], Tensor] = {}  # bitmaps, by branch and layer

    def begin_generation(self, number: int) -> None:
        """Masks start from everything."""
        super().begin_generation(number)
        self.masks.clear()

    def attend(self, call: Call) -> Tensor:
        """The output under this step's mask; searches the threshold that makes the next."""
        site, method = call.site, self.method
        if call.sparse is None:
            return call.dense()
        if site.num_steps is None:
            raise ValueError("calibration needs the number of steps: give calibrate() a pipeline")
        key, blocks = (site.branch, site.name), -(-call.key.shape[1] // method.tile[1])
        forced = forced_blocks(site.grid, method.tile, device=call.query.device)
        if (always := method.always(site.grid)) is not None:
            forced |= always.to(forced.device)
        if key not in self.masks:
            self.masks[key] = pack_bits(method.keep_blocks(call.query, call.key, site) | forced)
        tokens = (call.query.shape[1], call.key.shape[1])
        # Padding is hidden behind a length, which kernels take with ascending lists only.
        visits = "descending" if site.kv_lengths is not None else method.visits(site)

        def run(keep: Tensor, threshold: float | None = None):
            mask = BlockMask.from_dense(keep, method.tile, tokens, visits=visits)
            return attend_blocks(
                call.query,
                call.key,
                call.value,
                mask,
                scale=call.scale,
                kv_lengths=site.kv_lengths,
                vote_threshold=threshold,
            )

        now = unpack_bits(self.masks[key], blocks)
        out, exact = run(now).out, call.dense()
        target = error_target(site.step, site.num_steps, method.error, method.error_spread)
        low, high, best = LOWEST, HIGHEST, (LOWEST, now)
        for _ in range(PROBES):
            middle = (low + high) / 2
            keep = run(now, middle).vote | forced
            error = relative_error(run(keep).out, exact, 1).item()
            if not error <= target:
                high = middle
                continue
            low, best = middle, (middle, keep)
            if error > 0.9 * target:
                break
        threshold, self.masks[key] = best[0], pack_bits(best[1])
        self.steps = site.num_steps
        row = self.found.setdefault(site.step, torch.full((len(self.layers),), torch.inf))
        # The most cautious of all branches and prompts.
        row[self.layers[site.name]] = min(row[self.layers[site.name]].item(), threshold)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """`thresholds` `float32 [steps, L]`, log2 units; a call not met takes its layer's nearest step, or the default."""
        thresholds = torch.full((self.steps, len(self.layers)), self.method.threshold)
        for layer in range(len(self.layers)):
            met = [i for i, row in self.found.items() if row[layer].isfinite()]
            for step in range(self.steps) if met else ():
                nearest = min(met, key=lambda i: abs(i - step))
                thresholds[step, layer] = self.found[nearest][layer]
        return {"thresholds": thresholds}

    def state(self) -> dict[str, object]:
        """What was found."""
        return {"found": self.found, "steps": self.steps}

    def load_state(self, state: dict[str, object]) -> None:
        """Go on."""
        self.found, self.steps = state["found"], state["steps"]
