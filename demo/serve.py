"""Starting the page."""

from __future__ import annotations

import os
import socket

# Read when Gradio is imported: nothing of a visit is reported to anybody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from sparsediff.demo.page import Page
from sparsediff.demo.studio import Studio
from sparsediff.demo.view import page_css

HOST, PORT = "127.0.0.1", 7860
FONT = [
    "ui-sans-serif",
    "system-ui",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "DejaVu Sans",
    "sans-serif",
]
MONO = [
    "ui-monospace",
    "SF Mono",
    "Cascadia Mono",
    "Menlo",
    "Consolas",
    "DejaVu Sans Mono",
    "monospace",
]


def serve(
    studio: Studio,
    *,
    host: str = HOST,
    port: int | None = PORT,
    share: bool = False,
    block: bool = True,
) -> tuple[Page, str]:
    """Serve the page of a studio and start loading its model.

    Args:
        studio: what the page works with.
        host, port: where to listen; loopback unless told otherwise; no port takes a free one.
        share: also through Gradio's public tunnel.
        block: until the server ends; otherwise return while it serves.

    Returns:
        The page and its address.

    Raises:
        OSError: the port is taken.
        RuntimeError: `block`, and the model could not be loaded: a page without one would serve nobody.
    """
    # Gradio's own search for a port forgets to close the sockets that it tries.
    port = _bound(host, port or 0)
    studio.start_loading()
    page = Page(studio)
    _, url, public = page.blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=theme(),
        css=page_css(),
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
    )
    print(f"sparsediff demo: {public or url}   (Ctrl-C ends it)", flush=True)
    if block:
        try:
            studio.wait_until_loaded()
            page.blocks.block_thread()
        finally:
            page.blocks.close(verbose=False)
            studio.close()
    return page, url


def _bound(host: str, port: int) -> int:
    """The port, if it is free; any free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return probe.getsockname()[1]
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host"
            ) from None


def theme() -> gr.themes.Base:
    """The report's colours and the system's own fonts: nothing is loaded from anywhere."""
    colours = {
        "body_background_fill": "var(--bg)",
        "body_text_color": "var(--ink)",
        "body_text_color_subdued": "var(--muted)",
        "background_fill_primary": "var(--card)",
        "background_fill_secondary": "var(--well)",
        "border_color_primary": "var(--line)",
        "border_color_accent": "var(--accent)",
        "color_accent": "var(--accent)",
        "block_background_fill": "var(--card)",
        "block_border_color": "var(--line)",
        "block_label_text_color": "var(--muted)",
        "block_title_text_color": "var(--ink)",
        "block_info_text_color": "var(--muted)",
        "input_background_fill": "var(--card)",
        "input_border_color": "var(--line)",
        "input_border_width": "1px",
        "input_placeholder_color": "var(--faint)",
        "slider_color": "var(--accent)",
        "button_primary_background_fill": "var(--accent)",
        "button_primary_background_fill_hover": "color-mix(in srgb, var(--accent) 86%, var(--ink))",
        "button_primary_text_color": "var(--bg)",
        "button_secondary_background_fill": "var(--card)",
        "button_secondary_text_color": "var(--ink)",
        "button_secondary_border_color": "var(--line)",
    }
    base = gr.themes.Base(font=FONT, font_mono=MONO, radius_size=gr.themes.sizes.radius_lg)
    # Each colour is a variable that follows the page, so both of the theme's faces take the same.
    known = [name for name in colours if hasattr(base, f"{name}_dark")]
    return base.set(**colours, **{f"{name}_dark": colours[name] for name in known})
