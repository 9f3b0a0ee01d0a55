"""The rows of several manifests, less those in quarantine, as items: what an order counts and a loader loads.

An item is one row or, when packing, the rows of a manifest that ask about the same media. Rows and items are numbers;
nothing is read but the manifests' indexes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from avllm import distributed
from avllm.data.index import Manifest, hash_of
from avllm.data.schema import Sample
from avllm.errors import UserError


@dataclass(frozen=True)
class Bad:
    """A row that was left out.

    Attributes:
        reason: ``missing``, ``zero_byte``, ``undecodable``, ... (see ``MediaError``), of ``RowError`` (``too_long``,
            ``empty_answer``, ...), or what the quarantine file says.
        detail: what was seen.
    """

    id: str
    source: str
    manifest: str
    reason: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """As ``skipped.jsonl`` holds it."""
        return asdict(self)


class Items:
    """Items of several manifests, numbered one after the other.

    Args:
        manifests: JSONL files, or URLs of them.
        pack: group rows with the same media.
        max_packed: most rows in one item.
        quarantine: reason by id of the rows that are left out, see :func:`read_quarantine`.

    Attributes:
        sizes: items of each manifest; row_counts: rows of each that are in an item.
        rows: ``(R,)`` places of all rows that are in an item, in the order of the manifests.
        quarantined: the rows that are left out.

    Raises:
        ManifestError: a manifest is missing or malformed. QuarantineError: no row of a manifest is left.
    """

    def __init__(
        self,
        manifests: Sequence[str | Path],
        *,
        pack: bool = False,
        max_packed: int = 32,
        quarantine: Mapping[str, str] | None = None,
    ) -> None:
        with distributed.main_first():  # what it indexed, the others find
            self.manifests = [Manifest(m) for m in manifests]
        self.firsts = np.cumsum([0, *(len(m) for m in self.manifests)])
        self.quarantined: list[Bad] = []
        self.sizes: list[int] = []
        self.row_counts: list[int] = []
        members, begins = [], []
        for number, manifest in enumerate(self.manifests):
            rows = self._good(number, quarantine or {})
            if not len(rows):
                raise QuarantineError(
                    f"all {len(manifest)} rows of {manifest.name} are in quarantine; repair the media and check them "
                    "again, or take the manifest out of the settings"
                )
            keys = manifest.rows["media"][rows] if pack else np.zeros(len(rows), np.uint64)
            order, begin = group(keys, max_packed)
            begins.append(begin + sum(self.row_counts))
            members.append(self.firsts[number] + rows[order])
            self.sizes.append(len(begin))
            self.row_counts.append(len(rows))
        self._members = np.concatenate(members)
        self._begins = np.concatenate([*begins, [len(self._members)]])
        self.rows = np.sort(self._members) if pack else self._members

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, item: int) -> list[int]:
        """The places of an item's rows."""
        return self._members[self._begins[item] : self._begins[item + 1]].tolist()

    def sample(self, place: int) -> Sample:
        """The row at a place."""
        number = self.manifest_number(place)
        return self.manifests[number][place - int(self.firsts[number])]

    def manifest_number(self, place: int) -> int:
        """Which manifest a place belongs to."""
        return int(np.searchsorted(self.firsts, place, side="right")) - 1

    def root(self, place: int) -> Path:
        """The folder that the media paths of a row start from."""
        return self.manifests[self.manifest_number(place)].root

    def bad(self, place: int, reason: str, detail: str) -> Bad:
        """A row with what is wrong with it."""
        sample = self.sample(place)
        return Bad(sample.id, sample.source, self.manifests[self.manifest_number(place)].name, reason, detail)

    def distinct_media(self, among: np.ndarray | None = None) -> np.ndarray:
        """Places of the first row of each set of media, in the order of the manifests.

        Args:
            among: ``(items,)`` bool, those that are looked at; None = all.
        """
        rows = self.rows if among is None else np.sort(self._members[np.repeat(among, np.diff(self._begins))])
        found = []
        for number, manifest in enumerate(self.manifests):
            own = rows[(rows >= self.firsts[number]) & (rows < self.firsts[number + 1])]
            keys = manifest.rows["media"][own - self.firsts[number]]
            firsts = np.sort(np.unique(keys, return_index=True)[1])
            found.append(own[firsts[keys[firsts] != 0]])
        return np.concatenate(found)

    def _good(self, number: int, quarantine: Mapping[str, str]) -> np.ndarray:
        """Rows of a manifest that are not in quarantine; the others are written down."""
        manifest = self.manifests[number]
        hashes = np.array([hash_of(id) for id in quarantine], np.uint64)
        suspects = np.flatnonzero(np.isin(manifest.rows["id"], hashes)) if len(hashes) else np.empty(0, np.int64)
        out = [int(row) for row in suspects if manifest[int(row)].id in quarantine]
        for row in out:
            place = int(self.firsts[number]) + row
            self.quarantined.append(self.bad(place, quarantine[manifest[row].id], "it stands in the quarantine file"))
        return np.delete(np.arange(len(manifest)), out)


def group(keys: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Put equal keys together, in the order of their first appearance; key 0 stays alone.

    Args:
        keys: ``(N,)``. largest: most members of a group; more make several groups.

    Returns:
        ``(N,)`` places in ``keys``, group by group, and where in it each group begins.
    """
    places = np.arange(len(keys))
    if not keys.any():
        return places, places
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    lead = np.where(keys == 0, places, first[inverse])  # the first place with the same key
    order = np.argsort(lead, kind="stable")
    lead = lead[order]
    starts = np.flatnonzero(np.diff(lead, prepend=-1))
    rank = places - np.repeat(starts, np.diff(starts, append=len(keys)))
    return order, np.flatnonzero(rank % largest == 0)


class QuarantineError(UserError):
    """A quarantine file that cannot be read (the message names file and line), or that leaves nothing."""


def read_quarantine(paths: Sequence[str | Path]) -> dict[str, str]:
    """Reason by id of the rows that shall be left out: lines of ``id``, tab, reason; several files add up.

    Raises:
        QuarantineError: a file is missing, or a line is neither empty nor an id with a reason.
    """
    found: dict[str, str] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise QuarantineError(f"{path} is not a file; expected a quarantine list (id, tab, reason; one row a line)")
        # an id may hold what str.splitlines takes for a line's end (U+2028, U+0085); an editor may have put a BOM first
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            id, tab, reason = line.partition("\t")
            if line.strip() and not (tab and id and reason.strip()):
                raise QuarantineError(f"{path} line {number}: {line[:80]!r}; expected an id, a tab and a reason")
            if line.strip():
                found.setdefault(id, reason.strip())
    return found


def without_test_reasons(quarantine: Mapping[str, str]) -> dict[str, str]:
    """The rows that are left out for more than what they share with test rows (``test_id``, ``test_media``)."""
    kept = {id: [r for r in reasons.split(",") if not r.startswith("test_")] for id, reasons in quarantine.items()}
    return {id: ",".join(reasons) for id, reasons in kept.items() if reasons}
