"""Add the options by which a script's model is loaded, and load it.

Torch is imported when the model is loaded, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avllm.inference.chat import Chat


def add_model_options(command_line: argparse.ArgumentParser) -> None:
    """Add the checkpoint and the options of :func:`load_chat` to a script's command line."""
    add = command_line.add_argument
    add("checkpoint", type=Path, help="folder of a trained model")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--quantize", choices=["4bit", "8bit"], help="load the LLM in 4 or 8 bit")
    add(
        "--backbone",
        action="append",
        default=[],
        metavar="PART=FOLDER",
        help="a backbone that lies elsewhere than the checkpoint says: llm=DIR, audio=DIR, ...",
    )
    add("--allow-part", action="append", default=[], help="pkg.module:Class it may name")
    add(
        "--strict",
        action="store_true",
        help="refuse files that the model can use in part only: a video that it only hears",
    )


def load_chat(arguments: argparse.Namespace) -> Chat:
    """Load the model that a script's options name.

    Raises:
        UserError: see :meth:`avllm.inference.chat.Chat.load`.
    """
    from avllm.inference.chat import Chat
    from avllm.models.checkpoint_format import read_backbones

    return Chat.load(
        arguments.checkpoint,
        device=arguments.device,
        quantize=arguments.quantize,
        backbones=read_backbones(arguments.backbone),
        allow_parts=arguments.allow_part,
        strict=arguments.strict,
    )
