"""Chat about a clip in the browser.

    python serve/chat_demo.py CHECKPOINT [--host 127.0.0.1 --port 7860]

Drop a video, a sound or a picture and ask. The page shows the encoders' view of it: the frames as
they were resized and cropped, the sound as mel bands. Nothing leaves the machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from avllm.errors import UserError, exit_on_user_error
from avllm.inference.asked_files import media_kind
from avllm.inference.chat import Chat
from avllm.inference.command_line import add_model_options, load_chat
from avllm.inference.drawing import as_html, escaped, facts, frame_pictures, sound_picture
from avllm.inference.perceived import Perceived
from avllm.inference.visits import Visits, growing_answer, hosts_of, readable
from avllm.log import hush_libraries
from avllm.registry import choices

TITLE = "Ask about a clip"
HELP = (
    "Drop a video, a sound or a picture, then ask. "
    "A new file joins the chat with the next question."
)
EMPTY = (
    "Nothing yet: once a file is there, this shows the frames and the sound as the model gets them."
)
FILE_TYPES = ["video", "audio", "image"]
# Fonts of the visitor's system: a web font would be fetched.
FONT = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
#facts {color: var(--body-text-color-subdued); font-size: 0.9em}
#chat .message {white-space: pre-wrap}
#frames .grid-wrap {min-height: 0 !important; max-height: 420px}
"""
PLAIN = "none"
Updates = dict[Any, Any]


