"""Embed rows with the whole model: one vector each for text, sight, sound and both.

The vector is the LLM's last hidden state on a prompt that asks for a summary in one word, at the
prompt's last token or averaged over its tokens (LCO-Emb, arXiv 2510.11693; the prompt is that of
E5-V, arXiv 2407.12580). All four have one width and lie in one space.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from avllm.data.boundary import one_row
from avllm.data.reading import MediaReader
from avllm.data.row import Row
from avllm.data.schema import MediaPart, Message, RowError, Sample, TextPart
from avllm.data.store.output_path import output_file
from avllm.errors import UserError, writing
from avllm.inference.batch import BATCHES_A_CHUNK, groups, prepare_ahead, progress_bar
from avllm.inference.journal import Journal, checkpoint_digest
from avllm.inference.request_file import Request, read_requests
from avllm.streams import MEDIA
from avllm.tokens import EncoderInput

if TYPE_CHECKING:
    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor

Pool = Literal["last", "mean"]
FORMS = ("text", "video", "audio", "both")
PROMPTS = {
    "text": "\nSummarize the above sentence in one word:",
    "video": "\nSummarize the above picture in one word:",
    "audio": "\nSummarize the above sound in one word:",
    "both": "\nSummarize the above video with its sound in one word:",
}


@dataclass(frozen=True)
class PreparedForms:
    """A row of a manifest whose media were read: a prompt for each form that it has, or an error.

    Attributes:
        rows: prompts by form, of ``FORMS``.
    """

    id: str | None
    rows: dict[str, Row] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class EmbeddedCount:
    """Count the rows of a file of vectors: of an earlier run, all, and those with an error."""

    before: int
    rows: int
    errors: int


def embed_file(
    load: Callable[[], tuple[AVLLM, AVProcessor]],
    checkpoint: str | Path,
    manifest: str | Path,
    output: str | Path,
    pool: Pool = "last",
    *,
    batch_size: int = 8,
    workers: int = 2,
    loaded: dict[str, Any] | None = None,
) -> EmbeddedCount:
    """Embed each row of a manifest; after a kill, the same call goes on after the last row written.

    Args:
        load: returns the model and its processor; called only when a row is left to embed.
        checkpoint: the folder that they come from; a second run compares its digest.
        manifest: JSONL, one sample a line; relative media paths are relative to its folder.
        output: a ``.npz`` file of ``ids (n,)`` and of ``text``, ``video``, ``audio`` and ``both``,
            ``(n, D)`` float32; NaN where a row lacks the form or could not be read. Beside it lies
            a ``.jsonl`` of the same name with each row's vectors or error, which is what a second
            run continues.
        pool: ``last`` token of the prompt, or ``mean`` of its tokens.
        batch_size: prompts in a batch. workers: threads that decode ahead.
        loaded: how ``load`` changes the model, JSON-able; a second run compares it.

    Raises:
        UserError: an output that is no ``.npz``. JournalError: it belongs to another run.
        ManifestError, OutputPathError: a path that cannot be read or written.
    """
    target = output_file(output, [manifest])
    if target.suffix != ".npz":
        raise UserError(f"--output is {output}; expected a name that ends in .npz", reason="suffix")
    written = output_file(target.with_suffix(".jsonl"), [manifest])
    lines = read_requests(manifest)
    run = {
        "format": 1,
        "checkpoint_sha256": checkpoint_digest(checkpoint),
        "pool": pool,
        **(loaded or {}),
    }
    with Journal(written, run, lines) as journal:
        before = journal.done
        if before < len(lines):
            model, processor = load()
            read = partial(prepare_forms, processor, root=Path(manifest).parent)
            remaining = (line.request(answer=True) for line in lines[before:])
            ready = prepare_ahead(read, remaining, workers, 2 * batch_size)
            with progress_bar() as bar:
                task = bar.add_task("rows", total=len(lines), completed=before)
                for chunk in groups(ready, batch_size * BATCHES_A_CHUNK):
                    journal.append(embed_chunk(model, processor, chunk, pool, batch_size))
                    bar.advance(task, len(chunk))
        write_arrays(target, written)
        return EmbeddedCount(before, journal.done, journal.errors())


def prepare_forms(processor: AVProcessor, request: Request, root: Path | None) -> PreparedForms:
    """Read a row's media and make its prompts; a fault of either becomes the row's error."""
    sample = request.sample
    if sample is None:
        return PreparedForms(request.id, error=request.error)
    try:
        with one_row():
            clips = MediaReader(processor).inputs(sample.media, root, sample.last_question)
            return PreparedForms(request.id, form_rows(processor, sample, clips))
    except RowError as error:
        return PreparedForms(request.id, error=f"{error.reason}: {error}")
    except (ValueError, OSError) as error:  # MediaError, a folder that may not be read
        return PreparedForms(request.id, error=str(error))


def form_rows(
    processor: AVProcessor, sample: Sample, clips: Sequence[dict[str, EncoderInput]]
) -> dict[str, Row]:
    """Return the prompt of each form that a row has.

    Its text is its last answer (a caption), or the question where it has none. ``both`` needs
    sight and sound.

    Args:
        processor: the model's.
        sample: the row.
        clips: inputs by stream of each of its media parts.
    """
    rows: dict[str, Row] = {}
    text = sample.answer or sample.last_question
    if text.strip():
        rows["text"] = _prompt(processor, sample, "text", [TextPart(text=text)], [])
    for form, media in (("video", ("video",)), ("audio", ("audio",)), ("both", MEDIA)):
        streams = {stream for medium in media for stream in processor.streams_of(medium)}
        if form == "both" and not {"video", "audio"} <= rows.keys():
            continue
        parts: list[MediaPart] = []
        inputs: list[dict[str, EncoderInput]] = []
        for part, clip in zip(sample.media, clips, strict=True):
            chosen = {name: item for name, item in clip.items() if name in streams}
            if chosen:
                parts.append(part)
                inputs.append(chosen)
        if parts:
            rows[form] = _prompt(processor, sample, form, parts, inputs)
    return rows


def _prompt(
    processor: AVProcessor,
    sample: Sample,
    form: str,
    content: Sequence[MediaPart | TextPart],
    inputs: list[dict[str, EncoderInput]],
) -> Row:
    asked = Message(role="user", content=[*content, TextPart(text=PROMPTS[form])])
    row = Sample.model_validate({"id": sample.id, "messages": [asked]})
    return processor.row(row, inputs, answer=False)


def embed_chunk(
    model: AVLLM,
    processor: AVProcessor,
    chunk: Sequence[PreparedForms],
    pool: Pool,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Return ``{"id", "vectors": {form: base64 of float32}}`` or ``{"id", "error"}`` by row."""
    lines: list[dict[str, Any]] = []
    prompts: list[tuple[dict[str, str], str, Row]] = []
    for one in chunk:
        if one.error is not None:
            lines.append({"id": one.id, "error": one.error})
            continue
        vectors: dict[str, str] = {}
        lines.append({"id": one.id, "vectors": vectors})
        prompts += [(vectors, form, row) for form, row in one.rows.items()]
    prompts.sort(key=lambda prompt: len(prompt[2].input_ids))  # little of a batch is padding
    for batch in groups(prompts, batch_size):
        embedded = embed_rows(model, processor, [row for _, _, row in batch], pool)
        for (vectors, form, _), vector in zip(batch, embedded.cpu().numpy(), strict=True):
            vectors[form] = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return lines


