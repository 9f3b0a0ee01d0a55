"""``avllm chat``: hold a conversation in the terminal, or answer questions that a pipe brings."""

from __future__ import annotations

import glob
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from avllm.cli.options import (
    AllowPart,
    Backbone,
    Checkpoint,
    Decoding,
    Device,
    LongestAnswer,
    Quantize,
    Sound,
    Strict,
    Temperature,
    TopP,
    check_sound,
    decoder_of,
    hush,
    load_chat,
)
from avllm.errors import OutageError, Stopped, UserError

if TYPE_CHECKING:
    from avllm.inference.chat import Chat

COMMANDS = {
    "/video": "PATH: the next question is about this video, too",
    "/audio": "PATH: ... about this sound, or the sound of this video",
    "/image": "PATH: ... about this picture",
    "/clear": "forget all turns and files",
    "/help": "show these lines",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}
KINDS = ("video", "audio", "image")


def chat(
    checkpoint: Checkpoint,
    sound: Sound = "auto",
    max_new_tokens: LongestAnswer = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    decoding: Decoding = None,
    device: Device = "cpu",
    quantize: Quantize = None,
    backbone: Backbone = None,
    allow_part: AllowPart = None,
    strict: Strict = False,
) -> None:
    """Chat about clips: /video PATH, then questions. Answers are on stdout, all else on stderr."""
    hush()
    check_sound(sound)
    generation = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "decoding": decoder_of(decoding),
    }
    loaded = load_chat(checkpoint, device, quantize, backbone, allow_part, strict)
    is_person = sys.stdin.isatty()
    talk = TerminalChat(loaded, sound, generation, is_person)
    if is_person:
        say("/help shows the commands; Ctrl-D ends")
    for line in typed_lines() if is_person else piped_lines():
        if not talk.read(line):
            break
    if talk.failed and not is_person:
        raise typer.Exit(1)


class TerminalChat:
    """Read a chat's lines: commands and questions.

    Args:
        chat: answers them.
        sound: whether the videos' own sound is used.
        generation: settings of each answer.
        is_person: the lines are typed: Ctrl-C ends an answer or a command, and not the chat.

    Attributes:
        files: those that the next question is about, by kind.
        failed: a line could not be read or answered.
    """

    def __init__(self, chat: Chat, sound: str, generation: dict[str, Any], is_person: bool) -> None:
        self.chat = chat
        self.sound = sound
        self.generation = generation
        self.is_person = is_person
        self.files: dict[str, list[str]] = {}
        self.failed = False

    def read(self, line: str) -> bool:
        """Follow a command or answer a question; return False when the chat is to end."""
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return False
        try:
            self._follow(command, rest.strip(), line.strip())
        except (Stopped, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            if not self.is_person:
                raise
            say("stopped")
        except (UserError, OutageError, OSError) as error:
            say(f"error: {error}")
            self.failed = True
        return True

    def _follow(self, command: str, rest: str, question: str) -> None:
        if not question:
            return
        if not command.startswith("/"):
            self._ask(question)
        elif command.removeprefix("/") in KINDS:
            self._add(command.removeprefix("/"), rest)
        elif command == "/clear":
            self.chat.clear()
            self.files = {}
        elif command == "/help":
            for name, about in COMMANDS.items():
                say(f"{name} {about}")
        else:
            from avllm.registry import suggest

            raise UserError(f"there is no command {command!r}; {suggest(command, list(COMMANDS))}")

    def _add(self, kind: str, path: str) -> None:
        """Read a file, say what the model gets of it, and keep it for the next question."""
        path = os.path.expanduser(path.strip("'\""))
        if not path:
            raise UserError(f"/{kind} is given no file; expected /{kind} PATH")
        files = self.files | {kind: [*self.files.get(kind, []), path]}
        for perceived in self.chat.look(**files, sound=self.sound):
            if perceived.part.path == path:
                say(", ".join([Path(path).name, *perceived.numbers]))
                for warning in perceived.warnings:
                    say(f"warning: {warning}")
        self.files = files

    def _ask(self, question: str) -> None:
        """Print the answer while it is generated; Ctrl-C ends it."""
        answered = False
        nothing: AbstractContextManager[list[int]] = nullcontext([])
        with stopping(self.chat) if self.is_person else nothing as stopped:
            pieces = self.chat.ask(question, **self.files, sound=self.sound, **self.generation)
            about_files = len(self.chat.warnings)  # said when they were added
            for piece in pieces:
                typer.echo(piece, nl=False)
                sys.stdout.flush()
                answered = True
                if stopped:  # before the answer began
                    self.chat.stop()
        typer.echo()
        self.files = {}
        for warning in self.chat.warnings[about_files:]:
            say(f"warning: {warning}")
        if not answered:
            say("(the model said nothing)")


def say(text: str) -> None:
    """Print a line that is no answer."""
    typer.echo(text, err=True)


@contextmanager
def stopping(chat: Chat) -> Iterator[list[int]]:
    """Let Ctrl-C end the answer of a block instead of the block.

    Yields:
        the signals so far.
    """
    signals: list[int] = []

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        chat.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def piped_lines() -> Iterator[str]:
    """Yield the lines of stdin."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line in other bytes is one error
    yield from sys.stdin


def typed_lines() -> Iterator[str]:
    """Yield the lines that a person types, until Ctrl-D; Tab completes commands and paths."""
    try:
        import readline
    except ImportError:  # not on every system
        pass
    else:
        readline.set_completer_delims("\n")
        readline.set_completer(complete)
        readline.parse_and_bind("tab: complete")
    prompt = "> " if sys.stdout.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except Stopped:
            raise
        except KeyboardInterrupt:  # Ctrl-C at the prompt: an empty line
            say("")
        except EOFError:
            say("")
            return


def complete(line: str, number: int) -> str | None:
    """Return one of a line's completions, as readline asks for them; None after the last."""
    command, space, path = line.partition(" ")
    if not space:
        lines = [f"{name} " for name in COMMANDS if name.startswith(line)]
    else:
        start = glob.escape(os.path.expanduser(path))
        paths = sorted(glob.glob(f"{start}*"))
        lines = [f"{command} {found}{'/' if os.path.isdir(found) else ''}" for found in paths]
    return lines[number] if number < len(lines) else None
