"""Every method that decides while it runs, against its equations: slow, obvious, float64, nothing of ours inside.

The calibrated methods have a file of their own.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_runs import site

from sparsediff import (
    AdaSpa,
    BlockMask,
    Custom,
    DraftAttention,
    LiteAttention,
    Segment,
    SparseD,
    TokenGrid,
)
from sparsediff.kernels import attend_blocks

SLOW = settings(max_examples=25)


def grid_of(shape, before, after):
    video = Segment(role="grid", length=math.prod(shape), shape=shape)
    words = [Segment(role="text", length=n) for n in (before, after)]
    return TokenGrid((words[0], video, words[1]))


def draw_queries(grid, batch, heads, seed, sharpness=1.5, dim=16):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, grid.num_tokens, heads, dim, generator=g) * sharpness for _ in range(2)
    ]


grids = st.builds(
    grid_of,
    st.tuples(st.integers(1, 4), st.integers(3, 9), st.integers(3, 10)),
    st.sampled_from([0, 1, 31, 70]),
    st.sampled_from([0, 1, 31, 70]),
)
cases = st.tuples(grids, st.integers(1, 2), st.integers(1, 4), st.integers(0, 2**31))


# -- the equations ------------------------------------------------------------------------------------------------


def attention_map(q, k, scale=None):
    """Softmax of one head `[S, D]`, float64 `[S, S]`."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return (q.double() @ k.double().T * scale).softmax(-1)


def block_sums(weights, block):
    rows, columns = (range(0, n, block) for n in weights.shape)
    return torch.stack(
        [torch.stack([weights[i : i + block, j : j + block].sum() for j in columns]) for i in rows]
    )


