"""The rendered clips and the measuring tool that reads them."""

import pytest
import torch

from sparsediff.pipelines.tiny import evaluate, measure, render


def scenes_of(count, seed=0, *, held_out=False):
    return render.sample_scenes(count, torch.Generator().manual_seed(seed), held_out=held_out)


def test_same_seed_same_clip_and_caption():
    clips, texts = [], []
    for _ in range(2):
        scenes = scenes_of(3, seed=5)
        clips.append(render.render(scenes, 5, 48, 64))
        texts.append(render.captions(scenes, torch.Generator().manual_seed(1)))
    assert torch.equal(*clips)
    assert texts[0] == texts[1]
    assert clips[0].shape == (3, 3, 5, 48, 64)
    assert clips[0].min() >= -1
    assert clips[0].max() <= 1


def test_training_never_shows_a_held_out_combination():
    train, test = scenes_of(2000), scenes_of(200, held_out=True)
    assert not render.is_held_out(train.colour, train.shape, train.motion).any()
    assert render.is_held_out(test.colour, test.shape, test.motion).all()
    for field, table in measure.QUESTIONS.items():  # but every single word is learnt
        assert len(getattr(train, field).unique()) == len(table)


def test_every_word_of_every_caption_is_in_the_vocabulary():
    words = set(render.vocabulary())
    for text in render.captions(scenes_of(500), torch.Generator().manual_seed(0)):
        assert set(text.replace(",", " , ").split()) <= words


def test_an_article_fits_its_word():
    texts = render.captions(scenes_of(500), torch.Generator().manual_seed(0))
    assert any(" an o" in text for text in texts)
    assert not any(" a o" in text for text in texts)


def test_camera_moves_the_background_and_not_the_main_object():
    scenes = scenes_of(400)
    still = (scenes.motion == 8) & (scenes.camera == 1) & (scenes.relation == 0)
    x, _, _, _ = render.trajectory(scenes[still], 9, 64, 64)
    assert torch.equal(x[:, 0], x[:, -1])
    clip = render.render(scenes[still][:1], 9, 64, 64)
    assert not torch.equal(clip[:, :, 0], clip[:, :, -1])


def test_measuring_tool_reads_rendered_clips():
    scenes, _ = evaluate.exam(3)
    right = measure.verdicts(render.render(scenes, 33, 128, 128), scenes)
    assert measure.accuracy(right)["all three"] == 1.0


@pytest.mark.parametrize("question", list(measure.QUESTIONS))
def test_measuring_tool_is_not_fooled_by_the_caption(question):
    scenes, _ = evaluate.exam(2)
    other = scenes[[1, 0]]
    lie = render.Scenes(
        **{**vars(scenes), "colour": other.colour, "shape": other.shape, "motion": other.motion}
    )
    if (getattr(lie, question) == getattr(scenes, question)).any():
        pytest.skip("the two scenes share this property")
    right = measure.verdicts(render.render(scenes, 33, 128, 128), lie)
    assert not right[question].any()
