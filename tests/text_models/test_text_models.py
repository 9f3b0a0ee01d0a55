"""Test text models: real weights, a real server, rules; answers that survive a kill."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import Reply, Server, said, stop
from tiny import make_llm

from avllm.data.store.append_only import AppendOnly, LockedError
from avllm.text_models.answers import Answers, answer_key
from avllm.text_models.base import Answer, ModelPrompt, TextModelError, spoken
from avllm.text_models.load import load_text_model
from avllm.text_models.local import HFModel
from avllm.text_models.rules import RuleModel
from avllm.text_models.server import ServerModel

PROMPTS = [
    ModelPrompt(text)
    for text in ("red", "is it a low sound ?", "describe the clip", "what colour is it and")
]


def echo(request: dict[str, Any], _: int) -> tuple[int, Any]:
    return 200, said(f"heard: {request['messages'][-1]['content']}")


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Server, ServerModel]]]:
    servers: list[Server] = []

    def start(reply: Reply, **options: Any) -> tuple[Server, ServerModel]:
        servers.append(Server(reply))
        return servers[-1], ServerModel(
            servers[-1].url, "m", **{"pause": 0.01, "attempts": 3, **options}
        )

    yield start
    for server in servers:
        stop(server)


def test_the_first_rule_that_fits_answers() -> None:
    model = RuleModel(
        [(r"a (\w+) barks", r"Barking of a \1."), ("barks", "Barking.")], otherwise="FAILURE"
    )
    asked = [ModelPrompt("a hound barks"), ModelPrompt("it barks"), ModelPrompt("rain")]
    assert [a.text for a in model.answer(asked)] == ["Barking of a hound.", "Barking.", "FAILURE"]


def test_what_a_model_thought_is_no_part_of_its_answer() -> None:
    assert spoken("<think>a dog?\nyes</think>\n A dog. ") == "A dog."
    assert (
        spoken("a dog?\nyes</think>\n\nA dog.") == "A dog."
    )  # the prompt ended with the opening mark
    assert spoken("It said <think> loudly.") == "It said <think> loudly."


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny LLM that ends some answers: a token that it says often counts as an end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    folder = make_llm(
        tmp_path_factory.mktemp("llm"), initializer_range=1.0
    )  # says other things to other prompts
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = plain(model, tokenizer, PROMPTS[0])
    late = next(
        token for place, token in enumerate(said) if place >= 2 and token not in said[:place]
    )
    model.generation_config.eos_token_id = [2, late]
    model.save_pretrained(folder)
    return folder


def plain(model: Any, tokenizer: Any, prompt: ModelPrompt) -> list[int]:
    """Return the ids of a greedy answer, generated without batches."""
    text = tokenizer.apply_chat_template(
        prompt.messages, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ].tolist()


def test_answers_in_a_batch_are_those_of_plain_generation(llm: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llm), AutoTokenizer.from_pretrained(llm)
    ends = model.generation_config.eos_token_id
    expected = []
    for prompt in PROMPTS:
        ids = plain(model, tokenizer, prompt)
        ended = set(ids) & set(ends)
        expected.append(tokenizer.decode(ids, skip_special_tokens=True).strip() if ended else None)
    answers = HFModel(str(llm), max_new_tokens=12, batch_size=3).answer(PROMPTS)
    assert [None if a.reason == "cut_off" else a.text for a in answers] == expected
    assert any(expected)
    assert HFModel(str(llm), max_new_tokens=12, batch_size=1).answer(PROMPTS) == answers


def test_a_prompt_that_does_not_fit_is_reported_and_the_others_are_answered(tmp_path: Path) -> None:
    folder = make_llm(tmp_path / "llm", max_position_embeddings=24)
    model = HFModel(str(folder), max_new_tokens=4, batch_size=2)
    long, short = model.answer([ModelPrompt("red " * 40), ModelPrompt("red")])
    assert (long.reason, short.reason) == ("prompt_too_long", "cut_off")
    assert "24" in long.detail


def test_an_hf_model_is_known_by_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = HFModel(str(make_llm(tmp_path / "one"))).identity
    two = HFModel(str(make_llm(tmp_path / "two"))).identity
    assert one["sha256"] != two["sha256"]
    assert {**one, "sha256": 0, "name": 0} == {**two, "sha256": 0, "name": 0}


def test_an_hf_model_without_template_or_without_a_folder_is_refused(tmp_path: Path) -> None:
    folder = make_llm(tmp_path / "llm")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TextModelError) as caught:
        HFModel(str(folder)).answer(PROMPTS)
    assert caught.value.reason == "no_chat_template"
    with pytest.raises(TextModelError) as caught:
        HFModel(str(tmp_path / "nothing")).answer(PROMPTS)
    assert caught.value.reason == "no_model"


def test_a_server_is_asked_several_at_a_time_and_answers_in_order(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "secret")

    four = threading.Barrier(4)

    def together(request: dict[str, Any], before: int) -> tuple[int, Any]:
        four.wait(timeout=60)  # breaks unless four are asked at a time
        return echo(request, before)

    server, model = serve(
        together, batch_size=4, key_variable="A_KEY", extra={"top_p": 1, "seed": None}
    )
    answers = model.answer([ModelPrompt(str(i), system="be brief") for i in range(8)])
    assert [a.text for a in answers] == [f"heard: {i}" for i in range(8)]
    assert server.most == 4
    assert server.requests[0]["messages"][0] == {"role": "system", "content": "be brief"}
    assert {k: server.requests[0].get(k) for k in ("model", "temperature", "top_p", "seed")} == {
        "model": "m", "temperature": 0, "top_p": 1, "seed": None,
    }  # fmt: skip
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)
    assert "secret" not in json.dumps(model.identity)


def test_a_large_batch_is_asked_at_once(serve: Any) -> None:
    all_requests = threading.Barrier(110)

    def together(request: dict[str, Any], before: int) -> tuple[int, Any]:
        all_requests.wait(timeout=60)
        return echo(request, before)

    _, model = serve(together, batch_size=110, attempts=1)
    assert [a.reason for a in model.answer([ModelPrompt(str(i)) for i in range(110)])] == [""] * 110


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(serve: Any, status: int) -> None:
    server, model = serve(
        lambda request, before: echo(request, before) if before == 2 else (status, "busy")
    )
    assert model.answer([ModelPrompt("a")])[0].text == "heard: a"
    assert len(server.requests) == 3


def test_a_server_that_is_silent_too_long_is_asked_again(serve: Any) -> None:
    def late(request: dict[str, Any], before: int) -> tuple[int, Any]:
        if before == 0:
            time.sleep(1.5)
        return echo(request, before)

    server, model = serve(late, timeout=0.7)
    assert model.answer([ModelPrompt("a")])[0].text == "heard: a"
    assert len(server.requests) == 2


def test_a_server_that_stays_away_stops_the_job(serve: Any) -> None:
    server, model = serve(lambda *_: (503, "overloaded"))
    with pytest.raises(TextModelError, match="503.*overloaded") as caught:
        model.answer([ModelPrompt("a")])
    assert caught.value.reason == "no_answer"
    assert len(server.requests) == 3
    gone, model = serve(echo, attempts=2)
    gone.http.server_close()
    with pytest.raises(TextModelError) as caught:
        model.answer([ModelPrompt("a")])
    assert caught.value.reason == "no_answer"


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (400, {"error": {"code": "content_filter", "message": "no"}}, "refused"),
        (
            400,
            {"error": {"message": "This model's maximum context length is 8 tokens"}},
            "prompt_too_long",
        ),
        (200, said("half an ans", "length"), "cut_off"),
        (200, said("", "content_filter"), "refused"),
        (
            200,
            {
                "choices": [
                    {"message": {"content": None, "refusal": "I won't"}, "finish_reason": "stop"}
                ]
            },
            "refused",
        ),
    ],
)
def test_a_prompt_without_an_answer_has_a_reason(
    serve: Any, status: int, body: Any, reason: str
) -> None:
    server, model = serve(lambda *_: (status, body))
    (answer,) = model.answer([ModelPrompt("a")])
    assert (answer.text, answer.reason) == ("", reason)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (401, "bad key", "refused_request"),
        (404, "no model m", "refused_request"),
        (400, {"error": {"message": "max_tokens is not supported"}}, "refused_request"),
        (200, "<html>a portal</html>", "no_json"),
        (200, {"choices": []}, "no_json"),
    ],
)
def test_what_would_fail_for_every_prompt_stops_the_job(
    serve: Any, status: int, body: Any, reason: str
) -> None:
    server, model = serve(lambda *_: (status, body))
    with pytest.raises(TextModelError) as caught:
        model.answer([ModelPrompt("a")])
    assert caught.value.reason == reason
    assert len(server.requests) == 1


def test_short_names_make_models_and_mistakes_have_reasons(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: [[dog, A dog.]]\notherwise: FAILURE\n")
    assert load_text_model(f"rules:{rules}").answer([ModelPrompt("dog")]) == [Answer("A dog.")]
    settings = tmp_path / "model.yaml"
    settings.write_text(
        "{type: server, url: 'http://127.0.0.1:9/v1/', model: m, identity: lab, attempts: 2}\n"
    )
    assert load_text_model(str(settings)).identity["server"] == "lab"
    assert load_text_model("http://127.0.0.1:9/v1#m").identity["model"] == "m"
    assert load_text_model("hf:some/name").identity["name"] == "some/name"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("{type: hf, name: x, temperature: 1}\n")
    (tmp_path / "no.yaml").write_text('["half')
    (tmp_path / "pattern.yaml").write_text("rules: [['(dog', A dog.]]")
    (tmp_path / "group.yaml").write_text(r"rules: [['(dog)', 'A \2.']]")
    (tmp_path / "batch.yaml").write_text("{type: hf, name: x, batch_size: '8'}")
    for name, reason in {
        "gpt": "unknown_kind",
        "http://127.0.0.1:9/v1": "no_model",
        str(wrong): "bad_options",
        f"rules:{tmp_path / 'pattern.yaml'}": "bad_options",
        f"rules:{tmp_path / 'group.yaml'}": "bad_options",
        str(tmp_path / "batch.yaml"): "bad_options",
    }.items():
        with pytest.raises(TextModelError) as caught:
            load_text_model(name)
        assert caught.value.reason == reason
    for name in ("nothing.yaml", str(tmp_path / "no.yaml")):
        with pytest.raises(TextModelError, match=re.escape(name)):
            load_text_model(f"rules:{name}")


class Counting(RuleModel):
    """Rules that count what they are asked."""

    batch_size = 2

    def __init__(self, **options: Any) -> None:
        super().__init__([("(.+)", r"\1!")], **options)
        self.asked: list[str] = []

    def answer(self, prompts: Any) -> list[Answer]:
        self.asked += [p.user for p in prompts]
        if any(p.user == "down" for p in prompts):
            raise TextModelError("the server is down")
        return super().answer(prompts)


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    prompts = [ModelPrompt(t) for t in ("a", "b", "a", "c")]
    model = Counting()
    answers = Answers(tmp_path).ask(model, prompts, "one")
    assert [a.text for a in answers] == ["a!", "b!", "a!", "c!"]
    assert model.asked == ["a", "b", "c"]
    again = Counting()
    assert Answers(tmp_path).ask(again, [*prompts, ModelPrompt("d")], "two") == [
        *answers,
        Answer("d!"),
    ]
    assert again.asked == ["d"]
    other = Counting(otherwise="another model")
    Answers(tmp_path).ask(other, prompts, "one")
    assert other.asked == ["a", "b", "c"]


def test_keys_differ_by_prompt_model_and_settings() -> None:
    models = [RuleModel([]), RuleModel([], "x"), HFModel("a/b"), HFModel("a/b", max_new_tokens=9)]
    prompts = [ModelPrompt("a"), ModelPrompt("a", system="s"), ModelPrompt("b")]
    keys = {answer_key(model, prompt) for model in models for prompt in prompts}
    assert len(keys) == 12


def test_what_was_answered_before_a_failure_or_a_kill_is_kept(tmp_path: Path) -> None:
    prompts = [ModelPrompt(t) for t in ("a", "b", "down")]
    with pytest.raises(TextModelError, match="is down"):
        Answers(tmp_path).ask(Counting(), prompts, "one")
    with (tmp_path / "one.jsonl").open("ab") as file:
        file.write(b'{"key": "half a ro')  # as a kill leaves it
    model = Counting()
    answers = Answers(tmp_path).ask(model, [ModelPrompt(t) for t in ("a", "b", "c")], "one")
    assert model.asked == ["c"]
    assert [a.text for a in answers] == ["a!", "b!", "c!"]
    assert [json.loads(line)["text"] for line in (tmp_path / "one.jsonl").open()] == [
        "a!",
        "b!",
        "c!",
    ]


@pytest.mark.parametrize(
    "line", [b"{}\n", b"[1]\n", b'{"key" 1}\n', b'{"key": "a", "texts": ""}\n', b"\xff\n"]
)
def test_a_damaged_file_of_answers_is_named(tmp_path: Path, line: bytes) -> None:
    Answers(tmp_path).ask(Counting(), [ModelPrompt("a")], "one")
    with (tmp_path / "one.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(TextModelError, match=r"one\.jsonl") as caught:
        Answers(tmp_path).ask(Counting(), [ModelPrompt("a")], "two")
    assert caught.value.reason == "no_answer"


def test_failures_are_kept_with_their_reasons(tmp_path: Path, serve: Any) -> None:
    server, model = serve(lambda *_: (200, said("half", "length")))
    first = Answers(tmp_path).ask(model, [ModelPrompt("a")], "one")
    assert Answers(tmp_path).ask(model, [ModelPrompt("a")], "one") == first
    assert first[0].reason == "cut_off"
    assert len(server.requests) == 1


def test_one_process_writes_a_file_and_opening_cuts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"whole\nhalf")
    with AppendOnly(path) as file:
        assert file.count == 1
        with pytest.raises(LockedError):
            AppendOnly(path)
    assert path.read_bytes() == b"whole\nhalf"
    with AppendOnly(path) as file:
        file.append([{"a": "ä"}])
    assert path.read_bytes() == 'whole\n{"a": "ä"}\n'.encode()
