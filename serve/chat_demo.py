"""Chat about a clip in the browser: python serve/chat_demo.py CHECKPOINT [--host 127.0.0.1 --port 7860]

Drop a video, a sound or a picture and ask. The page shows what the model really got of it: the frames as they were
resized and cropped, the sound as its encoder takes it. Nothing leaves the machine.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gradio as gr
from matplotlib.figure import Figure
from PIL import Image

from avllm.errors import exit_on_user_error
from avllm.inference.chat import Chat, media_kind
from avllm.inference.perceived import Perceived
from avllm.log import hush_libraries
from avllm.registry import choices

TITLE = "Ask about a clip"
HELP = "Drop a video, a sound or a picture, then ask. A new file joins the chat with the next question."
EMPTY = "Nothing yet: once a file is there, this shows the frames and the sound as the model gets them."
FILE_TYPES = ["video", "audio", "image"]
FONT = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]  # of the system: a web font would be fetched
CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
#facts {color: var(--body-text-color-subdued); font-size: 0.9em}
#frames .grid-wrap {min-height: 0 !important; max-height: 420px}
"""
NOTHING = "*(the model said nothing)*"
PLAIN = "none"
REDRAW = 0.04  # seconds between two drawings of an answer that grows
Updates = dict[Any, Any]


class Demo:
    """The page and its events. Each visitor gets a separate chat with the one model.

    Args:
        chat: its model and processor are used; its history is not.
        name: of the checkpoint, shown on the page.
    """

    def __init__(self, chat: Chat, name: str) -> None:
        self.model, self.processor, self.name = chat.model, chat.processor, name
        with gr.Blocks(title=f"{TITLE} - {name}", analytics_enabled=False, delete_cache=(3600, 3600)) as self.page:
            self._layout()
            self._events()

    def new_chat(self) -> Chat:
        """A chat without history on the demo's model."""
        return Chat(self.model, self.processor)

    # ---- the page -------------------------------------------------------------------------------------------------

    def _layout(self) -> None:
        self.chat = gr.State(None)  # a Chat from the first event on; copying one would copy the model
        gr.Markdown(f"# {TITLE}\n{HELP} Model: `{self.name}`")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=360):
                self._media_column()
            with gr.Column(scale=6, min_width=400):
                self._chat_column()

    def _media_column(self) -> None:
        self.file = gr.File(label="Video, sound or picture", file_types=FILE_TYPES, elem_id="file", height=150)
        self.video = gr.Video(
            visible=False, interactive=False, show_label=False, height=240, elem_id="video", buttons=[]
        )
        self.audio = gr.Audio(visible=False, interactive=False, show_label=False, elem_id="audio", buttons=[])
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
        self.spectrogram = gr.Image(
            visible=False, show_label=False, interactive=False, elem_id="spectrogram", buttons=["fullscreen"]
        )

    def _chat_column(self) -> None:
        self.history = gr.Chatbot(
            show_label=False,
            height=520,
            elem_id="chat",
            buttons=["copy"],
            feedback_options=None,
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
            self.temperature = gr.Slider(
                0.0, 2.0, value=0.0, step=0.05, label="Temperature", info="0 = greedy: the same answer each time"
            )
            self.top_p = gr.Slider(
                0.05, 1.0, value=1.0, step=0.05, label="Top-p", info="only when the temperature is above 0"
            )
            self.most = gr.Slider(1, 1024, value=128, step=1, label="Longest answer, in tokens")
            # A choice rather than free text: a decoder may be named by a module, which a visitor must not choose.
            self.decoder = gr.Dropdown([PLAIN, *choices("decoders")], value=PLAIN, label="Decoder", elem_id="decoder")

    def _events(self) -> None:
        view = [self.facts, self.frames, self.spectrogram]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        looked = [self.chat, self.file, self.sound]
        model = {**private, "concurrency_id": "model"}  # one at a time: they share the weights and the chat
        self.file.change(self.look, looked, [self.chat, self.video, self.audio, *view], **model)
        self.sound.change(self.switch_sound, looked, [self.chat, *view], **model)
        asked = gr.on(
            [self.question.submit, self.send.click],
            self.ask,
            [*looked, self.question, self.history, self.temperature, self.top_p, self.most, self.decoder],
            [self.chat, self.history, self.question, self.send, self.stop],
            **model,
        )
        self.stop.click(self.stop_answer, self.chat, queue=False, **private)
        # The file goes too, and look() hides the rest; the chat's own bin keeps the file.
        buttons = [self.history, self.question, self.send, self.stop]
        self.clear.click(self.start_again, self.chat, [*buttons, self.file], queue=False, cancels=asked, **private)
        self.history.clear(self.forget, self.chat, buttons, queue=False, cancels=asked, **private)

    # ---- its events -----------------------------------------------------------------------------------------------

    def look(self, chat: Chat | None, file: str | None, sound: bool) -> Updates:
        """A file came or went: play it, and show what the model would get of it."""
        chat = chat or self.new_chat()
        hidden = {
            self.chat: chat,
            self.video: gr.update(visible=False, value=None),
            self.audio: gr.update(visible=False, value=None),
        }
        if file is None:
            return hidden | self._view(None)
        try:
            kind = media_kind(file)
            seen = chat.look(**{kind: file}, sound="auto" if sound else "off")[0]
        except (ValueError, OSError) as error:
            return hidden | self._view(None, readable(error))
        players = {"video": self.video, "audio": self.audio}
        shown = {players[kind]: gr.update(visible=True, value=file)} if kind in players else {}
        return hidden | shown | self._view(seen)

    def switch_sound(self, chat: Chat | None, file: str | None, sound: bool) -> Updates:
        """The videos' sound counts, or does not, from the next question on."""
        chat = chat or self.new_chat()
        chat.use_sound("auto" if sound else "off")
        found = self.look(chat, file, sound)
        return {part: value for part, value in found.items() if part not in (self.video, self.audio)}

    def ask(
        self,
        chat: Chat | None,
        file: str | None,
        sound: bool,
        question: str,
        history: list[dict[str, Any]],
        temperature: float,
        top_p: float,
        most: float,
        decoder: str = PLAIN,
    ) -> Iterator[Updates]:
        """Ask, and let the answer grow in the last message; what goes wrong becomes a message too."""
        if not question.strip():
            yield {self.question: gr.update(placeholder="Type a question first")}
            return
        chat = chat or self.new_chat()
        media = {} if file is None or in_history(chat, file) else {media_kind_or_video(file): file}
        shown = [*history, {"role": "user", "content": with_name(question, file if media else None)}]
        yield {
            self.chat: chat,
            self.history: shown,
            self.question: "",
            **self._ready(False),
        }
        answer = ""
        try:
            settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_new_tokens": int(most)}
            if decoder != PLAIN:
                settings["decoding"] = {"type": decoder}
            pieces = chat.ask(question, **media, sound="auto" if sound else "off", **settings)
            drawn = 0.0
            for piece in pieces:
                answer += piece
                if time.monotonic() - drawn > REDRAW:
                    drawn = time.monotonic()
                    yield {self.history: [*shown, {"role": "assistant", "content": answer}]}
            yield {self.history: [*shown, {"role": "assistant", "content": answer or NOTHING}]}
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory, and the like
            yield {self.history: [*shown, {"role": "assistant", "content": answer + failed(error)}]}
        finally:
            chat.stop()
        yield self._ready(True)

    def stop_answer(self, chat: Chat | None) -> None:
        """End the answer that is being made."""
        if chat is not None:
            chat.stop()

    def forget(self, chat: Chat | None) -> Updates:
        """Forget the turns; an answer that is being made is cancelled."""
        if chat is not None:
            chat.clear()
        return {self.history: [], self.question: "", **self._ready(True)}

    def start_again(self, chat: Chat | None) -> Updates:
        """Forget the turns and the file."""
        return self.forget(chat) | {self.file: None}

    def _ready(self, ready: bool) -> Updates:
        """Ask or stop: one of the two can be pressed."""
        return {self.send: gr.update(interactive=ready), self.stop: gr.update(interactive=not ready)}

    def _view(self, seen: Perceived | None, problem: str = "") -> Updates:
        pictures = [] if seen is None or seen.frames is None else gallery(seen)
        curve = None if seen is None or seen.sound is None else spectrogram(seen)
        return {
            self.facts: facts(seen) if seen else problem or EMPTY,
            self.frames: gr.update(visible=bool(pictures), value=pictures or None),
            self.spectrogram: gr.update(visible=curve is not None, value=curve),
        }


# ---- words and pictures -------------------------------------------------------------------------------------------


def readable(error: BaseException) -> str:
    """An error for a visitor: what is wrong, without the server's folders."""
    path = getattr(error, "path", None)
    text = str(error).strip() or type(error).__name__
    return f"⚠️ {text.replace(path, Path(path).name) if path else text}"


def failed(error: BaseException) -> str:
    """Return the message that is shown in place of an answer."""
    return f"{readable(error)}\n\n*This question is not part of the chat; ask again, or drop another file.*"


def media_kind_or_video(file: str) -> str:
    """The kind of a file; what cannot be read counts as video, and reading it says why it cannot."""
    try:
        return media_kind(file)
    except ValueError:
        return "video"


def in_history(chat: Chat, file: str) -> bool:
    """Return whether a turn of the chat already holds the file."""
    return any(getattr(part, "path", None) == file for message in chat.messages for part in message.content)


def with_name(question: str, file: str | None) -> str:
    """Return the question as the chat shows it, under the name of the file that comes with it."""
    return question if file is None else f"`{Path(file).name}`\n\n{question}"


def facts(seen: Perceived) -> str:
    """One line of numbers: seconds, frames, sound, tokens."""
    pieces = [f"**{Path(seen.part.path).name}**"]
    if seen.duration:
        pieces.append(f"{seen.duration:.2f} s")
    if seen.frames is not None:
        count, height, width = seen.frames.shape[:3]
        pieces.append(f"{count} frame{'s' if count != 1 else ''} of {width} x {height}")
    if seen.sound is not None:
        pieces.append(f"{len(seen.sound.x) / seen.sound.rate:.2f} s of sound at {seen.sound.rate / 1000:g} kHz")
    elif seen.part.type == "video":
        pieces.append("no sound")
    pieces += [f"{count} {stream} tokens" for stream, count in seen.tokens.items()]
    return " · ".join(pieces)


def gallery(seen: Perceived) -> list[tuple[Image.Image, str]]:
    """Frames with the seconds that each stands for."""
    assert seen.frames is not None
    assert seen.span is not None
    pairs = zip(seen.frames, seen.span.tolist(), strict=True)
    return [(Image.fromarray(x.numpy()), f"{a:.2f}-{b:.2f} s" if b > a else "") for x, (a, b) in pairs]


def spectrogram(seen: Perceived) -> Image.Image:
    """The waveform, and below it the encoder's own bands (or, for encoders of the waveform, a spectrogram of it)."""
    sound = seen.sound
    assert sound is not None
    seconds = len(sound.x) / sound.rate
    extent = (sound.start, sound.start + seconds)
    figure = Figure(figsize=(7.2, 3.0), dpi=110, layout="constrained")
    wave, bands = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.2])
    step = max(1, len(sound.x) // 4000)
    wave.plot([sound.start + i / sound.rate for i in range(0, len(sound.x), step)], sound.x[::step], linewidth=0.5)
    wave.set_ylabel("waveform")
    if seen.spectrogram is not None:
        place = (*extent, 0, len(seen.spectrogram))
        bands.imshow(seen.spectrogram, origin="lower", aspect="auto", extent=place, cmap="magma")
        bands.set_ylabel("mel band")
    else:
        width = min(256, len(sound.x))
        bands.specgram(sound.x, width, sound.rate, noverlap=width // 2, xextent=extent, cmap="magma")
        bands.set_ylabel("Hz (for the eye only)")
    bands.set_xlabel("seconds of the clip")
    bands.set_xlim(*extent)
    for axes in (wave, bands):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


# ---- the server ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Load the checkpoint and serve the page until Ctrl-C."""
    arguments = parser().parse_args()
    hush_libraries()
    with exit_on_user_error():
        chat = Chat.load(
            arguments.checkpoint, device=arguments.device, quantize=arguments.quantize, allow_parts=arguments.allow_part
        )
    demo = Demo(chat, arguments.checkpoint.resolve().name)
    try:
        serve(demo, arguments.host, arguments.port, arguments.max_file_mb, prevent_thread_lock=True)
    except OSError as error:  # gradio's own message speaks of settings that this program does not have
        raise SystemExit(
            f"error: cannot listen on {arguments.host}:{arguments.port}; another program may be there. Choose a --port"
        ) from error
    print(f"{TITLE}: http://{arguments.host}:{arguments.port} (Ctrl-C ends it)", flush=True)
    demo.page.block_thread()


def serve(demo: Demo, host: str, port: int, max_file_mb: int, **options: Any) -> tuple[Any, str, str]:
    """Launch: this machine only by default, no share link, no files but uploads, no analytics, no SSR."""
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=["monospace"])
    return demo.page.queue(default_concurrency_limit=1, max_size=32).launch(
        server_name=host,
        server_port=port,
        share=False,
        allowed_paths=[],
        max_file_size=max_file_mb * 2**20,
        ssr_mode=False,
        show_error=True,
        enable_monitoring=False,
        footer_links=[],
        quiet=True,
        theme=theme,
        css=CSS,
        **options,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("checkpoint", type=Path, help="folder of a trained model")
    found.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network: it has no password")
    found.add_argument("--port", type=int, default=7860)
    found.add_argument("--max-file-mb", type=int, default=200, help="largest upload")
    found.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    found.add_argument(
        "--allow-part", action="append", default=[], help="pkg.module:Class that the checkpoint may name"
    )
    found.add_argument("--quantize", choices=["4bit", "8bit"], help="load the LLM in 4 or 8 bit")
    return found


if __name__ == "__main__":
    main()
