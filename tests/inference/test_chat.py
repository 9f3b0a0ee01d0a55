"""A chat: streamed = not streamed, several turns, stop, clear, errors, and what was perceived."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from avllm.data.media.load import MediaError, load_video
from avllm.data.schema import RowError, Sample
from avllm.errors import UserError
from avllm.inference.asked_files import media_kind
from avllm.inference.chat import Chat
from avllm.inference.generation import Generation, answer_rows, stop_ids
from avllm.inference.stream import stream_text

QUESTION = "what colour is it ?"


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Chat:
    return Chat.load(checkpoint)


@pytest.fixture
def chat(loaded: Chat) -> Chat:
    return Chat(loaded.model, loaded.processor)


def whole(chat: Chat, messages: list[dict], **generation: object) -> str:
    """The answer without streaming, from a row of its own."""
    sample = Sample.model_validate({"id": "x", "messages": messages})
    clips = [chat.processor.prepare(c) for c in chat.processor.load_clips(sample.media, None)]
    row = chat.processor.row(sample, clips, answer=False)
    return answer_rows(chat.model, chat.processor, [row], Generation(**generation))[0]


def user(*content: dict | str) -> dict:
    return {
        "role": "user",
        "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content],
    }


def video(path: Path) -> dict:
    return {"type": "video", "video": str(path)}


def test_streamed_is_not_streamed(chat: Chat, clips: list[Path]) -> None:
    for clip in clips:
        chat.clear()
        pieces = list(chat.ask(QUESTION, video=clip, max_new_tokens=24))
        assert len(pieces) > 1
        assert "".join(pieces) == whole(chat, [user(video(clip), QUESTION)], max_new_tokens=24)


def test_answers_depend_on_sight_and_on_sound(chat: Chat, clips: list[Path]) -> None:
    def ask(**media: object) -> str:
        chat.clear()
        return "".join(chat.ask(QUESTION, max_new_tokens=24, **media))

    assert ask(video=clips[0]) == ask(video=clips[0])
    assert (
        len(
            {
                ask(video=clips[0]),
                ask(video=clips[1]),
                ask(video=clips[0], sound="off"),
                ask(),
                ask(audio=clips[0]),
            }
        )
        == 5
    )


def test_second_turn_sees_the_first(chat: Chat, clips: list[Path]) -> None:
    first = "".join(chat.ask(QUESTION, video=clips[0], max_new_tokens=8))
    second = "".join(chat.ask("and do you hear it ?", max_new_tokens=16))
    history = [
        user(video(clips[0]), QUESTION),
        {"role": "assistant", "content": first},
        user("and do you hear it ?"),
    ]
    assert second == whole(chat, history, max_new_tokens=16)
    assert [m.role for m in chat.messages] == ["user", "assistant"] * 2
    again = Chat(chat.model, chat.processor)
    assert "".join(again.ask(history, max_new_tokens=16)) == second
    assert again.messages == chat.messages


def test_stop_ends_the_answer_and_keeps_what_was_said(chat: Chat, clips: list[Path]) -> None:
    pieces = chat.ask(QUESTION, video=clips[0], max_new_tokens=1000, temperature=2.0)
    first = next(pieces)
    chat.stop()
    began = time.monotonic()
    rest = list(pieces)
    assert time.monotonic() - began < 5
    assert len(rest) < 900
    assert chat.messages[-1].text == first + "".join(rest)


def test_closing_the_iterator_ends_the_thread(chat: Chat, clips: list[Path]) -> None:
    pieces = chat.ask(QUESTION, video=clips[0], max_new_tokens=1000, temperature=2.0)
    first = next(pieces)
    pieces.close()
    assert chat.messages[-1].text == first


def test_clear_forgets_an_unfinished_answer(chat: Chat, clips: list[Path]) -> None:
    pieces = chat.ask(QUESTION, video=clips[0], max_new_tokens=50)
    next(pieces)
    chat.clear()
    list(pieces)
    assert chat.messages == []
    assert chat.perceived == []


def test_errors_of_the_thread_come_out(chat: Chat) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_text(broken, lambda ids, whole: str(ids), chat._stop))


def test_errors_come_at_once_and_leave_the_chat_as_it_was(
    chat: Chat, clips: list[Path], tmp_path: Path
) -> None:
    list(chat.ask(QUESTION, video=clips[0], max_new_tokens=4))
    before = list(chat.messages)
    with pytest.raises(MediaError) as unread:
        chat.ask(QUESTION, video=tmp_path / "no.mp4")
    assert unread.value.reason == "missing"
    with pytest.raises(RowError) as reserved:
        chat.ask("\x01 ?")
    assert reserved.value.reason == "reserved_text"
    mistakes: list[tuple[str, Any, dict[str, Any]]] = [
        ("empty", "  ", {}),
        ("no_utf8", "half a character \ud800", {}),
        ("sound", QUESTION, {"video": clips[0], "sound": "loud"}),
        ("temperature", QUESTION, {"temperature": -1}),
        ("media_beside_messages", [user(QUESTION)], {"video": clips[0]}),
    ]
    for reason, question, options in mistakes:
        with pytest.raises(UserError) as mistake:
            chat.ask(question, **options)
        assert mistake.value.reason == reason
    assert chat.messages == before
    assert "".join(chat.ask(QUESTION, max_new_tokens=4))


def test_sampling_draws_and_greedy_does_not(chat: Chat, clips: list[Path]) -> None:
    def ask(seed: int, **settings: float) -> str:
        torch.manual_seed(seed)
        chat.clear()
        return "".join(chat.ask(QUESTION, video=clips[0], max_new_tokens=24, **settings))

    assert ask(0, temperature=1.5) == ask(0, temperature=1.5) != ask(1, temperature=1.5)
    assert (
        ask(0) == ask(1) == ask(2, temperature=1.0, top_p=1e-6)
    )  # only the most likely token is left


def test_perceived_is_what_went_in(chat: Chat, clips: list[Path]) -> None:
    list(chat.ask(QUESTION, video=clips[2], max_new_tokens=2))
    (seen,) = chat.perceived
    decoded = load_video(clips[2], sampling=chat.processor.sampling, rate=16_000)
    assert torch.equal(seen.frames, decoded.frames.x)  # 32 x 32 already: nothing to resize
    assert torch.equal(seen.sound.x, decoded.sound.x)
    assert seen.span.tolist() == [[0.0, 1.25], [1.25, 2.5]]
    inputs = chat.processor.prepare(decoded)["audio"].inputs[
        "input_features"
    ]  # (3 windows, 20, 100)
    length = -(-len(decoded.sound.x) // 160)
    assert torch.equal(seen.spectrogram, torch.cat(list(inputs), 1)[:, :length])
    assert seen.tokens == {"video": 2 * 16, "audio": -(-len(decoded.sound.x) // 320)}


def test_sound_can_be_switched_off_for_the_whole_chat(chat: Chat, clips: list[Path]) -> None:
    first = "".join(chat.ask(QUESTION, video=clips[0], max_new_tokens=8))
    chat.use_sound("off")
    second = "".join(chat.ask("and ?", max_new_tokens=16))
    deaf = user({**video(clips[0]), "sound": "off"}, QUESTION)
    answer = {"role": "assistant", "content": first}
    assert second == whole(chat, [deaf, answer, user("and ?")], max_new_tokens=16)
    assert [p.sound for p in chat.perceived] == [None]


def test_look_reads_without_asking(chat: Chat, clips: list[Path], tmp_path: Path) -> None:
    (silent,) = chat.look(video=clips[1])
    assert silent.sound is None
    assert silent.spectrogram is None
    assert chat.messages == []
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    (picture,) = chat.look(image=tmp_path / "red.png")
    assert picture.frames.shape == (1, 32, 32, 3)
    assert [media_kind(p) for p in (clips[0], tmp_path / "red.png")] == ["video", "image"]
    names = {"picture": "red.png", "video.png": clips[0]}  # what is in a file counts, not its name
    for name, content in names.items():
        (tmp_path / name).write_bytes((tmp_path / content).read_bytes())
    assert [media_kind(tmp_path / name) for name in names] == ["image", "video"]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
    assert media_kind(tmp_path / "broken.png") == "image"
    (tmp_path / "empty.png").touch()
    with pytest.raises(MediaError) as error:
        media_kind(tmp_path / "empty.png")
    assert error.value.reason == "zero_byte"


def test_what_ends_a_turn_ends_the_answer(chat: Chat) -> None:
    tokenizer = chat.processor.tokenizer
    assert stop_ids(chat.model, chat.processor) == [tokenizer.eos_token_id]
    known = tokenizer.chat_template
    try:  # ChatML on a base model: its end-of-sequence token is not what ends a turn
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|im_end|>"]}, replace_extra_special_tokens=False
        )
        template = "{{ m['role'] + ' ' + m['content'] + '<|im_end|>\n' }}"
        tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
        wanted = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
        assert set(stop_ids(chat.model, chat.processor)) == wanted
    finally:
        tokenizer.chat_template = known
