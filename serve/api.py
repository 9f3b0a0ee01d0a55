"""Ask about a file through the Python API.

    python serve/api.py CHECKPOINT clip.mp4 "What do you hear?" "And what do you see?"

Each further question is a further turn of the same chat.
"""

from __future__ import annotations

import sys

from avllm import Chat
from avllm.inference.asked_files import media_kind


def main(checkpoint: str, file: str, *questions: str) -> None:
    """Load a checkpoint, ask about a file, print the answers while they are generated."""
    chat = Chat.load(checkpoint)  # device="cuda", quantize="4bit", ...
    media = {media_kind(file): file}  # video=, audio= or image=; a list of files asks about several

    for question in questions:
        print(f"> {question}")
        # Greedy; temperature=0.7, top_p=0.9 draws.
        for piece in chat.ask(question, **media, max_new_tokens=64):
            print(piece, end="", flush=True)
        print()
        media = {}  # the file stays in the history

    for item in chat.perceived:  # the encoders' view of each file
        frames = "no frames"
        if item.frames is not None:
            frames = f"{len(item.frames)} frames of {tuple(item.frames.shape[1:3])}"
        sound = "no sound"
        if item.sound is not None:
            sound = f"{len(item.sound.x) / item.sound.rate:.2f} s of sound"
        size = f"{item.duration:.2f} s, {frames}, {sound}, tokens {item.tokens}"
        print(f"{item.part.path}: {size}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
