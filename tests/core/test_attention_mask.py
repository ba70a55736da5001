"""Reading a model's own mask, against looking at every block."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsediff.attention_mask import MaskReader, read_mask


@st.composite
def masks(draw):
    """Whole blocks of 4 x 3 tokens, some hidden, the last ones cut off; every query sees something."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    blocks = torch.tensor(
        draw(
            st.lists(
                st.lists(st.booleans(), min_size=columns, max_size=columns).filter(any),
                min_size=rows,
                max_size=rows,
            )
        )
    )
    queries = (rows - 1) * 4 + draw(st.integers(2, 4))  # of one row a mask may mean all queries
    keys = (columns - 1) * 3 + draw(st.integers(1, 3))
    seen = blocks.repeat_interleave(4, 0).repeat_interleave(3, 1)[:queries, :keys]
    return blocks, seen


@pytest.mark.parametrize("form", ["bool", "additive", "-inf"])
@given(masks())
def test_whole_blocks_are_read_back(form, case):
    blocks, seen = case
    mask = seen
    if form != "bool":
        hidden = -torch.inf if form == "-inf" else torch.finfo(torch.bfloat16).min
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, hidden)
    visible = read_mask(mask[None, None], (4, 3))
    last = int(seen.any(0).nonzero().max()) + 1
    assert visible.keys == last
    if seen[:, :last].all():
        assert visible.blocks is None
    else:
        assert torch.equal(visible.blocks, blocks[None, None, :, : -(-last // 3)])


@given(masks(), st.data())
def test_a_mask_that_cuts_a_block_is_refused(case, data):
    _, seen = case
    row = data.draw(st.integers(0, seen.shape[0] - 1))
    column = data.draw(st.integers(0, seen.shape[1] - 1))
    mask = seen.clone()
    mask[row, column] = ~mask[row, column]
    if not mask.any(-1).all():
        with pytest.raises(ValueError, match="hides all keys"):
            read_mask(mask, (4, 3))
        return
    # what it shows, spread over whole blocks, is not the mask
    try:
        visible = read_mask(mask, (4, 3))
    except ValueError:
        return
    assert visible.keys == int(mask.any(0).nonzero().max()) + 1
    blocks = torch.ones(1, 1) if visible.blocks is None else visible.blocks[0, 0].float()
    shown = blocks.repeat_interleave(4, 0).repeat_interleave(3, 1).bool()
    inside = mask[:, : visible.keys]
    assert torch.equal(
        shown.expand(inside.shape)
        if visible.blocks is None
        else shown[: len(inside), : visible.keys],
        inside,
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "weighs keys"),
        (torch.tensor([[True, False, True]])[None, None], "gaps"),
        (torch.tensor([[True, True], [False, False]]), "hides all keys from some"),
        (torch.ones(6, 6, dtype=torch.bool).tril(), "cuts through blocks of 4 x 3"),
    ],
)
def test_what_blocks_cannot_say_is_named(mask, message):
    with pytest.raises(ValueError, match=message):
        read_mask(mask, (4, 3))


def test_a_reader_gives_equal_masks_the_same_blocks():
    """Layers tell by identity, without waiting for the device, whether they see what they saw before."""
    reader = MaskReader()
    causal = torch.ones(8, 8).tril().bool().repeat_interleave(4, 0).repeat_interleave(4, 1)
    first = reader.read(causal[None, None], (4, 4))
    other = reader.read(causal[None, None, :, :24], (4, 4))
    reader.forget()
    again = reader.read(causal[None, None].clone(), (4, 4))
    assert again.blocks is first.blocks
    assert again.blocks is not other.blocks
    coarser = reader.read(causal[None, None], (8, 4))
    assert "cuts through blocks" in coarser


def test_a_reader_looks_once_a_forward(monkeypatch):
    """Two masks that layers use in turns are read twice in all; the same tensor in the next forward is read anew."""
    from sparsediff import attention_mask

    looked, real = [], attention_mask.read_mask
    monkeypatch.setattr(
        attention_mask, "read_mask", lambda *args: looked.append(args) or real(*args)
    )
    reader, full = MaskReader(), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    shorter = full.clone()
    shorter[..., 6:] = False
    for _ in range(3):
        assert reader.read(full, (4, 4)).keys == 8
        assert reader.read(shorter, (4, 4)).keys == 6
    assert len(looked) == 2
    reader.forget()
    shorter[..., 4:] = False
    assert reader.read(shorter, (4, 4)).keys == 4
