"""Describe the environment of a measurement: versions, commit, machine, time."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "av")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return the environment of a result, JSON-able.

    Args:
        device: on which it was computed.
    """
    import torch

    import avllm

    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "avllm": avllm.__version__,
        "commit": commit(Path(avllm.__file__).parent),
        "python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(folder: Path) -> str | None:
    """Return the commit of the checkout that the package lies in; None outside of one.

    ``+changes`` is appended when files differ from it.
    """
    head = _git(folder, "rev-parse", "HEAD")
    if head is None or _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # no checkout, or the package is installed below another project's
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    return f"{head}+changes" if changes else head


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command; None where it fails, or git is missing or too slow."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
