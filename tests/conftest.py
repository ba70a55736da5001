"""Every test runs offline; a model hub is never asked."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Nothing is timed in tests: a busy machine must not fail them. Every run draws the same examples, so
# that a change is judged by what it changed; `--hypothesis-profile=explore` draws new ones.
settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=40)
settings.load_profile("suite")
