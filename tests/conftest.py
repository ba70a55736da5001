"""Every test runs offline; a model hub is never asked."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Nothing is timed in tests: a busy machine must not fail them.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