@torch.no_grad()
def embed_rows(model: AVLLM, processor: AVProcessor, rows: list[Row], pool: Pool) -> Tensor:
    """Return one vector a prompt, ``(R, D)`` float32: the LLM's pooled last hidden states."""
    batch = processor.collate(rows).to(model.device)
    with model.shared_media():
        hidden = model.run_decoder(model.embed(batch), batch).float()  # (R, L, D)
        seen = model.visible(batch).attention_mask  # (R, L)
    if pool == "mean":
        weight = seen.unsqueeze(-1).float()
        return (hidden * weight).sum(1) / weight.sum(1)
    places = torch.arange(seen.shape[1], device=seen.device)
    last = torch.where(seen, places, 0).amax(1)  # (R,)
    return hidden[torch.arange(len(last), device=last.device), last]


def write_arrays(target: Path, written: Path) -> None:
    """Collect the vectors of a ``.jsonl`` into one ``.npz``, which is there whole or not at all."""
    ids: list[str] = []
    by_form: dict[str, dict[int, np.ndarray]] = {form: {} for form in FORMS}
    width = 0
    with written.open("rb") as file:
        for place, line in enumerate(file):
            row = json.loads(line)
            ids.append(row["id"] or "")
            for form, content in row.get("vectors", {}).items():
                by_form[form][place] = np.frombuffer(base64.b64decode(content), "<f4")
                width = len(by_form[form][place])
    arrays = {}
    for form, vectors in by_form.items():
        arrays[form] = np.full((len(ids), width), np.nan, np.float32)
        for place, vector in vectors.items():
            arrays[form][place] = vector
    partial_file = target.with_name(target.name + ".partial")
    with writing(target):
        with partial_file.open("wb") as file:
            np.savez(file, ids=np.array(ids), **arrays)  # type: ignore[arg-type]
        os.replace(partial_file, target)
