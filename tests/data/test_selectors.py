"""Which frames a selector keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from avllm.data.media.load import Clip, Frames
from avllm.data.selectors.query_guided import QueryGuided, best_moments, question_scores


def film(steps: int, event: int | None = None) -> Clip:
    """Still pictures of one second each; at ``event`` something white moves through."""
    x = torch.zeros(steps, 64, 64, 3, dtype=torch.uint8)
    if event is not None:
        x[event, :, :32] = 255
    edges = torch.arange(steps + 1.0)
    return Clip(Frames(x, torch.stack([edges[:-1], edges[1:]], 1)), None, float(steps))


@pytest.mark.parametrize("event", [1, 20, 47])
def test_what_moves_is_kept_with_its_seconds(event: int) -> None:
    kept = QueryGuided(frames=4).select(film(50, event), "").frames
    assert kept is not None
    assert len(kept.x) == 4
    assert event in kept.span[:, 0].tolist()
    assert kept.x.amax() == 255


def test_a_short_clip_is_kept_whole() -> None:
    clip = film(4, 2)
    assert QueryGuided(frames=4).select(clip, "") is clip


def test_moments_share_the_frames() -> None:
    scores = torch.zeros(30)
    scores[5], scores[21] = 3.0, 2.0
    assert best_moments(scores, 3, 1).tolist() == [4, 5, 6]
    assert best_moments(scores, 5, 2).tolist() == [4, 5, 6, 20, 21]
    assert best_moments(scores, 2, 2).tolist() == [5, 21]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames 0"),
        ({"frames": 2, "spans": 3}, "spans 3"),
        ({"scorer": "flow"}, "'flow'"),
        ({"scorer": "clip"}, "needs the name"),
    ],
)
def test_settings_that_contradict_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueryGuided(**options)  # type: ignore[arg-type]


def test_a_clip_model_scores_frames_by_the_question(tmp_path: Path) -> None:
    from transformers import (
        BertTokenizerFast,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    text = {"vocab_size": 8, "max_position_embeddings": 12, "eos_token_id": 3, **sizes, **heads}
    picture = {"image_size": 32, "patch_size": 16, **sizes, **heads}
    config = CLIPConfig(text_config=text, vision_config=picture, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "ball", "?"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=12)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(tmp_path)
    clip = film(40, 20)
    assert clip.frames is not None
    scores = question_scores(clip.frames.x, "a red ball ?", str(tmp_path))
    assert scores.shape == (40,)
    assert (scores.abs() <= 1 + 1e-5).all()
    assert len(scores.unique()) == 2  # only one frame looks different
    other = question_scores(clip.frames.x, "ball a", str(tmp_path))
    assert not torch.allclose(scores, other)
    kept = QueryGuided(frames=1, scorer="clip", name=str(tmp_path)).select(clip, "a red ball ?")
    assert kept.frames is not None
    assert kept.frames.span[0, 0] == float(scores.argmax())
