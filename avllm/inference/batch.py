"""Answer many requests: a file of samples in, a file of answers out, in the same order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
from avllm.data.reading import MediaReader
from avllm.data.row import Row
from avllm.data.schema import RowError, Sample
from avllm.data.store.output_path import output_file
from avllm.errors import OutageError
from avllm.inference.generation import Generation, answers_of, generate_ids
from avllm.inference.journal import Journal, checkpoint_digest
from avllm.inference.request_file import Request, read_requests
from avllm.models.rows.media_inputs import left_out

if TYPE_CHECKING:
    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor

T = TypeVar("T")
# Rows of similar length are batched within a chunk; a kill loses at most one chunk.
BATCHES_A_CHUNK = 4


@dataclass(frozen=True)
class PreparedRequest:
    """A request whose media were read: a row for the model, or the error that prevents one.

    Attributes:
        warnings: media of the row that the model cannot use, each in words.
    """

    id: str | None
    row: Row | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()


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
    """A row to answer, with its request's place in the chunk and its warnings."""

    place: int
    row: Row
    warnings: tuple[str, ...]


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
        output: JSONL, ``{"id", "answer", "request"}`` or ``{"id", "error", "request"}`` in input
            order; ``request`` is a digest of the request's line. ``warnings`` are beside an answer
            that was given without some of the row's media, or whose thoughts did not end.
        generation: greedy when None.
        batch_size: prompts in a batch. Greedy answers do not depend on it, so it may change
            between runs.
        workers: threads that decode ahead.
        loaded: how ``load`` changes the model (``quantize``, ``dtype``, ``strict``), JSON-able:
            answers depend on it, so a second run compares it, too.

    Raises:
        JournalError: the output belongs to other requests, another checkpoint or other settings.
        ManifestError: there is no such file of requests, or an id occurs twice in it.
        OutputPathError: the output cannot be written.
    """
    generation = generation or Generation()
    lines = read_requests(requests)
    output = output_file(output, [requests])
    run = {
        "format": 2,
        "checkpoint_sha256": checkpoint_digest(checkpoint),
        "generation": generation.settings(),
        **(loaded or {}),
    }
    with Journal(output, run, lines) as journal:
        before = journal.done
        if before < len(lines):
            model, processor = load()
            remaining = (line.request() for line in lines[before:])
            read = partial(prepare, processor, root=Path(requests).parent)
            ready = prepare_ahead(read, remaining, workers, 2 * batch_size)
            with progress_bar() as bar:
                task = bar.add_task("answers", total=len(lines), completed=before)
                tick = partial(bar.advance, task)
                for chunk in groups(ready, batch_size * BATCHES_A_CHUNK):
                    answers = answer_chunk(model, processor, chunk, generation, batch_size, tick)
                    journal.append(answers)
        return Summary(before, journal.done - before, journal.errors())


def prepare(processor: AVProcessor, request: Request, root: Path | None) -> PreparedRequest:
    """Read a request's media and make its row; a fault of either becomes the request's error."""
    sample = request.sample
    if sample is None:
        return PreparedRequest(request.id, error=request.error)
    try:
        with one_row():
            clips = MediaReader(processor).clips(sample.media, root)
            inputs = [processor.prepare(clip, sample.last_question) for clip in clips]
            row = processor.row(sample, inputs, answer=False)
    except RowError as error:
        return PreparedRequest(request.id, error=f"{error.reason}: {error}")
    except (ValueError, OSError) as error:  # MediaError, a folder that may not be read
        return PreparedRequest(request.id, error=str(error))
    return PreparedRequest(request.id, row, warnings=tuple(left_out(sample.media, clips)))


def prepare_ahead(
    read: Callable[[Request], T], requests: Iterable[Request], workers: int, ahead: int
) -> Iterator[T]:
    """Prepare requests in threads, in order, at most ``ahead`` of them before their turn.

    Args:
        read: reads a request's media and makes its rows, or a record of the error.
        requests: in order. workers: threads. ahead: requests that are prepared early.

    Raises:
        OutageError: the servers that hold the files of this row and of the next ones do not answer.
    """
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Request, Future[T]]] = deque()

        def first() -> T:
            request, future = waiting.popleft()
            try:
                return future.result()
            except OutageError:
                # Servers of the rows after it may answer: then the row's is at fault.
                wait([later for _, later in waiting])
                return read(request)

        try:
            for request in requests:
                waiting.append((request, pool.submit(read, request)))
                if len(waiting) > ahead:
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, future in waiting:
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
            prompts.append(_Prompt(place, request.row, request.warnings))
    tick(len(answers))

    prompts.sort(key=lambda prompt: len(prompt.row.input_ids))
    for batch in groups(prompts, batch_size):
        rows = [prompt.row for prompt in batch]
        ids = generate_ids(model, processor, rows, generation)
        for prompt, answer in zip(batch, answers_of(processor, rows, ids), strict=True):
            line: dict[str, Any] = {"id": prompt.row.id, "answer": answer.text}
            warnings = [*prompt.warnings, *answer.warnings]
            if warnings:
                line["warnings"] = warnings
            answers[prompt.place] = line
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
    read = partial(prepare, processor, root=root)
    ready = prepare_ahead(read, requests, workers, 2 * batch_size)
    for chunk in groups(ready, batch_size * BATCHES_A_CHUNK):
        yield from answer_chunk(model, processor, chunk, generation, batch_size)


class _Rate(ProgressColumn):
    """Rows a second of this run."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("- rows/s")
        return Text(f"{task.speed:.2f} rows/s")


def progress_bar() -> Progress:
    """Return a bar of rows on stderr, with their rate and the time left."""
    from rich.console import Console

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
