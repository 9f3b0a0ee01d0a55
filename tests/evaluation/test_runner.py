"""The runner: removed is gone, swapped is another's, and no batching changes an answer."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avllm.data.manifest import read_manifest, write_manifest
from avllm.data.row import IGNORE, Row
from avllm.evaluation import asking, clips, swapping
from avllm.evaluation.asking import FailedRowsError
from avllm.evaluation.benchmarks.base import Prediction, Score, failed_score, score_by_form
from avllm.evaluation.conditions import AS_IS, Condition
from avllm.evaluation.results import Result
from avllm.evaluation.runner import evaluate, evaluate_all
from avllm.objectives.next_token import NextToken
from avllm.registry import build

Loaded = tuple[Any, Any]
WITHOUT = [Condition(without=w) for w in ("audio", "video", "both")]  # type: ignore[arg-type]
EVERY = [AS_IS, *WITHOUT, Condition(swap="audio"), Condition(swap="video")]


def answers(result: Result) -> dict[str, str]:
    return {p.sample.id: p.answer for p in result.predictions}


@pytest.fixture(scope="module")
def results(loaded: Loaded, questions: Path) -> dict[str, Result]:
    return evaluate_all(*loaded, questions, EVERY, max_new_tokens=6)


def test_every_row_is_answered_under_every_condition(
    results: dict[str, Result], questions: Path
) -> None:
    ids = sorted(s.id for s in read_manifest(questions))
    assert set(results) == {c.name for c in EVERY}
    assert all([p.sample.id for p in r.predictions] == ids for r in results.values())
    assert results["as_is"].overall["n"] == len(ids)
    assert (
        len(set(answers(results["as_is"]).values())) > 1
    )  # the tiny model does not say one thing always


def test_answers_are_those_of_generate_row_by_row(
    loaded: Loaded, questions: Path, results: dict[str, Result]
) -> None:
    """Shared prefixes, batches and cached features change nothing of the model's answers."""
    from avllm.inference.generation import Generation

    model, processor = loaded
    arguments = Generation(max_new_tokens=6).arguments(model, processor)
    for sample in read_manifest(questions)[:6]:
        clips = [processor.prepare(c) for c in processor.load_clips(sample.media, questions.parent)]
        batch = processor.collate([processor.row(sample, clips, answer=False)], padding_side="left")
        assert processor.decode(model.generate(batch, **arguments)) == [
            answers(results["as_is"])[sample.id]
        ]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_and_chunks_change_no_answer(
    loaded: Loaded, questions: Path, results: dict[str, Result], batch_size: int
) -> None:
    again = evaluate(
        *loaded, questions, max_new_tokens=6, batch_size=batch_size, clips_at_once=batch_size
    )
    assert answers(again) == answers(results["as_is"])


