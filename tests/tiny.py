"""A tiny world for tests: an LLM, two encoders of a few thousand weights, real media.

`make_world(folder)` writes ordinary HF checkpoints and a manifest of real files; `settings(world,
...)` gives the settings of a stage on them, as a preset would hold them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import yaml
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (40, 40, 230),
    "white": (240, 240, 240),
}
PITCHES = {"low": 300.0, "high": 1500.0}
RATE = 16_000
WORDS = (
    "what colour is it ? do you hear a low or high sound describe the clip red green blue "
    "white there and "
    "USER ASSISTANT : . , yes no nothing"
)
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' + m['content'] + eos_token }}"
    "{% else %}{{ 'USER: ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@dataclass(frozen=True)
class World:
    """Folders and manifests of a tiny world."""

    root: Path
    llm: Path
    video: Path
    audio: Path
    captions: Path
    questions: Path

    @property
    def model(self) -> dict[str, Any]:
        """The `model` section of a preset."""
        return {
            "llm": {"name": str(self.llm)},
            "encoders": {
                "video": {"type": "siglip", "name": str(self.video)},
                "audio": {"type": "whisper", "name": str(self.audio)},
            },
            "connector": [
                {"type": "mlp", "stream": "video"},
                {"type": "linear", "stream": "audio"},
            ],
            "layout": {"type": "concat"},
            "sampling": {"num_frames": 2},
        }


def make_world(root: Path, clips: int = 12) -> World:
    """Write the backbones, clips, and manifests of captions (one a clip) and questions (two)."""
    root.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return World(
        root,
        make_llm(root / "llm"),
        make_siglip(root / "siglip"),
        make_whisper(root / "whisper"),
        *make_data(root / "data", clips),
    )


def make_tokenizer(folder: Path) -> Any:
    """A word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(WORDS.split())]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_llm(folder: Path, **changes: Any) -> Path:
    """A two-layer Llama with random weights and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(folder)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **sizes, **tokens, **changes)
    ).save_pretrained(folder)
    return folder


def make_siglip(folder: Path) -> Path:
    """A two-layer SigLIP vision tower for 32x32 pictures: 16 patches of width 16."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(
        folder
    )
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_whisper(folder: Path) -> Path:
    """A two-layer Whisper for windows of one second: 50 steps of width 16."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    sizes = {
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
    }
    decoder = {
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "vocab_size": 64,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(**sizes, **decoder, **ends, num_mel_bins=20, max_source_positions=50)
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=20, chunk_length=1).save_pretrained(folder)
    return folder


def make_data(folder: Path, clips: int) -> tuple[Path, Path]:
    """Clips of one second in a colour with a tone (each third silent), captions, questions."""
    folder.mkdir(parents=True, exist_ok=True)
    captions, questions = [], []
    for number in range(clips):
        colour = list(COLOURS)[number % len(COLOURS)]
        pitch = None if number % 3 == 2 else list(PITCHES)[number % 2]
        name = f"{number:03d}.mp4"
        write_clip(folder / name, COLOURS[colour], PITCHES[pitch] if pitch else None)
        media = {"type": "video", "video": name}
        heard = f"a {pitch} sound" if pitch else "nothing"
        captions.append(row(f"caption-{number}", [media], f"{colour} and {heard}"))
        questions.append(
            row(f"colour-{number}", [media, text("what colour is it ?")], colour, "seen.colour")
        )
        questions.append(
            row(f"pitch-{number}", [media, text("do you hear a low sound ?")], heard, "heard.pitch")
        )
    return write_rows(folder / "captions.jsonl", captions), write_rows(
        folder / "questions.jsonl", questions
    )


def text(content: str) -> dict[str, str]:
    """A text part."""
    return {"type": "text", "text": content}


def row(
    id: str, content: list[dict[str, Any]], answer: str, kind: str | None = None
) -> dict[str, Any]:
    """A manifest row of one question and one answer."""
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [text(answer)]},
    ]
    return {"id": id, "source": "tiny", "messages": messages, **({"kind": kind} if kind else {})}


def make_preferences(world: World) -> Path:
    """Write the questions with rejected answers, one or two each, into a manifest beside them."""
    samples = [json.loads(line) for line in world.questions.read_text().splitlines()]
    for number, sample in enumerate(samples):
        sample["rejected"] = ["yes", "no sound"][: 1 + number % 2]
    return write_rows(world.questions.with_name("preferences.jsonl"), samples)


def make_regions(world: World) -> Path:
    """Write the questions with two regions in each clip, one of which moves, beside them."""
    still = {"id": "still", "box": [0.0, 0.0, 0.5, 0.5]}
    moves = [
        {"id": "moves", "box": [0.5, 0.5, 1.0, 1.0], "time": 0.0},
        {"id": "moves", "box": [0.5, 0.0, 1.0, 0.5], "time": 1.0},
    ]
    samples = [json.loads(line) for line in world.questions.read_text().splitlines()]
    for sample in samples:
        sample["messages"][0]["content"][0]["regions"] = [still, *moves]
    return write_rows(world.questions.with_name("regions.jsonl"), samples)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a manifest."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def write_clip(
    path: Path, colour: tuple[int, int, int], hertz: float | None, seconds: float = 1.0
) -> Path:
    """A H.264 + AAC mp4 of one colour and one tone (no sound track when `hertz` is None)."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8)
        video.width = video.height = 32
        video.pix_fmt, video.codec_context.thread_count = "yuv420p", 1
        sound = container.add_stream("aac", rate=RATE, layout="mono") if hertz else None
        for _ in range(round(8 * seconds)):
            frame = VideoFrame.from_ndarray(np.full((32, 32, 3), colour, np.uint8), "rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if sound is not None:
            wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(RATE * seconds)) / RATE)
            frame = AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = RATE, 0
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
    return path


def settings(world: World, output: Path, stage: str = "caption", **changes: Any) -> dict[str, Any]:
    """Settings of a short stage on the tiny world; `changes` are `section__key`."""
    objective = {"type": "contrastive", "dim": 16} if stage == "align" else {"type": "next_token"}
    found: dict[str, Any] = {
        "stage": stage,
        "output": str(output),
        "model": world.model,
        "init_from_scratch": stage != "align",
        "trainable": [
            ["^connector", 1e-3],
            *([["^objectives", 1e-3]] if stage == "align" else []),
            [".*", None],
        ],
        "objectives": [objective],
        "data": {"train": str(world.captions), "num_workers": 0},
        "train": {"max_steps": 4, "batch_size": 2, "log_every": 1, "trackers": []},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = found
        for name in parents:
            node = node[name]
        node[last] = value
    return found


def write_preset(path: Path, found: dict[str, Any]) -> Path:
    """Settings as a YAML preset."""
    path.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    return path
