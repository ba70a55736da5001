import pytest

from sparsediff.demo.settings import Settings
from sparsediff.demo.studio import Studio
from sparsediff.eval.compare import Request

# A clip of random weights of 192 tokens, six blocks of 32; 29 frames are the four blocks of 128 that some methods want.
SMALL = {"steps": 3, "height": 128, "width": 128, "frames": 9}
BLOCKS = {"auto": {"block": 32}, "lite_attention": {"tile": (32, 32)}}


@pytest.fixture(scope="session")
def studio():
    """A studio of random weights, loaded."""
    studio = Studio("random-wan", device="cpu")
    studio.start_loading()
    assert studio._loaded.wait(120)
    assert studio.failure is None
    yield studio
    studio.close()


@pytest.fixture(scope="session")
def settings():
    """`settings(method, seed=1, **parameters)` of a clip that takes less than a second."""

    def make(method="auto", *, seed=0, schedule=None, steps=SMALL["steps"], frames=SMALL["frames"], **parameters):  # fmt: skip
        size = {**SMALL, "steps": steps, "frames": frames}
        parameters = {**BLOCKS.get(method, {}), **parameters}
        request = Request(prompt="a red circle", seed=seed, **size)
        return Settings(request=request, method=method, parameters=parameters, schedule=schedule)

    return make
