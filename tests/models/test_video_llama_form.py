"""Video-LLaMA's two-level connector, and BLIP-2 weights in our Q-Former."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from avllm.models.connector import Connector
from avllm.tokens import Grid, Tokens

SMALL = {"dim": 16, "heads": 2, "layers": 2}
TWO_LEVELS = [
    {
        "type": "qformer",
        "stream": "video",
        "per": "frame",
        "num_queries": 4,
        "cross_every": 2,
        **SMALL,
    },
    {"type": "position", "stream": "video", "kind": "learned", "max_steps": 8},
    {
        "type": "qformer",
        "stream": "video",
        "per": "clip",
        "num_queries": 6,
        "cross_every": 1,
        **SMALL,
    },
    {"type": "linear", "stream": "video"},
]


def clip(frames: int, patches: int = 5, width: int = 12) -> Tokens:
    edges = torch.arange(frames + 1, dtype=torch.float32)
    span = torch.stack([edges[:-1], edges[1:]], 1)[None]
    return Tokens(
        torch.randn(1, frames, patches, width),
        torch.ones(1, frames, patches, dtype=torch.bool),
        span,
    )


@pytest.mark.parametrize("frames", [1, 8, 21])
def test_two_levels_make_the_same_number_of_tokens_of_any_clip(frames: int) -> None:
    """More frames than learned positions are no error: positions are interpolated."""
    torch.manual_seed(0)
    connector = Connector(TWO_LEVELS, {"video": 12}, llm_dim=24).eval()
    tokens = clip(frames)
    out = connector({"video": tokens})["video"]
    assert out.x.shape == (1, 1, 6, 24)
    assert out.span.tolist() == [[[0.0, float(frames)]]]
    grid = connector.output_grid({"video": Grid(tokens.span[0], tokens.mask[0])})["video"]
    assert torch.equal(grid.span, out.span[0])
    assert torch.equal(grid.mask, out.mask[0])


def test_the_order_of_frames_matters_through_the_positions() -> None:
    torch.manual_seed(0)
    connector = Connector(TWO_LEVELS, {"video": 12}, llm_dim=24).eval()
    for parameter in connector.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    tokens = clip(6)
    back = Tokens(tokens.x.flip(1), tokens.mask, tokens.span)
    with torch.no_grad():
        there, again = (
            connector({"video": tokens})["video"].x,
            connector({"video": back})["video"].x,
        )
        assert not torch.allclose(there, again, atol=1e-5)
        connector[1].embedding.zero_()  # without positions the second level cannot tell
        there, again = (
            connector({"video": tokens})["video"].x,
            connector({"video": back})["video"].x,
        )
        torch.testing.assert_close(there, again, atol=1e-5, rtol=1e-4)


def blip2(folder: Path) -> Blip2ForConditionalGeneration:
    vision = {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    qformer = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    text = {
        "model_type": "opt",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text |= {
        "ffn_dim": 16,
        "vocab_size": 30,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 16,
    }
    config = Blip2Config(
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        qformer_config=qformer
        | {"encoder_hidden_size": 12, "cross_attention_frequency": 2, "vocab_size": 30},
        text_config=text,
        num_query_tokens=4,
    )
    torch.manual_seed(5)
    model = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.query_tokens.normal_()
    model.save_pretrained(folder)
    return model


def test_blip2_weights_load_into_the_frame_qformer(tmp_path: Path) -> None:
    theirs = blip2(tmp_path)
    spec = TWO_LEVELS[0] | {"init": str(tmp_path)}
    connector = Connector(
        [spec, {"type": "linear", "stream": "video"}], {"video": 12}, llm_dim=24
    ).eval()
    ours = connector[0]
    ours.load_init()
    tokens = clip(3)
    with torch.no_grad():
        out = ours({"video": tokens})["video"].x[0]  # (T, Q, D)
        queries = theirs.query_tokens.expand(3, -1, -1)
        expected = theirs.qformer(
            query_embeds=queries, encoder_hidden_states=tokens.x[0]
        ).last_hidden_state
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_blip2_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    blip2(tmp_path)
    spec = TWO_LEVELS[0] | {"init": str(tmp_path), "num_queries": 7}
    connector = Connector([spec, {"type": "linear", "stream": "video"}], {"video": 12}, llm_dim=24)
    with pytest.raises(ValueError, match="set dim, layers, heads"):
        connector[0].load_init()
