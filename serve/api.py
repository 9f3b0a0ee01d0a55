"""The Python API in a page: python serve/api.py CHECKPOINT clip.mp4 "What do you hear?" "And what do you see?"

Each further question is a further turn of the same chat.
"""

from __future__ import annotations

import sys

from avllm import Chat
from avllm.inference.chat import media_kind


def main(checkpoint: str, file: str, *questions: str) -> None:
    """Load a checkpoint, ask about a file, print the answers while they are made."""
    chat = Chat.load(checkpoint)  # device="cuda", quantize="4bit", ...
    media = {media_kind(file): file}  # video=, audio= or image=; a list of files asks about several

    for question in questions:
        print(f"> {question}")
        for piece in chat.ask(question, **media, max_new_tokens=64):  # greedy; temperature=0.7, top_p=0.9 draws
            print(piece, end="", flush=True)
        print()
        media = {}  # it stays in the history

    for item in chat.perceived:  # what the encoders really got
        seen = "no frames" if item.frames is None else f"{len(item.frames)} frames of {tuple(item.frames.shape[1:3])}"
        heard = "no sound" if item.sound is None else f"{len(item.sound.x) / item.sound.rate:.2f} s of sound"
        print(f"{item.part.path}: {item.duration:.2f} s, {seen}, {heard}, tokens {item.tokens}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