def whole_video_blocks(grid, block):
    """Numbers of the blocks all of whose tokens belong to the video."""
    start, stop = grid.grid_span
    tokens = grid.num_tokens
    return [
        j
        for j in range(-(-tokens // block))
        if all(start <= t < stop for t in range(j * block, min((j + 1) * block, tokens)))
    ]


def top(scores, density):
    """The best `density` of a list of scores, rounded up, at least one."""
    k = max(1, math.ceil(density * len(scores) - 1e-4))
    return set(scores.argsort(descending=True)[:k].tolist())


def assert_chosen(keep, chosen, scores):
    """`keep` `[N]` is the set `chosen`, but for swaps between scores that single precision cannot tell apart."""
    kept = set(keep.nonzero()[:, 0].tolist())
    assert len(kept) == len(chosen)
    if kept != chosen:
        swapped = scores[list(kept ^ chosen)]
        assert swapped.max() - swapped.min() <= 1e-5 * scores.max(), (kept, chosen)


# -- SparseD ------------------------------------------------------------------------------------------------------


def check_sparse_d(grid, q, k, method):
    block = method.block_size(grid)[0]
    keep = method.keep_blocks(q, k, site(grid))
    video = whole_video_blocks(grid, block)
    blocks = -(-grid.num_tokens // block)
    segments = [range(video[0]), video, range(video[-1] + 1, blocks)]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = block_sums(attention_map(q[b, :, h], k[b, :, h]), block) / block**2
            for i in range(blocks):
                for segment in map(list, segments):
                    if segment:
                        chosen = top(scores[i, segment], method.select)
                        assert_chosen(keep[b, h, i, segment], chosen, scores[i, segment])


@SLOW
@given(cases, st.sampled_from([32, 64]), st.floats(0.05, 1.0))
def test_sparse_d_picks_from_prompt_and_generation_apart(case, block, select):
    grid, batch, heads, seed = case
    assume(whole_video_blocks(grid, block))
    q, k = draw_queries(grid, batch, heads, seed)
    check_sparse_d(grid, q, k, SparseD(select=select, block=block))


def test_sparse_d_on_recorded_attention(recorded):
    for call in recorded:
        check_sparse_d(call.site.grid, call.query, call.key, SparseD(block=64))


def test_sparse_d_scales_by_the_head_size_or_as_the_model_does():
    """The published LLaDA code divides by the square root of the number of heads."""
    grid = TokenGrid.video(2, 8, 16)
    q, k = draw_queries(grid, 1, 3, 0, sharpness=2.0)
    for scale in (None, 0.9):
        keep = SparseD(block=32).keep_blocks(q, k, site(grid, scale=scale))
        for h in range(3):
            scores = block_sums(attention_map(q[0, :, h], k[0, :, h], scale), 32)
            for i in range(8):
                assert_chosen(keep[0, h, i], top(scores[i], 0.3), scores[i])


# -- AdaSpa -------------------------------------------------------------------------------------------------------


def adaspa_densities(recalls, sparsity, limit):
    """Budgets of the heads: (1 + s) / 2 for the n best recalled, (3 s - 1) / 2 for the n worst, s for the others."""
    heads = len(recalls)
    n = min(sum(r > limit for r in recalls), heads // 2)
    by_recall = sorted(range(heads), key=lambda h: -recalls[h])
    lower = max((3 * sparsity - 1) / 2, 0.0)
    higher = 2 * sparsity - lower  # (1 + s) / 2 where nothing is clamped
    densities = [1 - sparsity] * heads
    for h in by_recall[:n]:
        densities[h] = 1 - higher
    for h in by_recall[heads - n :]:
        densities[h] = 1 - lower
    return densities


def check_adaspa(grid, q, k, method, lse=None):
    block, density = method.block_size(grid)[0], 1 - method.sparsity
    keep = method.keep_blocks(q, k, site(grid), lse=lse)
    video = whole_video_blocks(grid, block)
    for b in range(q.shape[0]):
        masses, recalls = [], []
        for h in range(q.shape[2]):
            mass = block_sums(attention_map(q[b, :, h], k[b, :, h]), block)[video][:, video]
            kept = sum(mass[i, list(top(mass[i], density))].sum() for i in range(len(video)))
            masses.append(mass)
            recalls.append((kept / mass.sum()).item())
        apart = [abs(x - y) for x, y in zip(sorted(recalls), sorted(recalls)[1:], strict=False)]
        if min([*apart, *(abs(r - method.recall_limit) for r in recalls)]) < 1e-5:
            continue  # a tie of heads
        densities = [density] * len(recalls)
        if method.head_adaptive:
            densities = adaspa_densities(recalls, method.sparsity, method.recall_limit)
        for h, mass in enumerate(masses):
            for i, row in enumerate(video):
                chosen = top(mass[i], densities[h])
                assert_chosen(keep[b, h, row, video], chosen, mass[i])


@SLOW
@given(cases, st.floats(0.0, 0.95), st.floats(0.1, 1.0), st.booleans())
def test_adaspa_shifts_budget_between_heads(case, sparsity, limit, adaptive):
    grid, batch, heads, seed = case
    assume(whole_video_blocks(grid, 32))
    q, k = draw_queries(grid, batch, heads, seed)
    method = AdaSpa(sparsity=sparsity, recall_limit=limit, head_adaptive=adaptive, block=32)
    check_adaspa(grid, q, k, method)


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.8])
def test_adaspa_on_recorded_attention(recorded, limit):
    for call in recorded:
        method = AdaSpa(sparsity=0.7, recall_limit=limit)
        check_adaspa(call.site.grid, call.query, call.key, method)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=24), st.floats(0, 0.99), st.floats(0, 1))
def test_adaspa_head_adaptation_keeps_the_mean_budget(recalls, sparsity, limit):
    from sparsediff.budget import head_adaptive_density

    got = head_adaptive_density(torch.tensor([recalls]), 1 - sparsity, limit=limit)[0]
    assert got.double().mean().item() == pytest.approx(1 - sparsity, abs=1e-5)
    assert got.min() > 0
    assert got.max() <= 1 + 1e-6
    if len(set(recalls)) == len(recalls) and min(abs(r - limit) for r in recalls) > 1e-6:
        expected = adaspa_densities(torch.tensor(recalls).tolist(), sparsity, limit)
        assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_adaspa_published_budgets():
    assert adaspa_densities([0.9, 0.5, 0.7], 0.8, 0.8) == pytest.approx([0.1, 0.3, 0.2])


