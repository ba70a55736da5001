"""What a published way of choosing blocks must say about itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from torch import Tensor

from sparsediff.calibration import Calibration, Calibrator, ModelLayout, step_bin
from sparsediff.kernels.block_lists import Visits
from sparsediff.schedule import Schedule
from sparsediff.token_grid import TokenGrid, TokenOrder

SHORT_SEQUENCE = 16_384  # tokens
BLOCKS = (32, 64, 128)  # tokens


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """Where in a generation one attention call stands.

    Attributes:
        name: of the layer, as `component.module`.
        layer: index among the eligible attention layers of this transformer, in execution order.
        num_layers: how many there are.
        step: denoising step, from 0.
        num_steps: steps of this generation; None for a bare transformer whose caller has not said.
        sigma: noise level in [0, 1], as `sparsediff.noise_level` defines it; None if unknown.
        later_sigmas: noise levels of the steps after this one; empty if unknown or if this is the last.
        scale: of the logits, where the model's differs from `1 / sqrt(D)`.
        branch: classifier-free guidance branch (`"cond"`, `"uncond"`, ... as the pipeline names it).
        grid: the tokens of this call.
        kv_lengths: `int32 [B]`, keys at or past it are padding and take no part; None if there is none.
        visible: `bool [B|1, H|1, Mq, Nk]`, the blocks that the model's own mask shows; None if it shows all.
        score_bar: `float32 [B]`, the score from which a block is kept where all layers share one budget; None if no
            scores have been sampled yet.
    """

    layer: int
    num_layers: int
    step: int
    num_steps: int | None
    sigma: float | None
    branch: str
    grid: TokenGrid
    visible: Tensor | None = field(default=None, repr=False, compare=False)
    later_sigmas: tuple[float, ...] = ()
    scale: float | None = None
    name: str = ""
    kv_lengths: Tensor | None = field(default=None, compare=False, repr=False)
    score_bar: Tensor | None = field(default=None, compare=False, repr=False)

    def passed(self, shares: Sequence[float], since: int) -> bool:
        """Whether one of these shares of the steps has come after step `since`; not if nobody knows how many there are."""
        if self.num_steps is None:
            return False
        return any(since < round(share * self.num_steps) <= self.step for share in shares)

    def comes_before(self, shares: Sequence[float]) -> bool:
        """Whether one of these shares of the steps is still to come; not if nobody knows how many there are."""
        if self.num_steps is None:
            return False
        return any(self.step < round(share * self.num_steps) < self.num_steps for share in shares)

    def next_step(self) -> AttentionSite | None:
        """The same call one step later; None if nobody knows whether there is one."""
        if not self.later_sigmas:
            return None
        sigma, *later = self.later_sigmas
        return replace(self, step=self.step + 1, sigma=sigma, later_sigmas=tuple(later))


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to choose which KV blocks each query block reads.

    Subclasses are frozen dataclasses: the fields are the paper's parameters under the paper's names, and nothing else
    is stored.  What has to be remembered between calls lives in `RunState`.  To add one: subclass, list it in
    `sparsediff.methods.METHODS`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]

    # What the method needs of a video, in words that follow its name; empty if any sequence will do.
    needs_video: ClassVar[str] = ""
    # Whether the last dense step of the schedule already chooses the blocks of the next one.
    looks_ahead: ClassVar[bool] = False
    # The attention kernel, by name; "auto" takes the best exact one.
    backend: ClassVar[str] = "auto"

    @property
    def needs_step_count(self) -> bool:
        """Whether it must know how many steps a generation has, which a bare transformer cannot tell."""
        return False

    @property
    def shared_density(self) -> float | None:
        """The share of the blocks of all layers together that is kept; None: every layer has a budget of its own.

        The scores of all layers are needed before the first of them is served, so they are sampled (`sample_scores`) one
        step before blocks are chosen.
        """
        return None

    def sample_scores(self, query: Tensor, key: Tensor, site: AttentionSite) -> tuple[Tensor, int]:
        """For a `shared_density`: what some rows of blocks of this call score, `float32 [B, n]`, and how many each stands for.

        `query`, `key` are in the model's own order.
        """
        raise NotImplementedError

    @abstractmethod
    def block_size(self, grid: TokenGrid) -> tuple[int, int]:
        """`(query, key/value)` tokens a block."""

    @abstractmethod
    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """Choose blocks afresh: `bool [B|1, H|1, Mq, Nk]`.

        `query`, `key` are `[B, S, H, D]` after RoPE and after `order`; `lse` is `float [B, H, S]` of the same rows, of
        this call (after a dense search) or of an earlier one (`keeps_lse`), if that was kept.  Must not read anything back to the
        host.  The caller adds what must stay: text rows and columns.  A row without any block gives zeros.
        """

    def for_text(self) -> Method:
        """What runs in place of the method on a language model: itself, if it can.

        Raises:
            ValueError: it cannot; the message says why, and what can.
        """
        if self.needs_video:
            raise ValueError(
                f"{self.name} {self.needs_video}, and a language model has no video; use 'sparse_d'"
            )
        return self

    def refreshes(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """Whether to call `keep_blocks` now; `last_refresh` is the step of the last time in this generation."""
        return last_refresh is None

    def searches_dense(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """Whether a call that chooses blocks is itself dense: exact output, `lse` for `keep_blocks`, mask from then on."""
        return False

    def keeps_lse(self, site: AttentionSite) -> bool:
        """Whether a later search of this run would have the log-sum-exp of a dense one, made here or before.

        It is kept only while it is small (`sparsediff.slot`); `keep_blocks` finds its own without.
        """
        return False

    def vote_threshold(self, site: AttentionSite) -> float | None:
        """Log2 threshold of the in-kernel vote that thins the mask for the next step; None: the mask stays."""
        return None

    def visits(self, site: AttentionSite) -> Visits:
        """The order in which the kernel visits the blocks of a row; the vote depends on it, and nothing else."""
        return "descending"

    def order(self, site: AttentionSite) -> TokenOrder | None:
        """Which tokens share a block, in all heads or in each; None keeps the sequence as it is.

        A mask belongs to its order: where a layer's order changes in mid-run, its blocks are chosen afresh.
        """
        return None

    def choose_windows(
        self, query: Tensor, key: Tensor, site: AttentionSite, lse: Tensor | None
    ) -> Tensor:
        """For an `order` of several windows without heads: the window of each head, `int32 [B, H]`.

        Asked where blocks are chosen.  `query`, `key`, `lse` are in the model's own order.
        """
        raise NotImplementedError

    def always(self, grid: TokenGrid) -> Tensor | None:
        """Blocks that the method keeps beside what every method must, at every step: `bool [Mq, Nk]` on the CPU.

        Rows are blocks of the tokens that ask (`grid.num_queries`, the last of the sequence).
        """
        return None

    def default_schedule(self) -> Schedule:
        """The published choice of dense steps and layers."""
        return Schedule()

    def parameters(self) -> dict[str, object]:
        """Field names and values, for reports."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.repr}

    def _require(
        self,
        name: str,
        kind: type,
        accept: Callable[[object], bool] | None = None,
        what: str | None = None,
    ) -> None:
        """Refuse a field whose type or value is not `what`; a bool is no number, nor is what is not finite."""
        value = getattr(self, name)
        kinds = (int, float) if kind is float else (kind,)
        fits = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
        fits = fits and _is_finite(value)
        if not fits or (accept is not None and not accept(value)):
            what = what or ("True or False" if kind is bool else f"of type {kind.__name__}")
            raise ValueError(f"{name} must be {what}, got {value!r}")

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.parameters().items())
        return f"{self.name}({inside})"


