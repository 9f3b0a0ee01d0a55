"""Set up the logger: rich on a terminal, plain lines elsewhere.

Only the main process logs below WARNING.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings


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
    """Silence loading bars and notices of transformers and DeepSpeed: a person reads the output."""
    # DeepSpeed offers no level; this filter exists before DeepSpeed makes its logger.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        set_verbosity_error()
