"""`python -m sparsediff.eval` is the `sparsediff` command."""

import sys

from sparsediff.eval.cli import main

sys.exit(main())