class Demo:
    """The page and its events. Each visitor gets a separate chat with the one model.

    Args:
        chat: its model and processor are used; its history is not.
        name: of the checkpoint, shown on the page.
    """

    def __init__(self, chat: Chat, name: str) -> None:
        self.model = chat.model
        self.processor = chat.processor
        self.name = name
        self.visits = Visits()
        with gr.Blocks(
            title=f"{TITLE} - {name}", analytics_enabled=False, delete_cache=(3600, 3600)
        ) as self.page:
            self._layout()
            self._events()

    def new_chat(self) -> Chat:
        """Return a chat without history on the demo's model."""
        return Chat(self.model, self.processor)

    # ---- the page ---------------------------------------------------------------------------

    def _layout(self) -> None:
        # A Chat from the first event on: a state is copied for each visitor, a Chat with its model.
        self.chat = gr.State(None)
        gr.Markdown(f"# {TITLE}\n{HELP} Model: `{self.name}`")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=360):
                self._media_column()
            with gr.Column(scale=6, min_width=400):
                self._chat_column()

    def _media_column(self) -> None:
        self.file = gr.File(
            label="Video, sound or picture", file_types=FILE_TYPES, elem_id="file", height=150
        )
        hidden: dict[str, Any] = {"visible": False, "show_label": False, "interactive": False}
        self.video = gr.Video(height=240, elem_id="video", buttons=[], **hidden)
        self.audio = gr.Audio(elem_id="audio", buttons=[], **hidden)
        self.sound = gr.Checkbox(value=True, label="Use the video's sound", elem_id="sound")
        gr.Markdown("### What the model gets")
        self.facts = gr.Markdown(EMPTY, elem_id="facts")
        self.frames = gr.Gallery(
            visible=False,
            show_label=False,
            columns=4,
            height="auto",
            object_fit="contain",
            elem_id="frames",
            buttons=["fullscreen"],
        )
        self.spectrogram = gr.Image(elem_id="spectrogram", buttons=["fullscreen"], **hidden)

    def _chat_column(self) -> None:
        self.history = gr.Chatbot(
            show_label=False,
            height=520,
            elem_id="chat",
            buttons=["copy"],
            feedback_options=None,
            render_markdown=False,  # 2*3*4 stays; gradio reads HTML all the same, see as_html
            latex_delimiters=[],
            placeholder="Your questions and the model's answers appear here.",
        )
        self.question = gr.Textbox(
            show_label=False,
            container=False,
            placeholder="What do you see? What do you hear?",
            lines=1,
            max_lines=6,
            elem_id="question",
        )
        with gr.Row():
            self.send = gr.Button("Ask", variant="primary", elem_id="send")
            self.stop = gr.Button("Stop", interactive=False, elem_id="stop")
            self.clear = gr.Button("Clear", elem_id="clear")
        with gr.Accordion("Advanced settings", open=False, elem_id="advanced"):
            greedy = "0 = greedy: the same answer each time"
            self.temperature = gr.Slider(0.0, 2.0, 0.0, step=0.05, label="Temperature", info=greedy)
            sampling = "only when the temperature is above 0"
            self.top_p = gr.Slider(0.05, 1.0, 1.0, step=0.05, label="Top-p", info=sampling)
            longest = "Longest answer, in tokens"
            self.max_new_tokens = gr.Slider(1, 1024, 128, step=1, label=longest)
            # No free text: a decoder can be named by its module, whose code would run.
            self.decoder = gr.Dropdown(
                [PLAIN, *choices("decoders")], value=PLAIN, label="Decoder", elem_id="decoder"
            )

    def _events(self) -> None:
        media = [self.chat, self.file, self.sound]
        view = [self.facts, self.frames, self.spectrogram]
        buttons = [self.history, self.question, self.send, self.stop]
        settings = [self.temperature, self.top_p, self.max_new_tokens, self.decoder]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        # One event at a time uses the model: events share the weights and the chat.
        on_model = {**private, "concurrency_id": "model"}

        players = [self.video, self.audio]
        self.file.change(self.look, media, [self.chat, *players, *view], **on_model)
        self.sound.change(self.switch_sound, media, [self.chat, *view], **on_model)
        answering = gr.on(
            [self.question.submit, self.send.click],
            self.ask,
            [*media, self.question, self.history, *settings],
            [self.chat, *buttons],
            **on_model,
        )
        self.page.unload(self.leave)
        at_once = {**private, "queue": False}
        self.stop.click(self.stop_answer, self.chat, **at_once)
        # The file goes too, and look() hides the rest; the chat's own bin keeps the file.
        parts = [*buttons, self.file]
        self.clear.click(self.start_again, self.chat, parts, cancels=answering, **at_once)
        self.history.clear(self.forget, self.chat, buttons, cancels=answering, **at_once)

    # ---- its events -------------------------------------------------------------------------

    def look(
        self, chat: Chat | None, file: str | None, sound: bool, request: gr.Request | None = None
    ) -> Updates:
        """Play a new file and show the encoders' view of it, or hide both when the file is gone."""
        chat = chat or self.new_chat()
        updates: Updates = {
            self.chat: chat,
            self.video: gr.update(visible=False, value=None),
            self.audio: gr.update(visible=False, value=None),
        }
        if file is None:
            return updates | self._view(None)
        try:
            kind = media_kind(file)
            (perceived,) = chat.look(**{kind: file}, sound=sound_mode(sound))
            self.visits.note(visit_of(request), chat)
        except (ValueError, OSError) as error:
            return updates | self._view(None, readable(error))
        if kind == "video":
            updates[self.video] = gr.update(visible=True, value=file)
        elif kind == "audio":
            updates[self.audio] = gr.update(visible=True, value=file)
        return updates | self._view(perceived)

    def switch_sound(
        self, chat: Chat | None, file: str | None, sound: bool, request: gr.Request | None = None
    ) -> Updates:
        """Set whether the videos' sound is used, from the next question on."""
        chat = chat or self.new_chat()
        chat.use_sound(sound_mode(sound))
        updates = self.look(chat, file, sound, request)
        del updates[self.video]  # it goes on playing
        del updates[self.audio]
        return updates

    def ask(
        self,
        chat: Chat | None,
        file: str | None,
        sound: bool,
        question: str,
        history: list[dict[str, Any]],
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        decoder: str = PLAIN,
        request: gr.Request | None = None,
    ) -> Iterator[Updates]:
        """Ask, and let the answer grow in the last message; an error becomes a message too."""
        if not question.strip():
            yield {self.question: gr.update(placeholder="Type a question first")}
            return
        chat = chat or self.new_chat()
        media: dict[str, str] = {}
        title = ""
        if file is not None and not chat.holds(file):
            media = {media_kind_or_video(file): file}
            title = f"{Path(file).name}\n\n"
        history = [*history, {"role": "user", "content": as_html(title + question)}]
        asked = {self.chat: chat, self.history: history, self.question: ""}
        yield asked | self._ready(False)
        options: dict[str, Any] = {
            **media,
            "sound": sound_mode(sound),
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": int(max_new_tokens),
        }
        if decoder != PLAIN:
            options["decoding"] = {"type": decoder}
        for answer in growing_answer(chat, question, options):
            yield {self.history: [*history, {"role": "assistant", "content": as_html(answer)}]}
        with suppress(UserError):  # too large: released, the next question reads the file again
            self.visits.note(visit_of(request), chat)
        yield self._ready(True)

    def leave(self, request: gr.Request) -> None:
        """Forget the chat of a visitor who has closed the page."""
        self.visits.end(visit_of(request))

    def stop_answer(self, chat: Chat | None) -> None:
        """End the answer that is being generated."""
        if chat is not None:
            chat.stop()

    def forget(self, chat: Chat | None) -> Updates:
        """Forget the turns; an answer that is being generated is cancelled."""
        if chat is not None:
            chat.clear()
        return {self.history: [], self.question: "", **self._ready(True)}

    def start_again(self, chat: Chat | None) -> Updates:
        """Forget the turns and the file."""
        return self.forget(chat) | {self.file: None}

    def _ready(self, ready: bool) -> Updates:
        """Enable one of two buttons: Ask when ready, else Stop."""
        return {
            self.send: gr.update(interactive=ready),
            self.stop: gr.update(interactive=not ready),
        }

    def _view(self, perceived: Perceived | None, problem: str = "") -> Updates:
        """Show the encoders' view of a file, or the problem with it."""
        view: Updates = {
            self.facts: escaped(problem) or EMPTY,
            self.frames: gr.update(visible=False, value=None),
            self.spectrogram: gr.update(visible=False, value=None),
        }
        if perceived is None:
            return view
        view[self.facts] = facts(perceived)
        if perceived.frames is not None and len(perceived.frames):
            view[self.frames] = gr.update(visible=True, value=frame_pictures(perceived))
        if perceived.sound is not None:
            view[self.spectrogram] = gr.update(visible=True, value=sound_picture(perceived))
        return view