def test_llms_whose_cache_cannot_be_shared_say_the_same(
    loaded: Loaded, questions: Path, results: dict[str, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avllm.evaluation.answering.cache_is_selectable", lambda llm: False)
    assert answers(evaluate(*loaded, questions, max_new_tokens=6)) == answers(results["as_is"])


def test_two_runs_are_equal(loaded: Loaded, questions: Path, results: dict[str, Result]) -> None:
    again = evaluate_all(*loaded, questions, EVERY, max_new_tokens=6, num_workers=2)
    assert {n: r.to_dict() for n, r in again.items()} == {
        n: r.to_dict() for n, r in results.items()
    }


def test_a_cache_changes_nothing(
    loaded: Loaded, questions: Path, results: dict[str, Result], tmp_path: Path
) -> None:
    for _ in range(2):  # filled, then read
        again = evaluate_all(
            *loaded, questions, EVERY[:2], max_new_tokens=6, cache=tmp_path / "cache"
        )
        assert {n: answers(r) for n, r in again.items()} == {n: answers(results[n]) for n in again}


def seen_rows(
    loaded: Loaded, questions: Path, monkeypatch: pytest.MonkeyPatch, condition: Condition
) -> dict[str, Any]:
    """The rows that reach the model, by condition (as they are first)."""
    caught: list[Any] = []

    def catch(model: Any, processor: Any, rows: list[Any], **_: Any) -> list[str]:
        caught.append({row.id: row for row in rows})
        return [""] * len(rows)

    monkeypatch.setattr(asking, "answer_rows", catch)
    evaluate(*loaded, questions, without=condition.without, swap=condition.swap)
    return {"plain": caught[0], "changed": caught[1]}


def count(row: Any, token: int) -> int:
    return int((row.input_ids == token).sum())


@pytest.mark.parametrize(
    "without, gone", [("audio", ["audio"]), ("video", ["video"]), ("both", ["audio", "video"])]
)
def test_without_leaves_no_token_of_the_stream(
    loaded: Loaded, questions: Path, monkeypatch: pytest.MonkeyPatch, without: Any, gone: list[str]
) -> None:
    rows = seen_rows(loaded, questions, monkeypatch, Condition(without=without))
    ids = loaded[1].config.media_token_ids
    text = {i: row.input_ids[~row.is_media].tolist() for i, row in rows["plain"].items()}
    for name, row in rows["changed"].items():
        for stream, token in ids.items():
            assert count(row, token) == (0 if stream in gone else count(rows["plain"][name], token))
        assert all(stream not in clip for clip in row.clips for stream in gone)
        assert row.input_ids[~row.is_media].tolist() == text[name]  # the text stays
    assert any(count(row, ids[gone[0]]) for row in rows["plain"].values())


@pytest.mark.parametrize("stream", ["audio", "video"])
def test_swap_takes_the_stream_of_another_clip(
    loaded: Loaded, questions: Path, monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    rows = seen_rows(loaded, questions, monkeypatch, Condition(swap=stream))
    other = "video" if stream == "audio" else "audio"
    owner: dict[int, str] = {}

    def features(row: Any, name: str) -> Tensor:
        return row.clips[0][name].features[""]

    samples = {s.id: s for s in read_manifest(questions)}
    for name, row in rows["plain"].items():
        if row.clips and stream in row.clips[0]:
            owner[features(row, stream).data_ptr()] = samples[name].media[0].path
    having = {name for name, row in rows["plain"].items() if row.clips and stream in row.clips[0]}
    assert rows["changed"].keys() == having  # what stays as it was is not asked again
    for name, row in rows["changed"].items():
        plain = rows["plain"][name]
        assert owner[features(row, stream).data_ptr()] != samples[name].media[0].path
        if other in plain.clips[0]:
            assert features(row, other) is features(plain, other)
        else:
            assert other not in row.clips[0]
    assert len(having) == (16 if stream == "audio" else 24)


def test_touched_and_changed_are_told(results: dict[str, Result]) -> None:
    assert results["as_is"].overall["touched"] == 0.0
    assert "changed" not in results["as_is"].overall
    assert results["without_audio"].overall["touched"] == pytest.approx(
        16 / 25
    )  # four of twelve clips have no sound
    for prediction in results["without_audio"].predictions:
        if not prediction.touched:
            assert prediction.changed is False
    blind = {p.sample.id: p for p in results["without_both"].predictions}
    assert (
        blind["colour-0"].answer == blind["colour-3"].answer
    )  # the same words without any media: the same answer


def test_untouched_rows_say_the_same_when_they_are_asked_again(
    loaded: Loaded, questions: Path, results: dict[str, Result]
) -> None:
    """Beside the rows as they are an untouched row keeps its answer; without them it is asked."""
    told: list[tuple[int, int]] = []
    alone = evaluate_all(
        *loaded, questions, EVERY[1:], max_new_tokens=6, progress=lambda *done: told.append(done)
    )
    assert {n: answers(r) for n, r in alone.items()} == {n: answers(results[n]) for n in alone}
    rows = len(results["as_is"].predictions) * len(EVERY[1:])
    assert told[-1] == (rows, rows)
    told.clear()
    evaluate_all(
        *loaded, questions, EVERY[:2], max_new_tokens=6, progress=lambda *done: told.append(done)
    )
    assert told[-1] == (50, 50)


def test_scores_by_form() -> None:
    row = {
        "id": "q",
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "red"}],
    }
    sample = read_row(row | {"choices": ["red", "blue"]})
    assert score_by_form(sample, "it is red", 1.0, "unanswerable").correct is True
    assert score_by_form(sample, "Unanswerable.", 1.0, "unanswerable").refused is True
    assert (
        score_by_form(read_row(row | {"answers": ["crimson"]}), "Crimson", 1.0, "x").correct is True
    )
    lettered = read_row(row | {"choices": ["red", "blue"], "messages": answered(row, "A")})
    assert [score_by_form(lettered, a, 1.0, "x").correct for a in ("A", "red", "(b)", "blue")] == [
        True,
        True,
        False,
        False,
    ]
    timed = read_row(row | {"seconds": 1.25})
    assert score_by_form(timed, "1.5", 4.0, "x").error == pytest.approx(0.25)
    lost = score_by_form(timed, "no idea", 4.0, "x")
    assert (lost.error, lost.is_number, lost.correct) == (4.0, False, None)
    own = read_row(row | {"meta": {"refusal": "cannot say"}})
    assert score_by_form(own, "Cannot say.", 1.0, "unanswerable").refused is True


def answered(row: dict[str, Any], answer: str) -> list[dict[str, Any]]:
    return [row["messages"][0], {"role": "assistant", "content": answer}]


def read_row(row: dict[str, Any]) -> Any:
    from avllm.data.manifest import parse_row

    return parse_row(json.dumps(row), "test")


def test_figures_of_choices_and_times(results: dict[str, Result]) -> None:
    colour = results["as_is"].kinds["seen.colour"]
    assert (colour["n"], colour["chance"], colour["chance_uniform"]) == (12, 0.25, 0.25)
    assert colour["low"] <= colour["accuracy"] <= colour["high"]
    assert "f1" in results["as_is"].kinds["heard.pitch"]
    assert set(results["as_is"].sources) == {"tiny", "unknown"}


def test_a_bad_file_is_named_and_too_many_stop_the_run(
    loaded: Loaded, questions: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for row in rows:
        for part in row["messages"][0]["content"]:
            if isinstance(part, dict) and part["type"] == "video":
                part["video"] = str(questions.parent / part["video"])
    rows[0]["messages"][0]["content"][0]["video"] = "gone.mp4"
    manifest = tmp_path / "broken.jsonl"
    write_manifest(manifest, rows)
    with pytest.raises(FailedRowsError, match="1 of 25 rows.*colour-0.*gone.mp4"):
        evaluate(*loaded, manifest)
    results = evaluate_all(*loaded, manifest, EVERY, max_skip_rate=0.1, max_new_tokens=2)
    for name, result in results.items():
        assert [(s["id"], s["reason"]) for s in result.failed] == [("colour-0", "missing")], name
        colours = result.kinds["seen.colour"]
        assert (colours["n"], colours["n_judged"], colours["failed"]) == (12, 12, 1 / 12), name
        (failed,) = [p for p in result.predictions if p.failed]
        assert (failed.sample.id, failed.score.correct, failed.answer) == ("colour-0", False, "")


def test_a_time_that_was_not_asked_has_the_error_of_no_answer() -> None:
    timed = {"seconds": 1.25, "messages": answered({"messages": ["?"]}, "1.2")}
    timed["messages"][0] = {"role": "user", "content": "when ?"}
    score = failed_score(score_by_form(read_row({"id": "t", **timed}), "", 4.0, "x"))
    assert (score.error, score.is_number) == (4.0, False)
    empty = read_row(
        {"id": "e", "messages": [timed["messages"][0], {"role": "assistant", "content": "..."}]}
    )
    assert score_by_form(empty, "", 1.0, "").correct is True  # nothing is left of either
    assert failed_score(score_by_form(empty, "", 1.0, "")) == Score(False, 0.0, is_number=False)


def test_a_swap_without_a_partner_is_an_error(
    loaded: Loaded, questions: Path, tmp_path: Path
) -> None:
    first = questions.parent / "one.jsonl"
    first.write_text("".join(questions.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match="another file"):
        evaluate(*loaded, first, swap="audio", max_new_tokens=2)


def test_rows_that_keep_their_own_stream_in_a_swap_are_told(
    loaded: Loaded, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows[0]["kind"] = "seen.once"
    manifest = questions.parent / "one_kind_once.jsonl"
    write_manifest(manifest, rows)
    logged: list[tuple[Any, ...]] = []
    monkeypatch.setattr(asking, "answer_rows", lambda model, processor, rows, **_: [""] * len(rows))
    monkeypatch.setattr(swapping.LOG, "warning", lambda text, *values: logged.append(values))
    result = evaluate(*loaded, manifest, swap="video")
    assert logged == [("swapped_video", 1, "video", "seen.once")]
    assert result.overall["touched"] == pytest.approx(23 / 25)


ORDERS = {"sorted": lambda rows: sorted(rows, key=lambda row: json.dumps(row["messages"][-1]))}
ORDERS["backwards"] = lambda rows: rows[::-1]
ORDERS["shuffled"] = lambda rows: random.Random(1).sample(rows, len(rows))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("more", [{}, {"clips_at_once": 5, "batch_size": 3}, {"limit": 7}], ids=str)
def test_no_figure_depends_on_the_order_of_the_rows(
    loaded: Loaded, questions: Path, order: str, more: dict[str, Any]
) -> None:
    """All conditions, with intervals and answers, to the last digit."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for number, row in enumerate(rows):  # errors whose sum depends on their order
        if row["kind"] == "heard.pitch":
            row["seconds"] = 0.1 + number / 7
    reports = []
    for name, ordered in (("first", rows), (order, ORDERS[order](rows))):
        manifest = questions.parent / f"{name}.jsonl"
        write_manifest(manifest, ordered)
        results = evaluate_all(*loaded, manifest, EVERY, max_new_tokens=6, **more)
        reports.append(
            {n: (r.to_dict(), [p.to_dict(n) for p in r.predictions]) for n, r in results.items()}
        )
    assert reports[0] == reports[1]


def test_figures_of_the_same_predictions_in_any_order_are_equal() -> None:
    """Sums and resamples of errors that have no exact form go by the rows' ids."""
    predictions = []
    for number in range(40):
        fields = {
            "id": f"t{number}",
            "seconds": number / 7,
            "messages": answered({"messages": ["?"]}, "1"),
        }
        fields["messages"][0] = {"role": "user", "content": "when ?"}
        sample = read_row(fields)
        predictions.append(Prediction(sample, "1", score_by_form(sample, "1", 9.0, "x")))
    result = Result(AS_IS, predictions)
    for seed in range(5):
        shuffled = random.Random(seed).sample(predictions, len(predictions))
        assert replace(result, predictions=shuffled).to_dict() == result.to_dict()


@pytest.mark.parametrize("swap", ["audio", "video"])
def test_partners_are_drawn_over_the_whole_manifest(
    loaded: Loaded, questions: Path, monkeypatch: pytest.MonkeyPatch, swap: Any
) -> None:
    """However few clips are held at a time, the partners are the same."""
    chosen: list[Any] = []
    real = swapping.partners

    def noting(units: Any, seed: int) -> Any:
        chosen.append(real(units, seed))
        return chosen[-1]

    monkeypatch.setattr(asking, "answer_rows", lambda model, processor, rows, **_: [""] * len(rows))
    monkeypatch.setattr(swapping, "partners", noting)
    for held in (256, 3):
        evaluate(*loaded, questions, swap=swap, clips_at_once=held)
    assert chosen[0] == chosen[1]
    assert len({part for _, part in chosen[0]}) == (8 if swap == "audio" else 12)


def test_a_clip_is_encoded_once_or_where_few_are_held_once_more_a_swap(
    loaded: Loaded, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Any] = []
    real = clips.encode_clips

    def noting(model: Any, processor: Any, parts: Any, *rest: Any, **more: Any) -> Any:
        encoded.extend(parts)
        return real(model, processor, parts, *rest, **more)

    monkeypatch.setattr(asking, "answer_rows", lambda model, processor, rows, **_: [""] * len(rows))
    monkeypatch.setattr(clips, "encode_clips", noting)
    evaluate(*loaded, questions, swap="video")
    assert len(encoded) == 12
    encoded.clear()
    evaluate(*loaded, questions, swap="video", clips_at_once=6)
    assert len(encoded) <= 12 + 12 + 3  # and the seams of three chunks


def test_without_media_times_are_still_shares_of_the_whole_clip(
    loaded: Loaded, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = loaded
    rows = [json.loads(line) for line in questions.read_text().splitlines()][:4]
    for row in rows:
        row["messages"][0]["content"].append({"type": "time", "seconds": 0.5})
    manifest = questions.parent / "timed.jsonl"
    write_manifest(manifest, rows)
    asked: list[Any] = []

    def catch(model: Any, processor: Any, rows: list[Any], **_: Any) -> list[str]:
        asked.extend(rows)
        return [""] * len(rows)

    monkeypatch.setattr(processor.content, "codec", build("time_codecs", {"type": "percent"}))
    monkeypatch.setattr(asking, "answer_rows", catch)
    results = evaluate_all(*loaded, manifest, [AS_IS, Condition(without="both")], max_new_tokens=2)
    assert [result.failed for result in results.values()] == [[], []]
    durations = [row.duration for row in asked]
    assert durations[:4] == durations[4:]
    assert all(duration == pytest.approx(1.0, abs=0.1) for duration in durations)


def test_right_answers_of_one_forward_pass_are_those_that_generation_gives(
    loaded: Loaded, questions: Path
) -> None:
    """The model's answers are references, of every third row with another last token."""
    from avllm.inference.generation import Generation

    model, processor = loaded
    arguments = Generation(max_new_tokens=4).arguments(model, processor)
    rows = []
    for number, sample in enumerate(read_manifest(questions)):
        clips = [processor.prepare(c) for c in processor.load_clips(sample.media, questions.parent)]
        prompt = processor.row(sample, clips, answer=False)
        (answer,) = model.generate(processor.collate([prompt], padding_side="left"), **arguments)
        if number % 3 == 0:
            answer[-1] = answer[-1] + 1 if answer[-1] == 0 else answer[-1] - 1
        rows.append(answered_by(prompt, answer))
    with torch.no_grad():
        _, figures = NextToken(model)(model, processor.collate(rows))
    assert figures["answers"].tolist() == [16, 25]


def answered_by(prompt: Row, answer: Tensor) -> Row:
    """Return a prompt as a training row with the given tokens as its answer."""
    length = len(prompt.input_ids)
    part = replace(prompt.parts[-1], trained=torch.arange(length, length + len(answer)))
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, answer]),
        labels=torch.cat([torch.full((length,), IGNORE), answer]),
        is_media=torch.cat([prompt.is_media, torch.zeros(len(answer), dtype=torch.bool)]),
        parts=(part,),
    )


def test_precision_is_part_of_what_a_cache_holds(
    loaded: Loaded, questions: Path, tmp_path: Path
) -> None:
    plain = evaluate(*loaded, questions, max_new_tokens=6, precision="bf16")
    for precision in ("fp32", "bf16", "bf16"):
        cached = evaluate(
            *loaded, questions, max_new_tokens=6, precision=precision, cache=tmp_path / "cache"
        )
    assert answers(cached) == answers(plain)
    with pytest.raises(ValueError, match="precision is 'fp16'.*'bf16'"):
        evaluate(*loaded, questions, precision="fp16")
