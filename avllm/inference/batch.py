"""Many requests at once: a file of samples in, a file of answers out, in the same order."""

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

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

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
BATCHES_A_CHUNK = 4  # rows of similar length are put together within a chunk; a kill loses at most one chunk


@dataclass(frozen=True)
class Request:
    """One row of the input: a sample, or why it is none."""

    id: str | None
    sample: Sample | None = None
    error: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A request whose media are read: a row for the model, or why there is none."""

    id: str | None
    row: Row | None = None
    error: str | None = None


@dataclass(frozen=True)
class Summary:
    """Rows that were there ``before`` and rows ``added`` now; ``errors`` among all of them."""

    before: int
    added: int
    errors: int


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
    """Answer a file of requests; started again after a kill, it goes on behind the last row that was written.

    Args:
        load: gives the model and its processor; called only when something is left to answer.
        checkpoint: the folder that they come from, by whose digest a second run knows that it is the same.
        requests: JSONL, one sample a line; relative media paths are relative to its folder.
        output: JSONL, ``{"id", "answer"}`` or ``{"id", "error"}`` in input order.
        generation: greedy when None.
        batch_size: prompts in a batch. It does not change greedy answers, so it may change between runs.
        workers: threads that decode ahead.
        loaded: how ``load`` changes the model (``quantize``, ``dtype``), JSON-able: it decides answers, too.

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
            pending = islice(read_requests(requests), before, None)
            with _progress() as bar:
                task = bar.add_task("answers", total=total, completed=before)
                ready = prepare_ahead(processor, pending, Path(requests).parent, workers, 2 * batch_size)
                for chunk in groups(ready, batch_size * BATCHES_A_CHUNK):
                    tick = partial(bar.advance, task)
                    journal.append(answer_chunk(model, processor, chunk, generation, batch_size, tick))
        return Summary(before, journal.done - before, journal.errors())


def count_requests(path: str | Path) -> int:
    """Lines that are not blank.

    Raises:
        ManifestError: no such file, or nothing in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"{path} is not a file; expected requests (JSONL, one sample a line)")
    with path.open("rb") as file:
        total = sum(bool(line.strip()) for line in file)
    if not total:
        raise ManifestError(f"{path} holds no request; expected one JSON object a line")
    return total


def read_requests(path: str | Path) -> Iterator[Request]:
    """The requests in order; a malformed line is a request with an error that names file, line and field."""
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
    try:
        found = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return None
    value = found.get("id") if isinstance(found, dict) else None
    return value if isinstance(value, str) else None


def prepare(processor: AVProcessor, request: Request, root: Path | None) -> Prepared:
    """Read a request's media and make its row; what is wrong with it becomes its error."""
    if request.sample is None:
        return Prepared(request.id, error=request.error)
    try:
        clips = MediaReader(processor).inputs(request.sample.media, root, request.sample.last_question)
        return Prepared(request.id, processor.row(request.sample, clips, answer=False))
    except (ValueError, OSError) as error:  # MediaError, RowError, a folder that may not be read
        reason = f"{error.reason}: " if isinstance(error, RowError) else ""
        return Prepared(request.id, error=f"{reason}{error}")


def prepare_ahead(
    processor: AVProcessor, requests: Iterable[Request], root: Path | None, workers: int, ahead: int
) -> Iterator[Prepared]:
    """:func:`prepare` in threads, in order, at most ``ahead`` requests before the one that is asked for."""
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        waiting: deque[Future[Prepared]] = deque()
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


def answer_chunk(
    model: AVLLM,
    processor: AVProcessor,
    chunk: Sequence[Prepared],
    generation: Generation,
    batch_size: int,
    tick: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Answers in the chunk's order; prompts of similar length share a batch, so that little is padding.

    ``tick`` is told how many rows are done, batch by batch.
    """
    found = {i: {"id": item.id, "error": item.error} for i, item in enumerate(chunk) if item.row is None}
    if tick and found:
        tick(len(found))
    good = [(i, item.row) for i, item in enumerate(chunk) if item.row is not None]
    good.sort(key=lambda pair: len(pair[1].input_ids))
    for group in groups(good, batch_size):
        texts = answer_rows(model, processor, [row for _, row in group], generation)
        found.update({i: {"id": row.id, "answer": text} for (i, row), text in zip(group, texts, strict=True)})
        if tick:
            tick(len(group))
    return [found[i] for i in range(len(chunk))]


def groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items; the last may be shorter."""
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
    """The same without files: one ``{"id", "answer"}`` or ``{"id", "error"}`` a sample, in order."""
    requests = (Request(s.id, s.question()) for s in samples)
    ready = prepare_ahead(processor, requests, root, workers, 2 * batch_size)
    for chunk in groups(ready, batch_size * BATCHES_A_CHUNK):
        yield from answer_chunk(model, processor, chunk, generation or Generation(), batch_size)


class _Rate(ProgressColumn):
    """Rows a second of this run."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} rows/s" if task.speed else "- rows/s")


def _progress() -> Progress:
    from rich.console import Console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
