import pytest

from sparsediff.pipelines import tiny
from sparsediff.testing import record_attention


@pytest.fixture(scope="session", params=["tiny-wan", "tiny-cogvideox"])
def recorded(request):
    """Attention layers of a denoising step of a bundled model: 3 x 16 x 16 tokens, alone or after 64 of text."""
    calls = record_attention(
        tiny.load(request.param),
        step=1,
        prompt="a large red star spinning on a navy background",
        num_inference_steps=3,
        height=128,
        width=128,
        num_frames=9,
        guidance_scale=1.0,
        max_sequence_length=64,
    )
    return calls[::4]
