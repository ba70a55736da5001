"""Captured masks against masks known beforehand, through a real Wan pipeline at a tiny random size."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsediff
from sparsediff import Auto, LiteAttention, Schedule, Segment, TokenGrid, TokenOrder
from sparsediff.api import watch
from sparsediff.block_mask import pack_bits
from sparsediff.eval.capture import Capture, CapturedCall, capture
from sparsediff.methods import Method
from sparsediff.pipelines.wan import WanAdapter
from sparsediff.testing import random_wan_pipeline

WINDOWS = ((1, 8, 8), (3, 5, 7))  # the second divides no grid
LAYERS = ("transformer.blocks.0.attn1", "transformer.blocks.1.attn1")


@dataclass(frozen=True, kw_only=True)
class Banded(Method):
    """Known beforehand: head `h` keeps the `h + 1` key blocks from the diagonal on, cyclically."""

    name: ClassVar[str] = "banded"
    summary: ClassVar[str] = "for tests"
    citation: ClassVar[str] = "none"

    block: tuple[int, int] = (64, 64)
    reorder: bool = False

    def block_size(self, grid):
        return self.block

    def order(self, site):
        return TokenOrder.per_head(WINDOWS) if self.reorder else None

    def keep_blocks(self, query, key, site, *, lse=None):
        return band(-(-query.shape[1] // self.block[0]), -(-key.shape[1] // self.block[1]))


def band(rows, columns, heads=2):
    distance = (torch.arange(columns) - torch.arange(rows)[:, None]) % columns
    return torch.stack([distance <= head for head in range(heads)])[None]


def generate(pipe, *, steps=3, **changes):
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 128, "width": 128, "num_frames": 17, **changes}
    return pipe(
        "a small red circle moves left",
        num_inference_steps=steps,
        guidance_scale=3.0,
        max_sequence_length=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **call,
    ).frames


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    return random_wan_pipeline()


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("width", [128, 112])  # 320 tokens, and 280: the last block is ragged
def test_masks_are_those_the_method_chose(pipe, reorder, width):
    method, schedule = Banded(reorder=reorder), Schedule(dense_steps=1)
    with (
        sparsediff.enable(pipe, method, schedule=schedule) as handle,
        capture(handle) as seen,
    ):
        generate(pipe, width=width)
    assert seen.complete
    assert len(seen.calls) == 2 * 2 * 3  # layers, branches, steps
    for call in seen.calls:
        assert (call.dense_reason is None) == (call.step > 0)
        keep = torch.ones(1, 2, 5, 5).bool() if call.step == 0 else band(5, 5)
        assert torch.equal(call.keep(), keep)
        assert call.windows == (WINDOWS if reorder and call.step else ())
        assert (call.num_steps, call.heads) == (3, (0, 1))
    report = handle.report()
    by_hand = sum(float(call.density().mean()) for call in seen.calls) / len(seen.calls)
    assert by_hand == pytest.approx(report.density, abs=1e-6)


def test_watching_changes_nothing(pipe):
    with sparsediff.enable(pipe, Auto(block=64, density=0.4)) as handle:
        alone = generate(pipe)
        with capture(handle, scores=True):
            assert torch.equal(generate(pipe), alone)
        assert all(state.witness is None for state in handle.states)
        assert torch.equal(generate(pipe), alone)


def test_layers_of_two_experts_are_numbered_through(monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    pipe = random_wan_pipeline("t2v-2.2")
    with (
        sparsediff.enable(pipe, Banded(), schedule=Schedule()) as handle,
        capture(handle, layers=[1, -1]) as seen,
    ):
        generate(pipe)
    names = {call.layer for call in seen.calls}
    assert names == {LAYERS[1], "transformer_2.blocks.1.attn1"}


def test_an_observer_may_be_watched_too(pipe):
    """Measuring goes through an observer; a capture of it has the dense calls as well."""

    def look(call):
        return call.sparse()[0] if call.sparse else call.dense()

    schedule = Schedule(dense_steps=1)
    with watch(pipe, look, method=Banded(), schedule=schedule) as handle, capture(handle) as seen:
        generate(pipe)
    assert [call.step for call in seen.calls if call.dense_reason] == [0] * 4
    assert len(seen.calls) == 12


def test_a_vote_does_not_change_what_was_captured(pipe):
    """LiteAttention overwrites its bitmap right after the call: the first one read everything."""
    method = LiteAttention(tile=(64, 32), threshold=-0.5)
    with sparsediff.enable(pipe, method) as handle, capture(handle) as seen:
        generate(pipe)
        report = handle.report()
    assert all(call.keep().all() for call in seen.find(step=0))
    assert not all(call.keep().all() for call in seen.find(step=2))
    for step in report.steps:
        here = [float(call.density().mean()) for call in seen.find(step=step.step)]
        assert sum(here) / len(here) == pytest.approx(step.density, abs=1e-6)


def test_choices_and_the_file(pipe, tmp_path):
    with sparsediff.enable(pipe, Auto(block=64, density=0.4)) as handle:
        with capture(handle, layers=[-1], steps=[0, -1], heads=[1], branches=["cond"]) as seen:
            generate(pipe, steps=4)
        assert [(c.layer, c.step, c.branch, c.heads) for c in seen.calls] == [
            (LAYERS[1], 0, "cond", (1,)),
            (LAYERS[1], 3, "cond", (1,)),
        ]
        with capture(handle, layers=[LAYERS[0]], scores=True) as seen:
            generate(pipe)
    seen.save(tmp_path / "sub" / "masks.safetensors")
    loaded = Capture.load(tmp_path / "sub" / "masks.safetensors")
    assert loaded.about == seen.about
    assert loaded.about["method"].startswith("auto(density=0.4")
    assert len(loaded.calls) == len(seen.calls) == 6
    for a, b in zip(loaded.calls, seen.calls, strict=True):
        for name in CapturedCall.__dataclass_fields__:
            x, y = getattr(a, name), getattr(b, name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


def test_equal_masks_are_held_once(pipe):
    with sparsediff.enable(pipe, Banded(), schedule=Schedule()) as handle:
        with capture(handle) as short:
            generate(pipe, steps=1)
        with capture(handle) as long:
            generate(pipe, steps=4)
    assert len(long.calls) == 4 * len(short.calls)
    assert long.nbytes == short.nbytes == 2 * 5  # heads x rows, one byte a row


def test_scores_are_the_softmax_mass(pipe):
    """Rows sum to one, and what a mask keeps of them is less than all."""
    with (
        sparsediff.enable(pipe, Banded(reorder=True), schedule=Schedule()) as handle,
        capture(handle, scores=True, heads=[1]) as seen,
    ):
        generate(pipe, width=112)
    for call in seen.calls:
        assert call.mass.shape == (1, 1, 5, 5)
        assert torch.allclose(call.mass.float().sum(-1), torch.ones(1, 1, 5), atol=2e-3)
        rows = torch.tensor([64.0, 64, 64, 64, 24]) / 280
        by_hand = ((call.mass.float() * band(5, 5)[:, 1:]).sum(-1) * rows).sum(-1)
        assert torch.allclose(call.kept_mass(), by_hand, atol=1e-6)
        assert (call.kept_mass() < 0.999).all()


def test_a_second_generation_replaces_the_first(pipe):
    with (
        sparsediff.enable(pipe, Banded(), schedule=Schedule()) as handle,
        capture(handle) as seen,
    ):
        generate(pipe, steps=4)
        generate(pipe, steps=2)
    assert {call.step for call in seen.calls} == {0, 1}


def test_text_is_attended_by_all_and_mapped(pipe, monkeypatch):
    """The last latent frame plays text in front."""
    real = WanAdapter.token_grid

    def with_text(self, model, arguments):
        f, h, w = real(self, model, arguments).shape
        grid = Segment(role="grid", length=(f - 1) * h * w, shape=(f - 1, h, w))
        return TokenGrid((Segment(role="text", length=h * w), grid))

    monkeypatch.setattr(WanAdapter, "token_grid", with_text)
    with (
        sparsediff.enable(pipe, Banded(reorder=True), schedule=Schedule()) as handle,
        capture(handle, layers=[0], steps=[0]) as seen,
    ):
        generate(pipe)
    call = seen.calls[0]
    # Head 0 walks 8 x 8 windows: a block is a frame.  It reads itself and the text.
    expected = torch.zeros(4, 8, 8, dtype=torch.bool)
    expected[2] = True
    assert torch.equal(call.attended_patch((2, 3, 3), 0), expected)
    token = 64 + 2 * 64
    attended = call.attended(token, 0)
    assert attended[:64].all(), "text stays"
    assert attended.sum() == 128
    assert call.attended(0, 0).all(), "text reads everything"
    with pytest.raises(ValueError, match=r"patch \(4, 0, 0\) lies outside"):
        call.attended_patch((4, 0, 0), 0)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    window=st.sampled_from([(1, 2, 2), (2, 1, 3), "HWF", (4, 4, 4)]),
    text=st.integers(0, 5),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_tokens_of_blocks_agree_with_reordered_attention(shape, window, text, block, seed):
    """What a token reads, block by block, is what a token-level mask in the new order says, brought back."""
    grid, order = TokenGrid.video(*shape, text=text), TokenOrder((window,))
    tokens = grid.num_tokens
    keep = torch.rand(
        1, 1, -(-tokens // block[0]), -(-tokens // block[1]),
        generator=torch.Generator().manual_seed(seed),
    ) > 0.5  # fmt: skip
    call = CapturedCall(
        layer="l", step=0, num_steps=1, sigma=None, branch="", grid=grid, block_size=block,
        dense_reason=None, heads=(0,), windows=(window,),
        head_windows=torch.zeros(1, 1, dtype=torch.uint8), bitmap=pack_bits(keep),
    )  # fmt: skip
    walk = order.permutation(grid)[0].long()
    fine = keep[0, 0].repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    fine = fine[:tokens, :tokens]
    natural = torch.zeros(tokens, tokens, dtype=torch.bool)
    natural[walk[:, None], walk[None]] = fine
    for token in range(tokens):
        assert torch.equal(call.attended(token, 0), natural[token])


def test_what_cannot_be_captured_is_refused(pipe):
    handle = sparsediff.enable(pipe, Banded(), schedule=Schedule())
    for choice, message in {
        (("layers", (2,)),): "no attention layer 2; there are 2",
        (("layers", ("blocks.0",)),): "no attention layer 'blocks.0'",
    }.items():
        with pytest.raises(ValueError, match=message), capture(handle, **dict(choice)):
            pass
    with pytest.raises(ValueError, match="heads 0 to 1"), capture(handle, heads=[2]):
        generate(pipe)
    with pytest.raises(ValueError, match="captured already"), capture(handle), capture(handle):
        pass
    assert all(state.witness is None for state in handle.states)
    handle.disable()
    with pytest.raises(ValueError, match="handle is disabled"), capture(handle):
        pass


def test_memory_is_bounded(pipe):
    with sparsediff.enable(pipe, Auto(block=64, refresh=1)) as handle:
        with (
            pytest.raises(ValueError, match=r"takes at least .* MiB.*choose fewer layers="),
            capture(handle, scores=True, max_bytes=500),
        ):
            generate(pipe)
        with (
            pytest.warns(RuntimeWarning, match=r"stopped at step 2.*choose fewer layers="),
            capture(handle, scores=True, max_bytes=2 * 2 * 2 * 5 * 5 * 3 + 100) as seen,
        ):
            generate(pipe)
    assert not seen.complete
    assert seen.calls
    assert seen.nbytes <= 700


def test_nothing_captured_and_foreign_files(pipe, tmp_path):
    from safetensors.torch import save_file

    with sparsediff.enable(pipe, Banded()) as handle, capture(handle, steps=[9]) as seen:
        generate(pipe)
    with pytest.raises(ValueError, match="nothing was captured"):
        seen.save(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name in ("other", "junk"):
        with pytest.raises(ValueError, match="is no mask capture"):
            Capture.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(OSError, match="nowhere"):
        Capture.load(tmp_path / "nowhere.safetensors")
