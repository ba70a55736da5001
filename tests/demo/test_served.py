"""What the page serves is known from a pipeline's class, and what it does not is refused in a sentence at the start."""

import json
import re

import diffusers
import pytest

from sparsediff.demo.served import INDEX, MEDIA_OPTIONAL, served, served_class, what_else
from sparsediff.pipelines import tiny
from sparsediff.pipelines.cards import CARDS

SERVED = {
    "video": {
        "AllegroPipeline", "AnyFlowPipeline", "CogVideoXPipeline", "Cosmos2_5_PredictBasePipeline",
        "CosmosTextToWorldPipeline", "EasyAnimatePipeline", "HeliosPipeline", "HeliosPyramidPipeline",
        "HunyuanVideo15Pipeline", "HunyuanVideoPipeline", "Kandinsky5T2VPipeline", "LTX2ConditionPipeline",
        "LTX2Pipeline", "LTXConditionPipeline", "LTXPipeline", "MochiPipeline",
        "MotifVideoPipeline", "SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2Pipeline", "WanPipeline", "WanVACEPipeline",
    },
    "picture": {
        "ChromaPipeline", "Cosmos2TextToImagePipeline", "Flux2KleinKVPipeline", "Flux2KleinPipeline", "Flux2Pipeline",
        "FluxKontextPipeline", "FluxPipeline", "HunyuanImagePipeline", "Kandinsky5T2IPipeline", "QwenImagePipeline",
        "StableDiffusion3PAGPipeline", "StableDiffusion3Pipeline", "ZImageOmniPipeline", "ZImagePipeline",
    },
}  # fmt: skip


def test_every_pipeline_of_every_family_is_served_or_refused_with_a_reason():
    found, refused = {"video": set(), "picture": set()}, {}
    for card in CARDS:
        for name in card.pipelines:
            try:
                one = served_class(name, [card.transformer])
            except ValueError as error:
                refused[name] = str(error)
            else:
                found["video" if one.video else "picture"].add(name)
    for name, said in refused.items():
        assert re.match(rf"{name} (needs '\w+' beside a prompt|makes neither|is not in)", said)
    assert found == SERVED
    assert {name for names in found.values() for name in names} >= MEDIA_OPTIONAL


def test_a_refusal_names_what_is_served_of_the_family():
    with pytest.raises(ValueError, match=r"needs 'image' .* of its family this page serves WanPipeline$"):  # fmt: skip
        served_class("WanImageToVideoPipeline", ["WanTransformer3DModel"])
    with pytest.raises(ValueError, match=r"makes neither videos nor pictures .* such as WanPipeline"):  # fmt: skip
        served_class("LLaDA2Pipeline", ["LLaDA2MoeModelLM"])


def test_what_is_known_of_a_class():
    hunyuan = served_class("HunyuanVideoPipeline", ["HunyuanVideoTransformer3DModel"])
    assert hunyuan.takes("guidance_scale")
    assert not hunyuan.takes("negative_prompt")  # its guidance is built in
    assert not served_class("QwenImagePipeline", ["QwenImageTransformer2DModel"]).takes("guidance_scale")  # fmt: skip
    ltx = served_class("LTXPipeline", ["LTXVideoTransformer3DModel"])
    assert (ltx.fps, hunyuan.fps, ltx.noun) == (25, 16, "clip")
    assert served_class("FluxPipeline", ["FluxTransformer2DModel"]).noun == "picture"
    assert what_else(diffusers.WanPipeline) is None


def test_bundled_names_and_folders_are_read_without_loading(tmp_path):
    assert served("tiny-wan").pipeline == served("random-wan").pipeline == "WanPipeline"
    (tmp_path / INDEX).write_bytes((tiny.WEIGHTS / "tiny-wan" / INDEX).read_bytes())
    assert served(str(tmp_path)) == served("tiny-wan")  # no weights are there


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (None, "holds no model_index.json, so it is no diffusers pipeline"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"_class_name": ["mine", "MyPipeline"]}', "has no pipeline"),
        ('{"_class_name": "NoSuchPipeline"}', "has no pipeline NoSuchPipeline; update diffusers"),
        ('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}', "DDPMPipeline has no transformer that sparsediff supports"),
        (
            '{"_class_name": "WanAnimatePipeline", "transformer": ["diffusers", "WanAnimateTransformer3DModel"]}',
            "WanAnimatePipeline needs 'image' beside a prompt",
        ),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_served(tmp_path, index, said):
    if index is not None:
        (tmp_path / INDEX).write_text(index)
    with pytest.raises(ValueError, match=re.escape(said)):
        served(str(tmp_path))


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; --model takes the folder"):
        served(str(path))


def test_an_id_that_cannot_be_had():
    with pytest.raises(OSError, match="cannot download nobody/nothing: the hub cannot be reached"):
        served("nobody/nothing")
    with pytest.raises(ValueError, match="neither a folder nor a model id"):
        served("one/two/three")


def test_indexes_of_bundled_models_are_what_they_seem():
    for name in tiny.names():
        index = json.loads((tiny.WEIGHTS / name / INDEX).read_text())
        assert served(name).pipeline == index["_class_name"]
