"""The file that starts the page on a Hugging Face Space, or anywhere with `python app.py`.

`SPARSEDIFF_MODEL` names the model; the bundled one needs no download.
"""

import os

from sparsediff.demo.serve import serve
from sparsediff.demo.studio import Studio

if __name__ == "__main__":
    studio = Studio(os.environ.get("SPARSEDIFF_MODEL", "tiny-wan"))
    serve(
        studio,
        host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    )
