"""Answer many requests: a file of samples in, a file of answers out, in the same order."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from avllm.data.boundary import one_row
from avllm.data.manifest import ManifestError, digest, parse_row
from avllm.data.reading import MediaReader
from avllm.data.row import Row
from avllm.data.schema import RowError, Sample
from avllm.inference.generation import Generation, answer_rows
from avllm.inference.journal import Journal, checkpoint_digest

if TYPE_CHECKING:
    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor

T = TypeVar("T")
# Rows of similar length are batched within a chunk; a kill loses at most one chunk.
BATCHES_A_CHUNK = 4


@dataclass(frozen=True)
class Request:
    """One line of the input: its sample, or the error that makes it none."""

    id: str | None
    sample: Sample | None = None
    error: str | None = None


@dataclass(frozen=True)
class PreparedRequest:
    """A request whose media were read: a row for the model, or the error that prevents one."""

    id: str | None
    row: Row | None = None
    error: str | None = None


@dataclass(frozen=True)
class Summary:
    """Counts of an answers file.

    Attributes:
        before: rows that an earlier run wrote.
        added: rows that this run wrote.
        errors: rows with an error instead of an answer, among all of them.
    """

    before: int
    added: int
    errors: int


@dataclass(frozen=True)
class _Prompt:
    """A row to answer, with its request's place in the chunk."""

    place: int
    row: Row


def answer_file(
    load: Callable[[], tuple[AVLLM, AVProcessor]],
    checkpoint: str | Path,
    requests: str | Path,
    output: str | Path,
    generation: Generation | None = None,
    *,
    batch_size: int = 8,
    workers: int = 2,
    loaded: dict[str, Any] | None = None,
) -> Summary:
    """Answer a file of requests; after a kill, the same call continues after the last row written.

    Args:
        load: returns the model and its processor; called only when a request is left to answer.
        checkpoint: the folder that they come from; a second run compares its digest.
        requests: JSONL, one sample a line; relative media paths are relative to its folder.
        output: JSONL, ``{"id", "answer"}`` or ``{"id", "error"}`` in input order.
        generation: greedy when None.
        batch_size: prompts in a batch. Greedy answers do not depend on it, so it may change
            between runs.
        workers: threads that decode ahead.
        loaded: how ``load`` changes the model (``quantize``, ``dtype``), JSON-able: answers depend
            on it, so a second run compares it, too.

    Raises:
        JournalError: the output belongs to other requests, another checkpoint or other settings.
        ManifestError: there is no such file of requests.
    """
    generation = generation or Generation()
    total = count_requests(requests)
    run = {
        "format": 1,
        "requests_sha256": digest(requests),
        "checkpoint_sha256": checkpoint_digest(checkpoint),
        "generation": generation.settings(),
        **(loaded or {}),
    }
    with Journal(output, run) as journal:
        before = journal.done
        if before < total:
            model, processor = load()
            remaining = islice(read_requests(requests), before, None)
            root = Path(requests).parent
            ready = prepare_ahead(processor, remaining, root, workers, 2 * batch_size)
            with _progress_bar() as bar:
                task = bar.add_task("answers", total=total, completed=before)
                tick = partial(bar.advance, task)
                for chunk in groups(ready, batch_size * BATCHES_A_CHUNK):
                    answers = answer_chunk(model, processor, chunk, generation, batch_size, tick)
                    journal.append(answers)
        return Summary(before, journal.done - before, journal.errors())


