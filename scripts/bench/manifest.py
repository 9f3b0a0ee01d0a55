"""Measure what a large manifest costs before the first step, with and without its index.

    python scripts/bench/manifest.py [--rows 1000000] [--workers 2] [--json]

Writes a manifest of caption rows (each clip is asked about three times), then starts its data side
as training does, in a separate process: the index, packing by media, the order, and the first
batches of rows out of loader workers. Once without a kept index, once with it. Memory is what the
process and its children together have more than before: at the end, and at most. The mapped index
counts in full; pages of libraries do not: they are shared with whatever else runs on the machine,
so that its coming and going would be measured. Decoding and models are left out: nothing of them
depends on the number of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from avllm.data.manifest import write_manifest
from avllm.evaluation.environment import environment

SECONDS = 20.0
MEMORY = 300.0  # MiB
BATCHES = 50
BATCH_SIZE = 16
CAPTION = (
    "A young man walks along the beach at sunset, waves roll onto the sand and seagulls cry "
    "in the distance: take {}."
)


def caption_row(number: int) -> dict[str, Any]:
    """Return a row as recipes of captions write it."""
    clip = {
        "type": "video",
        "video": f"videos/{number // 3 % 1000:03d}/{number // 3:09d}.mp4",
        "start": 1.5,
        "end": 9.25,
    }
    ask = {"type": "text", "text": "Describe what is seen and heard in this clip in one sentence."}
    answer = {"role": "assistant", "content": [{"type": "text", "text": CAPTION.format(number)}]}
    return {
        "id": f"bench-{number:09d}",
        "source": "bench",
        "licence": "none",
        "messages": [{"role": "user", "content": [clip, ask]}, answer],
    }


class Memory:
    """Samples the memory of this process and its children in MiB; shared pages are split."""

    def __init__(self) -> None:
        self.before = self.now()
        self.most = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Sum of the proportional set sizes without what is mapped from files."""
        return sum(self._share(pid) for pid in [os.getpid(), *self._children(os.getpid())])

    def _children(self, pid: int) -> list[int]:
        children = Path(f"/proc/{pid}/task").glob("*/children")
        figures = [int(child) for path in children for child in path.read_text().split()]
        return figures + [grandchild for child in figures for grandchild in self._children(child)]

    @staticmethod
    def _share(pid: int) -> float:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended
            return 0.0
        return (
            sum(
                int(line.split()[1])
                for line in lines
                if line.startswith(("Pss_Anon:", "Pss_Shmem:"))
            )
            / 1024
        )

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            self.most = max(self.most, self.now() - self.before)

    def stop(self) -> float:
        """Return the most there was above the beginning."""
        self._end.set()
        self._thread.join()
        return self.most


def start(manifest: Path, workers: int) -> dict[str, float]:
    """Start the data side in this process; seconds of each part, MiB."""
    from torch.utils.data import DataLoader

    from avllm.data.items import Items
    from avllm.data.loader import Cut, MicroBatches
    from avllm.data.mixture import Order

    memory = Memory()
    began = time.perf_counter()
    items = Items([manifest], pack=True)
    indexed = time.perf_counter()
    order = Order(items.sizes, [1.0], seed=0)
    batches = MicroBatches(order, Cut(BATCH_SIZE), 0, BATCHES)
    loader: DataLoader[Any] = DataLoader(
        _Rows(items),  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
    )
    first = 0.0
    rows = 0
    for batch in loader:
        first = first or time.perf_counter() - began
        rows += sum(batch)
    assert rows > BATCHES * BATCH_SIZE
    held = memory.now() - memory.before
    mapped = sum(m.rows.nbytes for m in items.manifests if isinstance(m.rows, np.memmap)) / 2**20
    took = {"index_s": indexed - began, "first_batch_s": first}
    return {**took, "held_mib": held + mapped, "most_mib": memory.stop() + mapped}


class _Rows:
    """Map-style: an item -> how many rows it has, all of them read."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __getitem__(self, key: tuple[int, int]) -> int:
        return len([self.items.sample(place) for place in self.items[key[0]]])

    def __len__(self) -> int:
        return len(self.items)


def measure(rows: int, workers: int) -> dict[str, Any]:
    """Return both starts, each in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "rows.jsonl"
        write_manifest(manifest, (caption_row(n) for n in range(rows)))
        figures: dict[str, Any] = {"rows": rows, "size_mb": manifest.stat().st_size / 1e6}
        for name in ("first", "again"):
            command = [
                sys.executable,
                __file__,
                "--start",
                str(manifest),
                "--workers",
                str(workers),
            ]
            variables = {**os.environ, "AVLLM_CACHE": f"{folder}/cache"}
            done = subprocess.run(
                command, capture_output=True, text=True, env=variables, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            figures[name] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--json", action="store_true", help="print one JSON object, as last line")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start is not None:
        print(json.dumps(start(args.start, args.workers)))
        return
    figures = measure(args.rows, args.workers)
    print(f"{figures['rows']:,} rows, {figures['size_mb']:,.0f} MB")
    for name in ("first", "again"):
        f = figures[name]
        print(
            f"{name:>6}: index {f['index_s']:.2f} s, first batch {f['first_batch_s']:.2f} s "
            f"(bar {SECONDS:g}), memory {f['held_mib']:.0f} MiB, "
            f"most {f['most_mib']:.0f} MiB (bar {MEMORY:g})"
        )
    figures["passed"] = (
        figures["first"]["first_batch_s"] <= SECONDS and figures["first"]["most_mib"] <= MEMORY
    )
    if args.json:
        print(json.dumps(figures | {"environment": environment()}))


if __name__ == "__main__":
    main()
