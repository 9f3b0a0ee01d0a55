"""The one logger set-up: rich on a terminal, plain lines elsewhere; only the main process speaks below WARNING."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def logger(name: str = "avllm") -> logging.Logger:
    """The logger of a module, always below ``avllm`` so that one call of :func:`set_up` reaches all of them."""
    return logging.getLogger(name if name.startswith("avllm") else f"avllm.{name}")


def set_up(level: int = logging.INFO, rank: int | None = None) -> logging.Logger:
    """Give the ``avllm`` logger its one handler. Calling it again changes the level and adds nothing.

    Args:
        level: of the main process; every other rank speaks from WARNING on.
        rank: of this process; read from the launcher's ``RANK`` when None.
    """
    # PEFT asks transformers for it; who trains can do nothing about that
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    root = logging.getLogger("avllm")
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
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
    """No loading bars and notices of transformers and DeepSpeed: for commands whose output a person reads."""
    # DeepSpeed takes no level from outside; the filter is there before it makes its logger.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        set_verbosity_error()