# ---- words and pictures ---------------------------------------------------------------------


def visit_of(request: gr.Request | None) -> str:
    """Return the key of a visit, which ends when its page is closed."""
    return "" if request is None else str(request.session_hash)


def sound_mode(use_sound: bool) -> str:
    """Return the chat's word for a video whose sound is used, or is not."""
    return "auto" if use_sound else "off"


def media_kind_or_video(file: str) -> str:
    """Return the kind of a file; one that cannot be read is a video, whose error comes later."""
    try:
        return media_kind(file)
    except ValueError:
        return "video"


# ---- the server -----------------------------------------------------------------------------


def main() -> None:
    """Load the checkpoint and serve the page until Ctrl-C."""
    arguments = parser().parse_args()
    hush_libraries()
    with exit_on_user_error():
        chat = load_chat(arguments)
    demo = Demo(chat, arguments.checkpoint.resolve().name)
    address = f"{arguments.host}:{arguments.port}"
    try:
        hosts = hosts_of(arguments.host, arguments.allow_host)
        limit = arguments.max_file_mb
        serve(demo, arguments.host, arguments.port, limit, hosts, prevent_thread_lock=True)
    except OSError as error:  # gradio's message speaks of settings that this program does not have
        raise SystemExit(
            f"error: cannot listen on {address}; another program may be there. Choose a --port"
        ) from error
    print(f"{TITLE}: http://{address} (Ctrl-C ends it)", flush=True)
    demo.page.block_thread()


def serve(
    demo: Demo, host: str, port: int, max_file_mb: int, hosts: list[str], **options: Any
) -> tuple[Any, str, str]:
    """Launch the page, without share link, analytics, SSR or files other than uploads."""
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=["monospace"]
    )
    return demo.page.queue(default_concurrency_limit=1, max_size=1000).launch(
        server_name=host,
        server_port=port,
        share=False,
        allowed_paths=[],
        max_file_size=max_file_mb * 2**20,
        ssr_mode=False,
        run_history=False,
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]},
        show_error=True,
        enable_monitoring=False,
        footer_links=[],
        quiet=True,
        theme=theme,
        css=CSS,
        **options,
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command_line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(command_line)
    add = command_line.add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="0.0.0.0 opens the page to the network: it has no password",
    )
    add("--port", type=int, default=7860)
    add("--allow-host", action="append", default=[], help="a further name of this server")
    add("--max-file-mb", type=int, default=200, help="largest upload")
    return command_line


if __name__ == "__main__":
    main()