class SquareBlockMethod(Method):
    """A method of square blocks whose field `block` may be None: then their size goes by the length of the sequence.

    64 tokens leave more to choose from where blocks are few; beyond 16,384 tokens 128 do, and masks of 64 would take
    four times the memory.
    """

    block: int | None

    def block_size(self, grid: TokenGrid) -> tuple[int, int]:
        """`block` tokens of both sides."""
        return (self.block or (64 if grid.num_tokens <= SHORT_SEQUENCE else 128),) * 2

    def _require_block(self) -> None:
        if self.block is not None:
            self._require("block", int, lambda x: x in BLOCKS, "32, 64, 128 or None")


@dataclass(frozen=True, kw_only=True)
class CalibratedMethod(Method):
    """A method that measures something beforehand.

    Attributes:
        calibration: what was measured; `enable(..., calibration=...)` puts it here.
    """

    # Whether it cannot run without, and whether what it measures only fits tokens of the size it was measured on.
    needs_calibration: ClassVar[bool] = True
    bound_to_grid: ClassVar[bool] = True
    # Parameters on which the measurements do not depend, and those whose place they take.
    run_time: ClassVar[frozenset[str]] = frozenset()
    superseded: ClassVar[frozenset[str]] = frozenset()
    # What a run looks up in the calibration.
    tensor_names: ClassVar[tuple[str, ...]] = ()

    calibration: Calibration | None = field(default=None, repr=False, compare=False)

    @property
    def needs_step_count(self) -> bool:
        """What was measured belongs to places in a run."""
        return self.calibration is not None

    @abstractmethod
    def calibrator(self, layout: ModelLayout) -> Calibrator:
        """A fresh observer for `sparsediff.calibrate`."""

    def calibrated(
        self, calibration: Calibration, given: Collection[str] | None = None
    ) -> CalibratedMethod:
        """The same method with a calibration; a parameter that nobody set is what it was when measured.

        Args:
            calibration: of this method.
            given: parameters that were set by name; None: those that differ from their defaults.

        Raises:
            ValueError: it was measured for another method or with another value of a parameter, or is incomplete.
        """
        calibration.check_method(self.name)
        calibration.check_tensors(self.tensor_names)
        changes = {}
        for f in fields(self):
            if not f.repr or f.name not in calibration.parameters:
                continue
            mine, measured = getattr(self, f.name), calibration.parameters[f.name]
            is_given = mine != f.default if given is None else f.name in given
            if not is_given:
                changes[f.name] = measured
            elif f.name in self.superseded and (given is not None or mine != measured):
                raise ValueError(
                    f"{f.name}={mine!r} contradicts a {self.name} calibration, which brings its own for each step and "
                    f"layer; leave {f.name} out, or leave the calibration out"
                )
            elif mine != measured and f.name not in self.run_time:
                raise ValueError(
                    f"{f.name}={mine!r} contradicts this {self.name} calibration, measured with "
                    f"{f.name}={measured!r}; leave {f.name} out, or calibrate again"
                )
        return replace(self, calibration=calibration, **changes)


class StaticMethod(CalibratedMethod):
    """A method whose masks were all measured beforehand, for equal stretches of the run.

    The last of its `tensor_names` has the stretches as its first dimension.
    """

    def refreshes(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """At the start of every stretch."""
        here = self._bin(site.step, site)
        return last_refresh is None or self._bin(last_refresh, site) != here

    def _bin(self, step: int, site: AttentionSite) -> int:
        bins = len(self.calibration.tensors[self.tensor_names[-1]])
        return step_bin(step, site.num_steps, bins)


def _is_finite(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def uncalibrated(method: Method) -> Method:
    """The same method without what was measured for it."""
    return replace(method, calibration=None) if isinstance(method, CalibratedMethod) else method
