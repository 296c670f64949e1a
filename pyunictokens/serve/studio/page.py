"""All pages on one, and the server behind it: this machine alone, or with a password."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...utils.errors import UserError, needs
from ..gate import this_machine
from .backend import Studio
from .concepts import Concepts
from .training import Training

if TYPE_CHECKING:
    from gradio.themes import Base

PASSWORD = "PYUNICTOKENS_STUDIO_PASSWORD"
"""The environment variable that holds the password; the name to sign in with is `studio`."""

_STYLE = """
.drawn button:has(img), .drawn .image-frame, .drawn img { width: 100% !important; height: auto !important; }
.drawn img { object-fit: contain !important; }
#photos-shown .grid-wrap, #train-samples .grid-wrap { max-height: none !important; padding-top: 2.25rem !important; }
#train-loss .vega-embed, #train-reward .vega-embed { height: calc(100% - 2.5rem) !important; }
#train-log textarea { white-space: pre !important; overflow-x: auto !important; font: 0.8rem ui-monospace, monospace; }
#photos-shown .caption-label { white-space: normal !important; overflow-wrap: anywhere; }
.gradio-container { max-width: 60rem !important; width: 100% !important; margin: 0 auto !important; }
@media (max-width: 40rem) {
  .gradio-container { padding: 0.5rem !important; }
  .tab-container button { padding: 0 0.5rem !important; }
  #train-samples .grid-container { grid-template-columns: 1fr !important; }
  #photos-shown .caption-label { max-width: 100% !important; }
  #photos-shown .grid-container { grid-template-columns: 1fr 1fr !important; }
}
"""


_CACHE = (3600, 86400)
"""Seconds between two looks at the pictures that Gradio keeps, and their age from which they go."""
GRACE = 60.0
"""Seconds that a training has to end in when the studio does; after that it ends by itself."""


def serve_studio(
    studio: Studio,
    concepts: Concepts,
    training: Training,
    host: str,
    port: int,
    say: Callable[[str], None],
    stop: Callable[[], bool],
) -> None:
    """Show the pages until `stop` says so (asked ten times a second). Raises UserError for an address that other
    machines reach without a password."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with needs("studio"):
        import gradio as gr
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from .concept_page import concept_page
        from .train_page import train_page
        from .try_page import compare_page, rate_page, try_page

    password = os.environ.get(PASSWORD, "")
    if not password and not this_machine(host):
        raise UserError(f"--host {host} can be reached by other machines: set {PASSWORD} first, or use 127.0.0.1")
    own = [] if password else [Middleware(TrustedHostMiddleware, [host, "localhost", "127.0.0.1", "::1"])]
    with gr.Blocks(title="pyunictokens studio", analytics_enabled=False, delete_cache=_CACHE) as page:
        gr.Markdown("# pyunictokens studio")
        with gr.Tabs(selected="try" if len(studio.models()) > 1 else "concept"):
            with gr.Tab("Concept", id="concept"):
                written = concept_page(concepts)
            with gr.Tab("Train", id="train"):
                learned, run, clock = train_page(training, concepts)
            with gr.Tab("Try", id="try"):
                choices = [try_page(studio)]
            with gr.Tab("Compare", id="compare"):
                choices += compare_page(studio)
            with gr.Tab("Rate", id="rate"):
                choices.append(rate_page(studio))
        known = gr.State(studio.models())

        def again() -> tuple[object, ...]:
            """What came since the page was built."""
            names = studio.models()
            return (
                names,
                *(gr.update(choices=names) for _ in choices),
                _first(concepts.names()),
                _first(training.names()),
            )

        def newer(seen: list[str]) -> tuple[object, ...]:
            """Models that came since the last look."""
            names = studio.models()
            same = names == seen
            return names, *(gr.skip() if same else gr.update(choices=names) for _ in choices)

        page.load(again, outputs=[known, *choices, learned, run], queue=False, show_progress="hidden")
        clock.tick(newer, known, [known, *choices], show_progress="hidden")
        written.change(lambda name: gr.update(choices=concepts.names(), value=name), written, learned)
    studio.workers.start()
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
            theme=_theme(),
            css=_STYLE,
            max_file_size=25 << 20,
            allowed_paths=[],
            app_kwargs={"middleware": own},  # no name that another site has made to lead here (DNS rebinding)
        )
        say(address)
        while not stop():
            time.sleep(0.1)
    except OSError as error:
        raise UserError(f"{host}:{port}: cannot listen there ({error}): choose another --port") from None
    finally:
        page.close(verbose=False)
        training.close(GRACE)
        concepts.close()
        asyncio.run(studio.workers.close(5.0))


def _first(names: list[str]) -> dict[str, object]:
    """A dropdown of `names`, the first one chosen."""
    with needs("studio"):
        import gradio as gr

    return gr.update(choices=names, value=names[0] if names else None)


def _theme() -> Base:
    """Gradio's own with fonts of this machine, and hints dark enough to be read (WCAG: 4.5 to 1)."""
    with needs("studio"):
        import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(block_info_text_color="*neutral_600", input_placeholder_color="*neutral_500")
