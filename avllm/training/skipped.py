"""Rows that could not be used: named in ``skipped.jsonl``, counted, never replaced; too many stop the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from avllm import distributed
from avllm.data.items import Bad, Items
from avllm.errors import UserError
from avllm.log import logger
from avllm.training.progress import keep_until
from avllm.training.resume import write_atomic

LOG = logger(__name__)
ENOUGH = 100
"""Rows that have to be seen (or the whole epoch, if shorter) before the share of bad ones means something."""


class SkipRateError(UserError):
    """More rows are bad than ``max_skip_rate`` allows."""


def in_quarantine(sets: Sequence[Items], max_rate: float) -> list[Bad]:
    """The rows that quarantine files leave out, those of training and validation.

    Args:
        sets: the items of each. max_rate: largest share of their rows.

    Raises:
        SkipRateError: too many are left out.
    """
    bad = list(dict.fromkeys(b for items in sets for b in items.quarantined))
    named = ", ".join(f"{n} {key}" for key, n in Counter(f"{b.source}/{b.reason}" for b in bad).most_common())
    for items in sets:
        out, rows = len(items.quarantined), len(items.rows) + len(items.quarantined)
        if out > max_rate * rows:
            raise SkipRateError(
                f"{out} of {rows} rows are in quarantine ({out / rows:.1%}), more than max_skip_rate = "
                f"{max_rate:.1%}: {named}. Repair the media and check again, or raise data.max_skip_rate"
            )
    if bad and distributed.is_main():
        LOG.info("in quarantine: %s (%d rows)", named, len(bad))
    return bad


class Skipped:
    """The run's account of bad rows.

    Args:
        run: the run's folder.
        max_rate: share of bad rows above which the run stops.
        epoch: manifest rows in an epoch.
        counts: by ``source/reason``, and seen: rows looked at, of a run that goes on; step: where it stands.
    """

    def __init__(self, run: Path, max_rate: float, epoch: int, counts: dict[str, int], seen: int, step: int) -> None:
        self.path, self.max_rate, self.enough = run / "skipped.jsonl", max_rate, min(ENOUGH, epoch)
        self.counts, self.seen = Counter(counts), seen
        self.named: set[Bad] = set()
        if distributed.is_main():
            keep_until(self.path, step)

    def set_aside(self, bad: list[Bad]) -> None:
        """Write down rows in quarantine, at step 0, in the place of those that an earlier start may have left."""
        if not distributed.is_main() or not (bad or self.path.is_file()):
            return
        # not splitlines: an id may hold U+2028, which JSON leaves as it is
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1] if self.path.is_file() else []
        later = [line for line in lines if json.loads(line)["step"] > 0]
        first = [json.dumps({"step": 0, **b.to_dict()}, ensure_ascii=False) for b in bad]
        write_atomic(self.path, "".join(line + "\n" for line in first + later))

    def add(self, bad: list[Bad], seen: int, step: int) -> None:
        """Account for the rows of an optimizer step (of all processes).

        Raises:
            SkipRateError: too many are bad.
        """
        self.seen += seen
        self.counts.update(f"{b.source}/{b.reason}" for b in bad)
        if bad and distributed.is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **b.to_dict()}, ensure_ascii=False) + "\n" for b in bad)
            for b in bad:
                LOG.warning("left out %s (%s): %s: %s", b.id, b.source, b.reason, b.detail)
        self.check()

    def in_validation(self, bad: list[Bad]) -> int:
        """Name the validation rows (of all processes) that were left out, each once; returns how many there are."""
        everyones = [b for part in distributed.gather_objects(bad) for b in part]
        for b in everyones:
            if b not in self.named and distributed.is_main():
                LOG.warning("validation goes without %s (%s): %s: %s", b.id, b.source, b.reason, b.detail)
        self.named.update(everyones)
        return len(everyones)

    def check(self) -> None:
        """Stop when the share of bad rows is too high, once enough rows were seen."""
        total = sum(self.counts.values())
        if self.seen >= self.enough and total > self.max_rate * self.seen:
            raise SkipRateError(
                f"{total} of {self.seen} rows are bad ({total / self.seen:.1%}), more than max_skip_rate = "
                f"{self.max_rate:.1%}: {self.summary()}. They are named in {self.path}; repair the manifest, or raise "
                "data.max_skip_rate"
            )

    def summary(self) -> str:
        """``3 source/reason, 1 source/reason``."""
        return ", ".join(f"{n} {key}" for key, n in self.counts.most_common()) or "none"
