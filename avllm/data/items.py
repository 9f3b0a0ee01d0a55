"""Number the rows of several manifests, without those in quarantine, as items.

An order counts items and a loader loads them. An item is one row or, when packing, the rows of a
manifest that ask about the same media. Rows and items are numbers; only the manifests' indexes are
read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from avllm import distributed
from avllm.data.index import Manifest, hash_of
from avllm.data.schema import Sample
from avllm.errors import UserError, looked_in


@dataclass(frozen=True)
class Bad:
    """Report a row that was left out.

    Attributes:
        id: of the row.
        source: of the row.
        manifest: of the row.
        reason: of ``MediaError`` (``missing``, ``zero_byte``, ``undecodable``, ...), of
            ``RowError`` (``too_long``, ``empty_answer``, ...), or of the quarantine file.
        detail: what was seen.
    """

    id: str
    source: str
    manifest: str
    reason: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """Return a line of ``skipped.jsonl``."""
        return asdict(self)


class Items:
    """Number the items of several manifests one after the other.

    Args:
        manifests: JSONL files, or URLs of them.
        pack: group rows with the same media.
        max_packed: most rows in one item.
        quarantine: reason by id of the rows that are left out, see :func:`read_quarantine`.

    Attributes:
        sizes: items of each manifest.
        row_counts: rows of each manifest that are in an item.
        rows: ``(R,)`` places of all rows that are in an item, in the order of the manifests. A
            place is the number of a row, counted over all manifests.
        quarantined: the rows that are left out.

    Raises:
        ManifestError: a manifest is missing or malformed.
        QuarantineError: no row of a manifest is left.
    """

    def __init__(
        self,
        manifests: Sequence[str | Path],
        *,
        pack: bool = False,
        max_packed: int = 32,
        quarantine: Mapping[str, str] | None = None,
    ) -> None:
        with distributed.main_first():  # it writes the indexes, the others read them
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
                    f"all {len(manifest)} rows of {manifest.name} are in quarantine; repair the "
                    "media "
                    "and check them again, or take the manifest out of the settings",
                    reason="no_rows",
                )
            keys = manifest.rows["media"][rows] if pack else np.zeros(len(rows), np.uint64)
            order, begin = group(keys, max_packed, manifest.rows["id"][rows])
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
        """Return the places of an item's rows."""
        return self._members[self._begins[item] : self._begins[item + 1]].tolist()

    def sample(self, place: int) -> Sample:
        """Return the row at a place."""
        number = self.manifest_number(place)
        return self.manifests[number][place - int(self.firsts[number])]

    def manifest_number(self, place: int) -> int:
        """Return the number of the manifest that a place belongs to."""
        return int(np.searchsorted(self.firsts, place, side="right")) - 1

    def root(self, place: int) -> Path:
        """Return the folder that the media paths of a row are relative to."""
        return self.manifests[self.manifest_number(place)].root

    def bad(self, place: int, reason: str, detail: str) -> Bad:
        """Return the report of a row that is left out."""
        sample = self.sample(place)
        manifest = self.manifests[self.manifest_number(place)]
        return Bad(sample.id, sample.source, manifest.name, reason, detail)

    def drawn_by_id(self, seed: int, limit: int | None = None) -> np.ndarray:
        """Return items in an order that follows from the seed and the ids of their rows.

        The order of the manifest has no part in it: of a file that is sorted by answer, neighbours
        would be easy to confuse, and a part of it would be of one kind.

        Args:
            seed: of the order.
            limit: most items; None = all.
        """
        hashes = np.concatenate([manifest.rows["id"] for manifest in self.manifests])
        keys = _mixed(hashes[self._members], seed)
        smallest = np.minimum.reduceat(keys, self._begins[:-1])  # (items,)
        return np.argsort(smallest, kind="stable")[:limit]

    def distinct_media(self, among: np.ndarray | None = None) -> np.ndarray:
        """Return the places of the first row of each set of media, in the order of the manifests.

        Args:
            among: ``(items,)`` bool, the items that count; None = all.
        """
        rows = self.rows
        if among is not None:
            in_item = np.repeat(among, np.diff(self._begins))  # (members,) bool
            rows = np.sort(self._members[in_item])
        first_places = []
        for number, manifest in enumerate(self.manifests):
            in_manifest = (rows >= self.firsts[number]) & (rows < self.firsts[number + 1])
            own = rows[in_manifest]  # places of this manifest
            keys = manifest.rows["media"][own - self.firsts[number]]
            _, first = np.unique(keys, return_index=True)  # first index of each distinct key
            first = np.sort(first)
            has_media = keys[first] != 0
            first_places.append(own[first[has_media]])
        return np.concatenate(first_places)

    def _good(self, number: int, quarantine: Mapping[str, str]) -> np.ndarray:
        """Return the rows of a manifest that are not in quarantine, and report the others.

        The index holds hashes of ids, so rows with an equal hash are read and compared.
        """
        manifest = self.manifests[number]
        rows = np.arange(len(manifest))
        if not quarantine:
            return rows
        hashes = np.array([hash_of(identity) for identity in quarantine], np.uint64)
        quarantined: list[int] = []
        for row in np.flatnonzero(np.isin(manifest.rows["id"], hashes)).tolist():
            reason = quarantine.get(manifest[row].id)
            if reason is not None:
                place = int(self.firsts[number]) + row
                self.quarantined.append(self.bad(place, reason, "it is in the quarantine file"))
                quarantined.append(row)
        return np.delete(rows, quarantined)


