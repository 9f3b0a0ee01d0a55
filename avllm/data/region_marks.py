"""Number the marks of a row's regions, and put the numbers beside the boxes of its clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from avllm.data.schema import AudioPart, MediaPart, Region, RowError
from avllm.tokens import REGION_BOXES, REGION_MARKS, EncoderInput


def regions_of(part: MediaPart) -> tuple[Region, ...]:
    """Return the boxes that a media part names; a region that moves has several."""
    if isinstance(part, AudioPart):
        return ()
    return part.regions or ()


def region_ids(media: Sequence[MediaPart]) -> list[str]:
    """Return the id of each region of a row, in the order in which they come first."""
    ids = [region.id for part in media for region in regions_of(part)]
    return list(dict.fromkeys(ids))


def mark_numbers(
    media: Sequence[MediaPart], marks: Sequence[int] | None, number: int
) -> dict[str, int]:
    """Return the mark of each region of a row by its id; none where the model has no marks.

    Args:
        media: the row's.
        marks: of its regions, in their order; None takes 0, 1, 2, ...
        number: of marks that the model has; 0: it has none.

    Raises:
        RowError: ``too_many_regions``: more than there are marks.
    """
    if number == 0:
        return {}
    regions = region_ids(media)
    if len(regions) > number:
        raise RowError(
            "too_many_regions",
            f"the row has {len(regions)} regions; the limit is {number}, n of token_marks: leave "
            "some out, or compose the model with more",
        )
    return dict(zip(regions, range(len(regions)) if marks is None else marks, strict=True))


def mark_clips(
    media: Sequence[MediaPart],
    clips: Sequence[dict[str, EncoderInput]],
    numbers: Mapping[str, int],
) -> list[dict[str, EncoderInput]]:
    """Return the clips with the marks of their boxes; a clip whose marks are 0, 1, ... unchanged.

    Args:
        media: the row's.
        clips: inputs by stream of each media part.
        numbers: the mark of each region by its id; without any, all clips are unchanged.
    """
    if not numbers:
        return list(clips)
    marked = []
    for part, clip in zip(media, clips, strict=True):
        marks = [numbers[region.id] for region in regions_of(part)]
        if marks == list(range(len(marks))):
            marked.append(clip)
        else:
            marked.append({name: _marked(item, marks) for name, item in clip.items()})
    return marked


def _marked(item: EncoderInput, marks: list[int]) -> EncoderInput:
    if REGION_BOXES not in item.extra:
        return item
    return replace(item, extra=item.extra | {REGION_MARKS: torch.tensor([marks]) + 1})
