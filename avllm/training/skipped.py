"""Name unusable rows in ``skipped.jsonl``, count them, and stop when they are too many.

Such rows are left out and never replaced by others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from avllm import distributed
from avllm.data.items import Bad, Items
from avllm.data.store.append_only import write_whole
from avllm.errors import UserError, writing
from avllm.log import logger
from avllm.training.progress import keep_until

LOG = logger(__name__)
ENOUGH = 100
"""Rows to be seen (or the whole epoch, if shorter) before the share of bad ones counts."""
WARNED = 3
"""Rows of a source and reason that get a line in the log each."""


class SkipRateError(UserError):
    """More rows are bad than ``max_skip_rate`` allows."""


def in_quarantine(sets: Sequence[Items], max_rate: float) -> list[Bad]:
    """Return the rows that quarantine files leave out of training and validation, each once.

    Args:
        sets: the items of training, and those of validation if there are any.
        max_rate: largest share of a set's rows that may be left out.

    Raises:
        SkipRateError: too many are left out.
    """
    bad = list(dict.fromkeys(row for items in sets for row in items.quarantined))
    named = _in_words(_reasons(bad))
    for items in sets:
        out = len(items.quarantined)
        rows = len(items.rows) + out
        if out > max_rate * rows:
            raise SkipRateError(
                f"{out} of {rows} rows are in quarantine ({out / rows:.1%}), more than "
                f"max_skip_rate = {max_rate:.1%}: {named}. Repair the media and check again, or "
                "raise data.max_skip_rate"
            )
    if bad and distributed.is_main():
        LOG.info("in quarantine: %s (%d rows)", named, len(bad))
    return bad


def _reasons(bad: Sequence[Bad]) -> Counter[str]:
    """Count rows by ``source/reason``."""
    return Counter(f"{row.source}/{row.reason}" for row in bad)


def _in_words(counts: Counter[str]) -> str:
    """Return ``3 source/reason, 1 source/reason``, the largest first."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


class Skipped:
    """Keep the account of a run's bad rows.

    Args:
        run: the run's folder.
        max_rate: share of bad rows above which the run stops.
        epoch: manifest rows in an epoch.
        counts: bad rows by ``source/reason`` before this start, of a run that goes on.
        seen: manifest rows looked at before this start.
        step: the step at which the run goes on; lines of later steps are dropped from the file.
    """

    def __init__(
        self, run: Path, max_rate: float, epoch: int, counts: dict[str, int], seen: int, step: int
    ) -> None:
        self.path = run / "skipped.jsonl"
        self.max_rate = max_rate
        self.enough = min(ENOUGH, epoch)
        self.counts = Counter(counts)
        self.seen = seen
        self.named: set[Bad] = set()
        self.warned: Counter[tuple[str, str, str]] = Counter()
        if distributed.is_main():
            keep_until(self.path, step)

    def set_aside(self, bad: list[Bad]) -> None:
        """Write the rows in quarantine at step 0, in place of those of an earlier start."""
        if not distributed.is_main() or not (bad or self.path.is_file()):
            return
        lines: list[str] = []
        if self.path.is_file():
            # Not splitlines: an id may hold U+2028, which JSON leaves unchanged.
            lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        later = [line for line in lines if json.loads(line)["step"] > 0]
        first = [_line(0, row) for row in bad]
        write_whole(self.path, "".join(line + "\n" for line in first + later))

    def add(self, bad: list[Bad], seen: int, step: int) -> None:
        """Count the rows of an optimizer step (of all processes) and write down the bad ones.

        Raises:
            SkipRateError: too many are bad.
        """
        self.seen += seen
        self.counts.update(_reasons(bad))
        if bad and distributed.is_main():
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.writelines(_line(step, row) + "\n" for row in bad)
            for row in bad:
                self._warn("left out", row)
        self.check()

    def in_validation(self, bad: list[Bad]) -> int:
        """Name the validation rows (of all processes) that were left out, each once.

        Returns:
            Their number, those included that were named before.
        """
        of_all = [row for part in distributed.gather_objects(bad) for row in part]
        for row in of_all:
            if row not in self.named and distributed.is_main():
                self._warn("validation goes without", row)
        self.named.update(of_all)
        return len(of_all)

    def _warn(self, what: str, row: Bad) -> None:
        """Say in the log that a row is left out; after a few of a kind, where the others are."""
        kind = (what, row.source, row.reason)
        self.warned[kind] += 1
        if self.warned[kind] <= WARNED:
            about = (what, row.id, row.source, row.reason, row.detail)
            LOG.warning("%s %s (%s): %s: %s", *about)
        elif self.warned[kind] == WARNED + 1:
            where = "" if what != "left out" else f"; {self.path} names each"
            LOG.warning("%s further rows of %s: %s%s", what, row.source, row.reason, where)

    def check(self) -> None:
        """Stop when the share of bad rows is too high, once enough rows were seen."""
        total = sum(self.counts.values())
        if self.seen >= self.enough and total > self.max_rate * self.seen:
            raise SkipRateError(
                f"{total} of {self.seen} rows are bad ({total / self.seen:.1%}), more than "
                f"max_skip_rate = {self.max_rate:.1%}: {self.summary()}. They are named in "
                f"{self.path}; repair the manifest, or raise data.max_skip_rate"
            )

    def summary(self) -> str:
        """Return ``3 source/reason, 1 source/reason``, or ``none``."""
        return _in_words(self.counts) or "none"


def _line(step: int, row: Bad) -> str:
    return json.dumps({"step": step, **row.to_dict()}, ensure_ascii=False)
