"""Pictures show what was captured: single pixels against masks known beforehand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import sparsediff
from sparsediff import Auto, Schedule, TokenGrid
from sparsediff.block_mask import pack_bits
from sparsediff.eval.captured import CapturedCall
from sparsediff.eval.pictures import (
    ASKING,
    EDGE,
    HATCHED,
    RAMP,
    READ,
    SKIPPED,
    attended_frames,
    density_maps,
    heat_map,
    mask_map,
    stills,
)
from sparsediff.eval.video import MARGIN
from sparsediff.testing import random_wan_pipeline

GRID = TokenGrid.video(2, 4, 8)  # blocks of 8 tokens are rows of a frame


@pytest.fixture
def call():
    """Head 0 reads its own row and the first of the clip; head 1 everything."""
    keep = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    keep[0, 0] = torch.eye(8, dtype=torch.bool)
    keep[0, 0, :, 0] = True
    keep[0, 1] = True
    return CapturedCall(
        layer="l", step=0, num_steps=1, sigma=None, branch="cond", grid=GRID, block_size=(8, 8),
        dense_reason=None, heads=(0, 1), bitmap=pack_bits(keep),
    )  # fmt: skip


def test_a_mask_is_drawn_block_by_block(call):
    picture = np.array(mask_map(call, 0, pixels=32))
    assert picture.shape == (32, 32, 3)
    for row in range(8):
        for column in range(8):
            expected = READ if column in (0, row) else SKIPPED
            assert tuple(picture[row * 4 + 1, column * 4 + 2]) == expected
    assert (np.array(mask_map(call, 1, pixels=8)) == READ).all()


def test_mass_is_drawn_where_it_was_captured(call):
    with pytest.raises(ValueError, match="scores=True"):
        mask_map(call, mass=True)
    mass = torch.zeros(1, 2, 8, 8)
    mass[0, 0, :, 3] = 1.0
    picture = np.array(mask_map(dataclasses.replace(call, mass=mass.half()), mass=True, pixels=8))
    assert (picture[:, 3] == RAMP[-1]).all()
    assert (picture[:, 4] == RAMP[0]).all()


@pytest.mark.parametrize("with_video", [False, True])
def test_what_a_patch_attends_stays_lit(call, with_video):
    video = torch.full((5, 16, 32, 3), 0.5) if with_video else None
    picture = np.array(attended_frames(call, (1, 2, 3), 0, video=video, width=160))
    cell, top = 20, MARGIN + 18

    def centre(frame, row, column):
        left = MARGIN + frame * (160 + MARGIN)
        return picture[top + row * cell + 10, left + column * cell + 10].astype(int)

    own, read, dark = centre(1, 2, 0), centre(0, 0, 5), centre(0, 1, 5)
    grey = 128 if with_video else 138
    assert abs(read[0] - grey) <= 1
    assert dark.max() < 45
    assert abs(own[0] - (0.58 * grey + 0.42 * ASKING[0])) <= 2
    assert tuple(picture[top, MARGIN + 50]) == EDGE
    for frame in range(2):
        for row in range(4):
            lit = (frame, row) in ((0, 0), (1, 2))
            assert (centre(frame, row, 6).max() > 60) == lit


def test_refusals(call):
    with pytest.raises(ValueError, match=r"patch \(2, 0, 0\) lies outside"):
        attended_frames(call, (2, 0, 0))
    for draw in (mask_map, lambda c, head: attended_frames(c, (0, 0, 0), head)):
        with pytest.raises(ValueError, match="no head 2: the capture holds 2"):
            draw(call, 2)
    with pytest.raises(ValueError, match="rows of one length"):
        heat_map([], title="t", rows="r", columns="c")


def test_heat_maps_have_the_colours_of_their_numbers():
    picture = np.array(
        heat_map([[0.0, 1.0], [None, math.nan]], title="t", rows="r", columns="c", cell=20)
    )
    assert tuple(picture[40, 54]) == RAMP[0]
    assert tuple(picture[40, 74]) == RAMP[-1]
    assert tuple(picture[60, 54]) == tuple(picture[60, 74]) == HATCHED


def test_stills_run_from_the_first_to_the_last():
    video = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 2, 2, 3)
    assert stills(video, 3)[:, 0, 0, 0].tolist() == [0, 128, 255]
    assert stills(video, 1).shape == (1, 2, 2, 3)


def test_densities_of_a_run(monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    pipe = random_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with sparsediff.enable(
        pipe, Auto(block=64, density=0.2), schedule=Schedule(dense_steps=1)
    ) as handle:
        with pytest.raises(ValueError, match="run the pipeline first"):
            density_maps(handle.report())
        pipe(
            "a", height=128, width=128, num_frames=17, num_inference_steps=2,
            max_sequence_length=16, output_type="latent",
        )  # fmt: skip
    picture = np.array(density_maps(handle.report()))
    assert tuple(picture[32, 48]) == RAMP[-1], "the first step is dense"
    assert tuple(picture[32, 48 + 28]) not in (RAMP[-1], HATCHED), "the second is not"
