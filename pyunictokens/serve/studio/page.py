"""All pages on one, and the server behind it: this machine alone, or with a password."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from ...utils.errors import UserError, needs
from ..server import this_machine
from .backend import Studio

PASSWORD = "PYUNICTOKENS_STUDIO_PASSWORD"
"""The environment variable that holds the password; the name to sign in with is `studio`."""

_STYLE = """
.gradio-container { max-width: 60rem !important; margin: 0 auto !important; }
@media (max-width: 40rem) { .gradio-container { padding: 0.5rem !important; } }
"""


def serve_studio(studio: Studio, host: str, port: int, say: Callable[[str], None], stop: Callable[[], bool]) -> None:
    """Show the pages until `stop` says so (asked ten times a second). Raises UserError for an address that other
    machines reach without a password."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with needs("studio"):
        import gradio as gr

        from .try_page import compare_page, rate_page, try_page

    password = os.environ.get(PASSWORD, "")
    if not password and not this_machine(host):
        raise UserError(f"--host {host} can be reached by other machines: set {PASSWORD} first, or use 127.0.0.1")
    with gr.Blocks(title="pyunictokens studio", analytics_enabled=False) as page:
        gr.Markdown("# pyunictokens studio")
        with gr.Tab("Try"):
            choices = [try_page(studio)]
        with gr.Tab("Compare"):
            choices += compare_page(studio)
        with gr.Tab("Rate"):
            choices.append(rate_page(studio))

        def again() -> list[object]:
            return [gr.update(choices=studio.models()) for _ in choices]

        page.load(again, outputs=choices)  # runs that came since
    studio.engine.start()
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or None,
            auth=("studio", password) if password else None,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=_STYLE,
            max_file_size=25 << 20,
            allowed_paths=[],
        )
        say(address)
        while not stop():
            time.sleep(0.1)
    except OSError as error:
        raise UserError(f"{host}:{port}: cannot listen there ({error}): choose another --port") from None
    finally:
        page.close()
        asyncio.run(studio.engine.close(5.0))
