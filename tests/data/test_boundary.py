"""A fault of one row is that row's, whatever class it has; faults of the machine are not."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from tiny import World, make_world, settings

from avllm.config import RunConfig
from avllm.data.boundary import one_row
from avllm.data.dataset import SampleDataset
from avllm.data.media.load import MediaError
from avllm.data.row import Row
from avllm.data.row_makers.base import Make, RowMaker
from avllm.data.schema import RowError, Sample
from avllm.errors import UserError
from avllm.inference.request_file import read_requests
from avllm.training.start import build_parts

LONG_NAME = "x" * 300 + ".mp4"


class Breaking(RowMaker):
    """Break on one sample, as a library might."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def rows(self, sample: Sample, make: Make, drawn: int | None) -> list[Row]:
        if sample.id == "caption-1":
            raise self.error
        return [make(sample)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=3)


@pytest.mark.parametrize(
    "error", [RecursionError(), RuntimeError("allocator"), MemoryError(), KeyError("x")], ids=repr
)
def test_what_a_library_raises_about_a_row_is_a_row_error(error: Exception) -> None:
    with pytest.raises(RowError, match=type(error).__name__) as raised, one_row():
        raise error
    assert raised.value.reason == "unexpected"


@pytest.mark.parametrize(
    "error",
    [
        MediaError("a.mp4", "missing", "no such file"),
        RowError("too_long", "9 tokens"),
        UserError("the cache is damaged"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_names_its_fault_or_concerns_the_run_is_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, one_row():
        raise error
    assert raised.value is error


def test_other_rows_of_a_dataset_come(world: World, tmp_path: Path) -> None:
    parts = build_parts(RunConfig.model_validate(settings(world, tmp_path)))
    lines = world.captions.read_text().splitlines()
    odd = json.loads(lines[2])
    odd["messages"][0]["content"][0]["video"] = LONG_NAME
    manifest = world.captions.with_name("odd.jsonl")
    manifest.write_text("\n".join([*lines[:2], json.dumps(odd)]) + "\n")
    maker = Breaking(RecursionError("too deep"))
    dataset = SampleDataset([str(manifest)], parts.processor, maker=maker)
    loaded = [dataset[number] for number in range(3)]
    assert [len(item.rows) for item in loaded] == [1, 0, 0]
    assert [bad.id for item in loaded for bad in item.bad] == ["caption-1", odd["id"]]
    assert loaded[1].bad[0].reason == "unexpected"


def test_a_request_that_no_parser_reads_is_an_error(tmp_path: Path) -> None:
    turn = '[{"role": "user", "content": "hi"}]'
    deep = "[" * 100_000 + "]" * 100_000
    lines = [
        f'{{"id": "good", "messages": {turn}}}',
        f'{{"id": "deep", "messages": {turn}, "meta": {{"a": {deep}}}}}',
        f'{{"id": "\\ud800", "messages": {turn}}}',
        f'{{"id": "last", "messages": {turn}}}',
    ]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("\n".join(lines))
    read = [line.request() for line in read_requests(requests)]
    assert [(request.id, request.sample is None) for request in read] == [
        ("good", False),
        (None, True),
        (None, True),
        ("last", False),
    ]
