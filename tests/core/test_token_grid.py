"""Geometry of tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsediff import Segment, TokenGrid, TokenOrder

sizes = st.integers(1, 7)


@st.composite
def grids(draw):
    return TokenGrid.video(
        draw(sizes),
        draw(sizes),
        draw(sizes),
        text=draw(st.integers(0, 9)),
        text_first=draw(st.booleans()),
    )


orders = st.lists(st.tuples(sizes, sizes, sizes), min_size=1, max_size=3).map(TokenOrder.per_head)


@given(grids(), orders)
def test_an_order_is_a_permutation_and_undoes_itself(grid, order):
    n = grid.num_tokens
    forward, back = order.permutation(grid), order.inverse(grid)
    for there, home in zip(forward, back, strict=True):
        assert there.dtype == home.dtype == torch.int32
        assert torch.equal(there.sort().values, torch.arange(n, dtype=torch.int32))
        assert torch.equal(there[home], torch.arange(n, dtype=torch.int32))
    x, y, z = torch.randn(3, 2, n, len(order.heads), 3, generator=torch.Generator().manual_seed(0))
    moved = order.apply(grid, x, y, z)
    for head, window in enumerate(order.heads):
        assert torch.equal(moved[1][:, :, head], y[:, forward[window], head])
    assert all(map(torch.equal, order.undo(grid, *moved), (x, y, z)))


def test_heads_share_the_permutation_of_a_window():
    order = TokenOrder.per_head([(1, 2, 2), (4, 1, 1), (1, 2, 2), (1, 2, 2)])
    assert order.windows == ((1, 2, 2), (4, 1, 1))
    assert order.heads == (0, 1, 0, 0)
    assert order.permutation(TokenGrid.video(4, 4, 4, text=3)).shape == (2, 67)
    assert TokenOrder.single(1, 2, 2).heads is None


@given(grids(), orders)
def test_the_grid_comes_first_and_text_keeps_its_order(grid, order):
    start, stop = grid.grid_span
    text = [i for i in range(grid.num_tokens) if not start <= i < stop]
    for there in order.permutation(grid):
        assert there[stop - start :].tolist() == text


def test_draft_attentions_published_permutation():
    """new = f*h*w + (y // 8)*8*w + (x // 16)*128 + (y % 8)*16 + x % 16, with text after the video in its place."""
    f, h, w = 2, 16, 32
    grid = TokenGrid.video(f, h, w, text=10)
    home = TokenOrder.single(1, 8, 16).inverse(grid)[0]
    for (frame, y, x), new in zip(grid.coordinates().tolist(), home.tolist(), strict=True):
        if frame >= 0:
            assert new == frame * h * w + (y // 8) * 8 * w + (x // 16) * 128 + (y % 8) * 16 + x % 16
    assert home[f * h * w :].tolist() == list(range(f * h * w, f * h * w + 10))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_whole_windows_are_blocks(f, h, w):
    """Where the window divides the grid, every run of its size is one box of the grid."""
    window = (2, 4, 4)
    grid = TokenGrid.video(f * 2, h * 4, w * 4)
    where = grid.coordinates()[TokenOrder((window,)).permutation(grid)[0]]
    for block in where.split(32):
        low, high = block.min(0).values, block.max(0).values
        assert (high - low + 1).tolist() == list(window)


@given(grids(), orders)
def test_neighbours_in_ragged_orders_stay_close(grid, order):
    """The walk over windows turns round at the edges instead of jumping across the grid."""
    (frames, _, width), window = grid.shape, order.windows[0]
    order = TokenOrder((window,))
    if all(n % w == 0 for n, w in zip(grid.shape, window, strict=True)):
        return
    start, stop = grid.grid_span
    where = grid.coordinates()[order.permutation(grid)[0][: stop - start]]
    step = (where[1:] - where[:-1]).abs().amax(0) if len(where) > 1 else torch.zeros(3)
    assert step[0] < 2 * window[0] or frames <= window[0]
    assert step[2] < 2 * window[2] or width <= window[2]


def test_coordinates_run_fastest_along_the_width():
    grid = TokenGrid.video(2, 1, 3, text=1)
    assert grid.coordinates().tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 0, 2], [1, 0, 0], [1, 0, 1], [1, 0, 2], [-1, -1, -1],
    ]  # fmt: skip


def test_grids_differ_with_the_meaning_of_a_position():
    grids = [
        TokenGrid.video(2, 3, 4),
        TokenGrid.video(2, 4, 3),
        TokenGrid.video(2, 3, 4, text=5),
        TokenGrid.video(2, 3, 4, text=5, text_first=True),
    ]
    assert len(set(grids)) == 4
    assert hash(TokenGrid.video(2, 3, 4)) == hash(grids[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segment(role="grid", length=5, shape=(1, 2, 3)), "holds 6 tokens, not 5"),
        (lambda: Segment(role="grid", length=5), "needs shape"),
        (lambda: Segment(role="words", length=5), "role must be one of"),
        (lambda: Segment(role="text", length=-1), "must be >= 0"),
        (lambda: TokenGrid((Segment(role="text", length=5),)), "exactly one grid"),
        (lambda: TokenGrid.video(0, 3, 4), "at least one token"),
        (lambda: TokenOrder(()), "at least one"),
        (lambda: TokenOrder(((1, 0, 4),)), "three sizes >= 1"),
        (lambda: TokenOrder(([1, 8, 4],)), "three sizes >= 1"),
        (lambda: TokenOrder(("FWW",)), "an order of the axes"),
        (
            lambda: TokenOrder(((1, 1, 4), (1, 2, 2))).apply(
                TokenGrid.video(1, 2, 4), torch.zeros(1, 8, 2, 4)
            ),
            "2 windows need heads",
        ),
        (lambda: TokenOrder(((1, 1, 4),), heads=(0, 1)), "windows 0 to 0, got 1"),
    ],
)
def test_impossible_geometry_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_order_for_other_heads_is_refused():
    grid = TokenGrid.video(2, 2, 2)
    with pytest.raises(ValueError, match="2 heads, the tensor has 3"):
        TokenOrder.per_head([(1, 1, 1), (2, 1, 1)]).apply(grid, torch.zeros(1, 8, 3, 4))


def test_an_order_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="8 tokens, the tensor has 9"):
        TokenOrder.single(1, 1, 1).apply(TokenGrid.video(2, 2, 2), torch.zeros(1, 9, 3, 4))