def _mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Return ``(N,)`` uint64 that look random and follow from hashes and seed (SplitMix64)."""
    keys = hashes.astype(np.uint64) ^ np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & (2**64 - 1))
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(factor)  # wraps around
    return keys ^ (keys >> np.uint64(31))


def group(keys: np.ndarray, largest: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group equal keys, in the order of their first appearance; each key 0 is a group.

    The members of a group follow from their ids, and not from their order in the file: it would
    decide which of many rows share a group, and figures would differ in their last digits.

    Args:
        keys: ``(N,)``.
        largest: most members of a group; more make several groups.
        ids: ``(N,)`` hashes, by which the members of a group are sorted.

    Returns:
        ``(N,)`` indices into ``keys``, group by group, and the position in it where each group
        begins.
    """
    indices = np.arange(len(keys))
    if not keys.any():
        return indices, indices
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    leader = np.where(keys == 0, indices, first[inverse])  # (N,) first index with the same key
    order = np.lexsort((ids, leader))  # (N,) equal keys together, within them by id
    starts = np.flatnonzero(np.diff(leader[order], prepend=-1))  # where in it a key begins
    lengths = np.diff(starts, append=len(keys))  # members of each key
    rank = indices - np.repeat(starts, lengths)  # (N,) 0, 1, ... among those with the same key
    return order, np.flatnonzero(rank % largest == 0)


class QuarantineError(UserError):
    """A quarantine file cannot be read (the message names file and line), or leaves no rows."""


def read_quarantine(paths: Sequence[str | Path]) -> dict[str, str]:
    """Read the reasons, by id, of the rows to leave out, from lines of ``id``, tab, reason.

    Raises:
        QuarantineError: a file is missing, or a line is neither empty nor an id with a reason.
    """
    reasons: dict[str, str] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise QuarantineError(
                f"{path} is not a file; expected a quarantine list (id, tab, reason; one row a "
                f"line){looked_in(path)}",
                reason="missing",
            )
        # Not splitlines: an id may hold U+2028 or U+0085. utf-8-sig: an editor may write a BOM.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            identity, _, reason = line.partition("\t")
            if not identity or not reason.strip():
                raise QuarantineError(
                    f"{path} line {number}: {line[:80]!r}; expected an id, a tab and a reason",
                    reason="malformed",
                )
            reasons.setdefault(identity, reason.strip())
    return reasons


def without_test_reasons(quarantine: Mapping[str, str]) -> dict[str, str]:
    """Return the quarantine without reasons that concern test rows (``test_id``, ``test_media``).

    Rows without another reason are left out of it.
    """
    others: dict[str, str] = {}
    for identity, text in quarantine.items():
        reasons = [reason for reason in text.split(",") if not reason.startswith("test_")]
        if reasons:
            others[identity] = ",".join(reasons)
    return others
