"""Set up the logger: rich on a terminal, plain lines elsewhere.

Only the main process logs below WARNING.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

LIBRARIES = (
    "accelerate",
    "avllm",  # a library's warning about the call that avllm makes
    "bitsandbytes",
    "deepspeed",
    "gradio",
    "huggingface_hub",
    "peft",
    "torch",
    "torchaudio",
    "torchvision",
    "transformers",
)
"""Modules whose Python warnings are about the versions that avllm was made with."""


def logger(name: str = "avllm") -> logging.Logger:
    """Return a module's logger, below ``avllm``: one call of :func:`set_up` reaches all loggers."""
    return logging.getLogger(name if name.startswith("avllm") else f"avllm.{name}")


def set_up(level: int = logging.INFO, rank: int | None = None) -> logging.Logger:
    """Give the ``avllm`` logger its one handler; a second call changes the level alone.

    Args:
        level: of the main process; every other rank logs from WARNING on.
        rank: of this process; read from the launcher's ``RANK`` when None.
    """
    # PEFT asks transformers for it; the user of a run cannot change that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    root = logging.getLogger("avllm")
    if rank is None:
        rank = int(os.environ.get("RANK", "0"))
    root.setLevel(level if rank == 0 else logging.WARNING)
    if not root.handlers:
        root.addHandler(_handler())
        root.propagate = False
    return root


def _handler() -> logging.Handler:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(console=Console(stderr=True), show_path=False, markup=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    return handler


def hush_libraries() -> None:
    """Keep what libraries say below an error off stderr: loading bars, notices, FutureWarnings.

    avllm itself says things by its loggers alone, which stay, as do the warnings of users' parts.
    """
    for name in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
    # Loggers without a handler print through this one.
    if logging.lastResort is not None and not logging.lastResort.filters:
        logging.lastResort.addFilter(_is_ours_or_error)
    for name in ("DeepSpeed", "huggingface_hub"):  # they have handlers, and no level to be set
        logging.getLogger(name).addFilter(_is_ours_or_error)
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        set_verbosity_error()


def _is_ours_or_error(record: logging.LogRecord) -> bool:
    return record.name.startswith("avllm") or record.levelno >= logging.ERROR