def test_adaspa_searches_alike_with_the_kept_log_sum_exp(recorded):
    """While queries and keys have not changed, neither does the choice; and a shift of a whole block changes nothing."""
    method = AdaSpa(block=64)
    for call in recorded:
        here = site(call.site.grid)
        logits = torch.einsum("bihd,bjhd->bhij", call.query, call.key) * call.scale
        lse = logits.logsumexp(-1)
        fresh = method.keep_blocks(call.query, call.key, here)
        assert torch.equal(method.keep_blocks(call.query, call.key, here, lse=lse), fresh)
        uniform = AdaSpa(block=64, head_adaptive=False)
        fresh = uniform.keep_blocks(call.query, call.key, here, lse=lse)
        stale = uniform.keep_blocks(call.query, call.key, here, lse=lse + 1.0)
        # as it is stored
        rounded = uniform.keep_blocks(call.query, call.key, here, lse=lse.half())
        assert torch.equal(stale, fresh)
        assert (rounded != fresh).float().mean() < 0.02


# -- DraftAttention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("f", "h", "w"), [(1, 8, 16), (3, 16, 32), (2, 24, 48), (3, 48, 80)])
@pytest.mark.parametrize("text", [0, 5])
def test_draft_window_permutation(f, h, w, text):
    """new = f h w + (y div 8) 8 w + (x div 16) 128 + (y mod 8) 16 + (x mod 16); text maps to itself."""
    grid = TokenGrid.video(f, h, w, text=text)
    where = DraftAttention().order(site(grid)).inverse(grid)[0].tolist()
    t = 0
    for frame in range(f):
        for y in range(h):
            for x in range(w):
                new = frame * h * w + (y // 8) * 8 * w + (x // 16) * 128 + (y % 8) * 16 + x % 16
                assert where[t] == new
                t += 1
    assert where[t:] == list(range(f * h * w, f * h * w + text))


def test_draft_on_recorded_attention(recorded):
    """16 divides the grid, so a block is a patch: pool 8 x 16 means and cut at the percentile of the head."""
    method = DraftAttention(sparsity=0.6)
    for call in recorded:
        grid = call.site.grid
        f, h, w = grid.shape
        start, stop = grid.grid_span
        order = method.order(call.site)
        keep = method.keep_blocks(*order.apply(grid, call.query, call.key), call.site)
        for head in range(call.query.shape[2]):
            patches = [
                x[0, start:stop, head]
                .double()
                .view(f, h // 8, 8, w // 16, 16, -1)
                .mean((2, 4))
                .flatten(0, 2)
                for x in (call.query, call.key)
            ]
            draft = attention_map(*patches)
            dropped = int(0.6 * draft.numel() + 1e-9)
            threshold = draft.flatten().sort().values[dropped - 1]
            expected = (draft >= threshold) | (draft == draft.amax(-1, keepdim=True))
            unsure = (draft - threshold).abs() <= 1e-5 * threshold
            video = keep[0, head, : len(draft), : len(draft)]
            assert (video == expected)[~unsure].all()


# -- LiteAttention ------------------------------------------------------------------------------------------------


def lite_walk(visiting_order, step, row, rows, tokens, tile):
    """The tiles of a row as they are visited: a short last one before all others, whose place the order decides."""
    columns = -(-tokens // tile)
    short = [columns - 1] if tokens % tile else []
    others = [j for j in range(columns) if j not in short]
    if visiting_order == "centre-out":
        # The tile at the row's share of the sequence, then to the right and to the left of it in turns.
        here = min((2 * row + 1) * columns // (2 * rows), max(others, default=0))
        sides = [others[:here][::-1], others[here + 1 :]]
        walk = others[here : here + 1]
        while any(sides):
            walk += [side.pop(0) for side in reversed(sides) if side]
        return short + walk
    backwards = visiting_order == "descending" or step % 2 == 0
    return short + (others[::-1] if backwards else others)


def lite_vote(q, k, visited, tile, threshold, scale, visiting_order="descending", step=0):
    """`(vote, unsure)` of one head: the tiles one after another against the running maximum of each row."""
    bq, bk = tile
    vote, unsure = torch.zeros_like(visited), torch.zeros_like(visited)
    for i in range(visited.shape[0]):
        rows = q[i * bq : (i + 1) * bq].double()
        running = torch.full((rows.shape[0],), -math.inf, dtype=torch.float64)
        for j in lite_walk(visiting_order, step, i, len(visited), len(k), bk):
            if not visited[i, j]:
                continue
            best = (rows @ k[j * bk : (j + 1) * bk].double().T * scale).amax(-1)
            above = ((best - running) / math.log(2) - threshold).max().item()
            vote[i, j], unsure[i, j] = above > 0, abs(above) <= 1e-5
            running = torch.maximum(running, best)
    return vote, unsure


orders = st.sampled_from(["descending", "alternate", "centre-out"])


@SLOW
@given(
    st.integers(1, 150),
    st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32, 48])),
    st.floats(-12, -0.5),
    orders,
    st.integers(0, 2**31),
)
def test_lite_attention_shrinks_by_its_vote_and_never_grows(tokens, tile, threshold, order, seed):
    """Four steps of one generation in which queries and keys drift."""
    grid = TokenGrid.video(1, 1, tokens)
    method = LiteAttention(threshold=threshold, tile=tile, visiting_order=order)
    q, k = draw_queries(grid, 2, 2, seed)
    keep = method.keep_blocks(q, k, site(grid))
    assert keep.all()
    for step in range(4):
        g = torch.Generator().manual_seed(seed + step)
        q, k = (x + 0.3 * torch.randn(x.shape, generator=g) for x in (q, k))
        here = site(grid, step=step)
        mask = BlockMask.from_dense(keep, tile, (tokens, tokens), visits=method.visits(here))
        limit = method.vote_threshold(here)
        following = attend_blocks(q, k, q, mask, vote_threshold=limit).vote
        assert (following <= keep).all(), "a skipped tile came back"
        for b in range(2):
            for h in range(2):
                head = (q[b, :, h], k[b, :, h], keep[b, h], tile, threshold, 0.25, order, step)
                vote, unsure = lite_vote(*head)
                assert (following[b, h] == vote)[~unsure].all()
                for i, (before, after) in enumerate(zip(keep[b, h], following[b, h], strict=True)):
                    walk = lite_walk(order, step, i, len(keep[b, h]), tokens, tile[1])
                    first = next(j for j in walk if before[j])
                    assert after[first], "the first visited tile was dropped"
        keep = following


@pytest.mark.parametrize("order", ["descending", "alternate", "centre-out"])
def test_lite_attention_on_recorded_attention(recorded, order):
    for call in recorded:
        tokens, tile = call.query.shape[1], (64, 64)
        method = LiteAttention(tile=tile, visiting_order=order)
        keep = method.keep_blocks(call.query, call.key, call.site)
        mask = BlockMask.from_dense(keep, tile, (tokens, tokens), visits=method.visits(call.site))
        for threshold in (-10.0, -3.0, -1.0):
            got = attend_blocks(
                call.query, call.key, call.value, mask, scale=call.scale, vote_threshold=threshold
            ).vote
            for h in range(call.query.shape[2]):
                head = (call.query[0, :, h], call.key[0, :, h], keep[0, h], tile, threshold)
                vote, unsure = lite_vote(*head, call.scale, order, call.site.step)
                assert (got[0, h] == vote)[~unsure].all()


ranges = st.lists(
    st.tuples(st.integers(0, 250), st.integers(1, 120)).map(lambda r: (r[0], r[0] + r[1])),
    max_size=3,
).map(tuple)


@given(st.integers(1, 300), st.sampled_from([(32, 32), (64, 32), (32, 48)]), ranges, ranges)
def test_lite_attention_ranges_become_whole_tiles(tokens, tile, must_keep, must_skip):
    """What must be kept grows to whole tiles, what must be skipped shrinks to them; the caller's ranges stay."""
    grid = TokenGrid.video(1, 1, tokens)
    method = LiteAttention(tile=tile, must_keep=must_keep, must_skip=must_skip)
    q = torch.zeros(1, tokens, 1, 4)
    skipped = {t for a, b in must_skip for t in range(a, b)}
    if set(range(tokens)) <= skipped:
        with pytest.raises(ValueError, match="leaves none of"):
            method.keep_blocks(q, q, site(grid))
        return
    keep = method.keep_blocks(q, q, site(grid))[0, 0]
    always = method.always(grid)
    assert (always is None) == (must_keep == ())

    def touched(start, size):
        return any(a < start + size and b > start for a, b in must_keep)

    for i in range(-(-tokens // tile[0])):
        for j in range(-(-tokens // tile[1])):
            first, last = j * tile[1], min((j + 1) * tile[1], tokens)
            inside = set(range(first, last)) <= skipped
            assert keep[i, j] == (not inside)
            if always is not None:
                expected = touched(i * tile[0], tile[0]) or touched(first, tile[1])
                assert always[i, j] == expected
    assert (method.must_keep, method.must_skip) == (must_keep, must_skip)


@pytest.mark.parametrize("skip", [((0, 20), (20, 64)), ((10, 64), (0, 40)), ((0, 64), (8, 16))])
def test_lite_attention_ranges_that_touch_or_overlap_are_one(skip):
    """Tiles that no single range covers are skipped, and who skips all is told."""
    q = torch.zeros(1, 96, 1, 4)
    for tokens, kept in ((96, [False, False, True]), (64, None)):
        method = LiteAttention(tile=(32, 32), must_skip=skip)
        q, here = q[:, :tokens], site(TokenGrid.video(1, 1, tokens))
        if kept is None:
            with pytest.raises(ValueError, match="leaves none of 64 tokens"):
                method.keep_blocks(q, q, here)
        else:
            assert method.keep_blocks(q, q, here)[0, 0, 0].tolist() == kept


def test_lite_attention_keeps_rows_of_the_tokens_that_ask():
    """Of 96 tokens the last 40 ask, in two tiles: 56 to 87 and 88 to 95."""
    grid = TokenGrid.line(50, 46, queries=40)
    keep = LiteAttention(tile=(32, 32), must_keep=((0, 10), (90, 96))).always(grid)
    assert keep.tolist() == [[True, False, True], [True, True, True]]


# -- hybrids ------------------------------------------------------------------------------------------------------


@SLOW
@given(cases, st.sampled_from(["mass", "pooled"]), st.floats(0.05, 1.0))
def test_hybrid_top_p_keeps_the_fewest_blocks_that_hold_the_share(case, producer, share):
    grid, batch, heads, seed = case
    video = whole_video_blocks(grid, 32)
    assume(video)
    q, k = draw_queries(grid, batch, heads, seed)
    method = Custom(density=share, budget="row_top_p", producer=producer, block=32)
    keep = method.keep_blocks(q, k, site(grid))
    for b in range(batch):
        for h in range(heads):
            scores = block_sums(attention_map(q[b, :, h], k[b, :, h]), 32)[video][:, video]
            if producer == "pooled":
                means = [
                    torch.stack([x[b, j * 32 : (j + 1) * 32, h].double().mean(0) for j in video])
                    for x in (q, k)
                ]
                scores = attention_map(*means)
            for i, row in enumerate(video):
                best = scores[i].sort(descending=True).values
                held = best.cumsum(0) / best.sum()
                if (held - share).abs().min() < 1e-5:
                    continue
                count = next((n + 1 for n, s in enumerate(held) if s >= share), len(best))
                chosen = set(scores[i].argsort(descending=True)[:count].tolist())
                assert_chosen(keep[b, h, row, video], chosen, scores[i])
