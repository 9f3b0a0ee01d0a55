"""Record what a run is (settings, files, precision), and compare it when the run goes on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from avllm import distributed
from avllm.config import RunConfig
from avllm.errors import UserError, one_line
from avllm.log import logger
from avllm.training.points.inputs import inputs, weights

LOG = logger(__name__)
RECORD = "run.json"
FREE_KEYS = {
    "output",
    "backbones",
    "train.log_every",
    "train.trackers",
    "train.keep",
    "train.save_every",
    "data.accept_changes",
    "data.num_workers",
    "data.keep_decoded",
    "data.cache_max_gb",
    "data.timeout",
    "data.max_skip_rate",
}
"""Settings that may differ when a run goes on: none of them changes a number of it."""
LENGTHS = ("train.max_steps", "train.epochs")
"""Settings that may be larger when a run goes on."""
FILES = ("inputs.manifests.", "inputs.media.")
"""Keys of files that may differ where ``data.accept_changes`` says so."""
WEIGHTS = "inputs.weights."


class ResumeError(UserError):
    """A run cannot go on.

    Reasons: ``settings``, ``files`` or ``weights`` differ from those that it began with;
    ``damaged``: no resume point is whole.
    """


@dataclass(frozen=True)
class Change:
    """A setting whose value differs: its dotted key, the value before and the value now."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} then, {self.new!r} now"


def record_of(
    config: RunConfig, precision: str, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return what a run is, JSON-able: its settings and surroundings, digests of what it reads.

    Args:
        config: the run.
        precision: that is computed in.
        before: the record of a run that goes on.
    """
    surroundings = {
        "processes": distributed.world_size(),
        "computed_in": precision,
        "inputs": inputs(config, before and before.get("inputs")),
    }
    return dict(json.loads(json.dumps(config.model_dump(mode="json") | surroundings)))


def with_weights(record: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return a record with digests that are known only after the first download of a model."""
    return record | {"inputs": record["inputs"] | {"weights": weights(config)}}


def read_record(run: Path) -> dict[str, Any] | None:
    """Return the record in a run's folder; None where there is none.

    Raises:
        ResumeError: it is damaged.
    """
    path = run / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sections = [record["train"], record["data"], record["inputs"], record["model"] or {}]
        seen = "" if all(isinstance(section, dict) for section in sections) else "of another form"
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        seen = one_line(error)
    if seen:
        raise ResumeError(
            f"{path} is damaged ({seen}); expected the settings of the run. Copy it back from "
            "elsewhere, or delete it if the settings are the same",
            reason="damaged",
        )
    return dict(record)


def compare(
    run: Path, before: dict[str, Any], now: dict[str, Any], accept_changes: bool
) -> Change | None:
    """Compare the record of a run with that of the run that is to go on.

    Returns:
        the length (``train.max_steps`` or ``train.epochs``) that has become larger, if one has.

    Raises:
        ResumeError: a setting that changes what is trained differs, or a file.
    """
    changes = differences(with_defaults(before), now)
    longer = next((change for change in changes if _is_longer(change)), None)
    files = [change for change in changes if change.key.startswith(FILES)]
    models = [change for change in changes if change.key.startswith(WEIGHTS)]
    others = [change for change in changes if change not in [*files, *models, longer]]
    if others:
        raise ResumeError(
            f"{run} holds a run with other settings ({_some(others)}). Give another `output`, or "
            f"delete the folder to start from the beginning; only {', '.join(sorted(FREE_KEYS))} "
            f"may change on the way, and {' or '.join(LENGTHS)} grow",
            reason="settings",
        )
    if models:
        raise ResumeError(
            f"{run}: the model that the run began with has changed ({_some(models)}). Put its "
            "files back, delete the folder to train it again, or give another `output`",
            reason="weights",
        )
    if files and not accept_changes:
        raise ResumeError(
            f"{run}: files that the run reads have changed ({_some(files)}). Put them back, go on "
            "knowingly with data.accept_changes=true, or give another `output`",
            reason="files",
        )
    if files:
        LOG.warning("data.accept_changes: going on although %s", _some(files))
    return longer


def _is_longer(change: Change) -> bool:
    numbers = isinstance(change.old, int | float) and isinstance(change.new, int | float)
    return change.key in LENGTHS and numbers and change.new > change.old


def _some(changes: Sequence[Change]) -> str:
    first = "; ".join(map(str, changes[:5]))
    return first if len(changes) <= 5 else f"{first}; and {len(changes) - 5} more"


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[Change]:
    """Return the entries that differ and are not free, in the order of their keys.

    A commit that is not known before or now (None under ``inputs.weights``) is no difference.
    """
    changes: list[Change] = []
    for key in sorted(before.keys() | now.keys()):
        name = f"{prefix}{key}"
        old = before.get(key)
        new = now.get(key)
        if name in FREE_KEYS:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changes += differences(old, new, name + ".")
        elif old != new:
            is_unknown = prefix == WEIGHTS and None in (old, new)
            if not is_unknown:
                changes.append(Change(name, old, new))
    return changes


def with_date(config: RunConfig, before: dict[str, Any] | None) -> RunConfig:
    """Return settings with the day on which the run began, which chat templates may write.

    A run that goes on tomorrow writes the prompts of today.

    Args:
        config: the run.
        before: the record of a run that goes on.
    """
    if config.model is None or config.model.llm.date is not None:
        return config
    llm = ((before or {}).get("model") or {}).get("llm") or {}
    dated = config.model_copy(deep=True)
    assert dated.model is not None
    dated.model.llm.date = llm.get("date") or datetime.date.today().isoformat()
    return dated


def with_defaults(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return recorded settings, completed with the defaults of settings that are newer."""
    own = {key: value for key, value in recorded.items() if key in RunConfig.model_fields}
    try:
        return recorded | RunConfig.model_validate(own).model_dump(mode="json")
    except ValidationError:  # settings of an older version: the comparison names what differs
        return recorded