def count_requests(path: str | Path) -> int:
    """Count the lines that are not blank.

    Raises:
        ManifestError: no such file, or nothing in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(
            f"{path} is not a file; expected requests (JSONL, one sample a line)", reason="missing"
        )
    with path.open("rb") as file:
        total = sum(bool(line.strip()) for line in file)
    if not total:
        raise ManifestError(
            f"{path} holds no request; expected one JSON object a line", reason="empty"
        )
    return total


def read_requests(path: str | Path) -> Iterator[Request]:
    """Yield the requests in order; the error of a malformed line names file, line and field."""
    path = Path(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                sample = parse_row(line, f"{path.name} line {number}").question()
            except ManifestError as error:
                yield Request(_id_of(line), error=str(error))
            else:
                yield Request(sample.id, sample)


def _id_of(line: bytes) -> str | None:
    """Return the id of a malformed line, or None when it has none that can be read."""
    try:
        row = json.loads(line)
        identity = row.get("id") if isinstance(row, dict) else None
        if isinstance(identity, str):
            identity.encode()  # the answers file is UTF-8, which has no lone surrogates
            return identity
    except (ValueError, RecursionError):  # no JSON or no UTF-8; nested too deep
        pass
    return None


def prepare(processor: AVProcessor, request: Request, root: Path | None) -> PreparedRequest:
    """Read a request's media and make its row; a fault of either becomes the request's error."""
    sample = request.sample
    if sample is None:
        return PreparedRequest(request.id, error=request.error)
    try:
        with one_row():
            clips = MediaReader(processor).inputs(sample.media, root, sample.last_question)
            row = processor.row(sample, clips, answer=False)
    except RowError as error:
        return PreparedRequest(request.id, error=f"{error.reason}: {error}")
    except (ValueError, OSError) as error:  # MediaError, a folder that may not be read
        return PreparedRequest(request.id, error=str(error))
    return PreparedRequest(request.id, row)


def prepare_ahead(
    processor: AVProcessor,
    requests: Iterable[Request],
    root: Path | None,
    workers: int,
    ahead: int,
) -> Iterator[PreparedRequest]:
    """Prepare requests in threads, in order, at most ``ahead`` of them before their turn."""
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        waiting: deque[Future[PreparedRequest]] = deque()
        try:
            for request in requests:
                waiting.append(pool.submit(prepare, processor, request, root))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _ignore(rows: int) -> None:
    """Do nothing: for callers that show no progress."""


def answer_chunk(
    model: AVLLM,
    processor: AVProcessor,
    chunk: Sequence[PreparedRequest],
    generation: Generation,
    batch_size: int,
    tick: Callable[[int], None] = _ignore,
) -> list[dict[str, Any]]:
    """Return the answers of a chunk, in its order.

    Prompts of similar length share a batch, so that little of it is padding. ``tick`` is called
    with the number of rows that are done, batch by batch.
    """
    answers: dict[int, dict[str, Any]] = {}  # by place in the chunk
    prompts: list[_Prompt] = []
    for place, request in enumerate(chunk):
        if request.row is None:
            answers[place] = {"id": request.id, "error": request.error}
        else:
            prompts.append(_Prompt(place, request.row))
    tick(len(answers))

    prompts.sort(key=lambda prompt: len(prompt.row.input_ids))
    for batch in groups(prompts, batch_size):
        texts = answer_rows(model, processor, [prompt.row for prompt in batch], generation)
        for prompt, text in zip(batch, texts, strict=True):
            answers[prompt.place] = {"id": prompt.row.id, "answer": text}
        tick(len(batch))
    return [answers[place] for place in range(len(chunk))]


def groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` items; the last may be shorter."""
    source = iter(items)
    while group := list(islice(source, size)):
        yield group


def answer_samples(
    model: AVLLM,
    processor: AVProcessor,
    samples: Iterable[Sample],
    root: Path | None = None,
    generation: Generation | None = None,
    *,
    batch_size: int = 8,
    workers: int = 2,
) -> Iterator[dict[str, Any]]:
    """Answer samples without files: yield ``{"id", "answer"}`` or ``{"id", "error"}``, in order."""
    generation = generation or Generation()
    requests = (Request(sample.id, sample.question()) for sample in samples)
    ready = prepare_ahead(processor, requests, root, workers, 2 * batch_size)
    for chunk in groups(ready, batch_size * BATCHES_A_CHUNK):
        yield from answer_chunk(model, processor, chunk, generation, batch_size)


class _Rate(ProgressColumn):
    """Rows a second of this run."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("- rows/s")
        return Text(f"{task.speed:.2f} rows/s")


def _progress_bar() -> Progress:
    from rich.console import Console

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
