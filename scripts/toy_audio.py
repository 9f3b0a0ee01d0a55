"""Train the toy world's ear from scratch: a small Whisper encoder that names what sounds at each 20 ms.

    python scripts/toy_audio.py WORLD OUT

Reads the training split of a toy world alone: its sound files, and `script.jsonl` for what sounds when. OUT becomes an
ordinary Whisper checkpoint (`WhisperModel` with an untrained one-layer decoder that nobody uses). One thread; a
finished OUT is left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from avllm.data.media import load_audio
from avllm.encoders.whisper import Whisper
from avllm.precision import has_fast_bfloat16, training_attention
from avllm.training.muon import Muon

STEPS, STEP = 300, 0.02  # a window of 6 s, the longest clip, in Whisper's steps
KINDS = ("none", "tone", "chirp", "noise", "pulse")
PITCHES = ("none", "deep", "low", "middle", "high", "shrill")
TIMBRES = ("none", "sine", "square", "saw", "organ", "horn", "reed")
CLICK, RECENT_CLICK, PULSE, STRIKE, BEGIN, END = range(6)  # places in the yes-or-no labels
EVENTS = 6
MOST_PULSES = 5
IGNORE = -100


@dataclass
class Sounds:
    """Log-mel windows of N clips and what is true at each of their steps.

    Attributes:
        mel: ``(N, mels, 2 * STEPS)``. classes: ``(N, STEPS, 4)`` long: kind, pitch, timbre and the number of pulses so
            far, IGNORE behind the clip's end. events: ``(N, STEPS, 6)`` float 0 or 1. real: ``(N, STEPS)`` bool.
    """

    mel: Tensor
    classes: Tensor
    events: Tensor
    real: Tensor


def encoder_config() -> WhisperConfig:
    """Two layers of width 96 over windows of 6 s."""
    sizes = {"d_model": 96, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 256}
    unused = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "vocab_size": 64}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(**sizes, **unused, **ends, num_mel_bins=64, max_source_positions=STEPS, init_std=0.08)
    config._attn_implementation = training_attention("cpu")
    return config


def read_sounds(world: Path, split: str, preprocess: Any) -> Sounds:
    """Decode and label every clip of a split that has a sound track."""
    with (world / "script.jsonl").open(encoding="utf-8") as file:
        scripts = [s for s in map(json.loads, file) if s["split"] == split and s["form"] in ("av", "silent", "wav")]
    mel, labels = [], []
    for script in track(scripts, f"sounds of {split}"):
        sound = load_audio(world / script["file"], rate=preprocess.rate).sound
        mel.append(preprocess.prepare(sound.x[: preprocess.unit_samples])["input_features"].half())
        labels.append(label_steps(script))
    classes, events, real = (torch.stack(part) for part in zip(*labels, strict=True))
    return Sounds(torch.stack(mel), classes, events, real)


def label_steps(script: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Classes ``(STEPS, 4)``, events ``(STEPS, 6)`` and which steps are real ``(STEPS,)`` of one clip."""
    centre = (torch.arange(STEPS) + 0.5) * STEP
    real = centre < script["duration"]
    classes, events = torch.zeros(STEPS, 4, dtype=torch.long), torch.zeros(STEPS, EVENTS)
    for sound in script["sounds"]:
        on = (centre >= sound["start"]) & (centre < sound["end"])
        classes[on, 0] = KINDS.index(sound["kind"])
        classes[on, 1] = PITCHES.index(sound["pitch"]) if sound["pitch"] else IGNORE
        classes[on, 2] = IGNORE if sound["kind"] == "noise" else TIMBRES.index(sound["timbre"])
        for pulse in sound["pulses"]:
            classes[centre >= pulse, 3] += 1
            events[(centre >= pulse) & (centre < pulse + 0.09), PULSE] = 1
            events[(centre - pulse).abs() < 1.5 * STEP, STRIKE] = 1  # all of one width, so that a sum over steps counts
        events[(centre - sound["start"]).abs() < 1.5 * STEP, BEGIN] = 1
        events[(centre - sound["end"]).abs() < 1.5 * STEP, END] = 1
        classes[centre > sound["end"] + 0.5, 3] = 0
    for click in script["clicks"]:
        events[(centre - click).abs() < 1.5 * STEP, CLICK] = 1
        events[(centre >= click) & (centre < click + 0.12), RECENT_CLICK] = 1  # wide enough to outlive pooling
    classes[~real] = IGNORE
    return classes, events, real


class Listener(nn.Module):
    """The encoder with a linear head for the labels."""

    SIZES = (len(KINDS), len(PITCHES), len(TIMBRES), MOST_PULSES + 1)

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, sum(self.SIZES) + EVENTS)

    def forward(self, mel: Tensor) -> tuple[list[Tensor], Tensor]:
        """``(N, mels, 2 * STEPS)`` -> logits of each class ``(N, STEPS, size)`` and of the events ``(N, STEPS, 6)``."""
        *classes, events = self.head(self.encoder(mel).last_hidden_state).float().split([*self.SIZES, EVENTS], dim=-1)
        return classes, events

    def loss(self, sounds: Sounds, rows: Tensor) -> Tensor:
        """Cross-entropies per real step, of rows ``(n,)`` of the sounds."""
        mel, labels = disguise(sounds.mel[rows].float(), sounds.classes[rows].clone())
        classes, events = self(mel)
        real = sounds.real[rows]
        total = sum(F.cross_entropy(x.flatten(0, 1), labels[..., i].flatten()) for i, x in enumerate(classes))
        rare = torch.tensor([4.0, 2.0, 2.0, 4.0, 4.0, 4.0])  # few steps are events
        told = real & (labels[..., 0] != IGNORE)
        return total + 8 * F.binary_cross_entropy_with_logits(events[told], sounds.events[rows][told], pos_weight=rare)


def disguise(mel: Tensor, labels: Tensor, turned: float = 0.425, cut: float = 0.075) -> tuple[Tensor, Tensor]:
    """Take apart what goes together in training: some kinds of sound never have some pitch, which is not to be learned.

    Some windows are turned by a random number of bands, so that pitch is no longer theirs; a few keep their pitch but
    are cut into random pieces, so that their kind is no longer told; the others stay as they are.

    Args:
        mel: ``(n, mels, frames)``. labels: ``(n, STEPS, 4)``, which is changed. turned, cut: shares of windows.
    """
    n, bands, frames = mel.shape
    lot = torch.rand(n)
    is_turned, is_cut = lot < turned, (lot >= turned) & (lot < turned + cut)
    source = (torch.arange(bands) - torch.randint(0, bands, (n, 1)) * is_turned[:, None]) % bands  # (n, bands)
    pieces = torch.rand(n, 1, frames // 20).repeat_interleave(20, dim=2) < 0.5
    keep = pieces | ~is_cut[:, None, None]  # (n, 1, frames)
    labels[is_turned, :, 1] = IGNORE
    labels[is_cut, :, 0] = labels[is_cut, :, 2] = labels[is_cut, :, 3] = IGNORE
    labels[..., 1] = labels[..., 1].masked_fill(~keep[:, 0, ::2], IGNORE)
    mixed = mel.gather(1, source[..., None].expand(-1, -1, frames))
    return torch.where(keep, mixed, mel.amin((1, 2), keepdim=True)), labels


def build_optimizer(listener: Listener, lr: float, matrix_lr: float) -> Muon:
    """Muon for the blocks' matrices, which learn much faster by it; AdamW for the rest."""
    matrices = [p for p in listener.encoder.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in listener.parameters() if id(p) not in chosen]
    return Muon(
        [
            {"params": matrices, "matrices": True, "peak": matrix_lr, "weight_decay": 0.02},
            {"params": rest, "peak": lr, "weight_decay": 0.01},
        ]
    )


def train(listener: Listener, sounds: Sounds, epochs: int, batch: int, lr: float, matrix_lr: float) -> None:
    """Warm-up and cosine."""
    optimizer = build_optimizer(listener, lr, matrix_lr)
    order = torch.cat([torch.randperm(len(sounds.mel)) for _ in range(epochs)])
    steps = len(order) // batch
    for step in track(range(steps), "learning to hear"):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min((step + 1) / 30, 0.5 * (1 + math.cos(math.pi * step / steps)))
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16("cpu")):
            loss = listener.loss(sounds, order[step * batch : (step + 1) * batch])
        listener.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(listener.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def score(listener: Listener, sounds: Sounds) -> dict[str, float]:
    """Share of right steps by label, and of click steps that were found."""
    listener.eval()
    rows = torch.arange(len(sounds.mel)).split(64)
    classes, events = zip(*(listener(sounds.mel[r].float()) for r in rows), strict=True)
    found = {}
    for place, name in enumerate(("kind", "pitch", "timbre", "pulses")):
        guess, label = torch.cat([c[place] for c in classes]).argmax(-1), sounds.classes[..., place]
        found[name] = float((guess == label)[label != IGNORE].float().mean())
    click = torch.cat(events)[..., CLICK] > 0
    found["click recall"] = float(click[sounds.events[..., CLICK] > 0].float().mean())
    listener.train()
    return found


def main() -> None:
    """Train, say how well it hears the validation split, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path, help="folder that data_recipes/toy_world.py wrote")
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--matrix-lr", type=float, default=1.2e-2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.is_dir():
        print(f"{args.out} is there already; delete it to train it again")
        return
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model, extractor = WhisperModel(encoder_config()), WhisperFeatureExtractor(feature_size=64, chunk_length=6)
    preprocess = Whisper(model.config, preprocessing=extractor.to_dict()).preprocessor()
    listener = Listener(model.encoder, model.config.d_model)
    train(listener, read_sounds(args.world, "train", preprocess), args.epochs, args.batch, args.lr, args.matrix_lr)
    figures = score(listener, read_sounds(args.world, "validation", preprocess))
    print("validation: " + ", ".join(f"{name} {value:.1%}" for name, value in figures.items()))
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    extractor.save_pretrained(partial)
    partial.rename(args.out)


if __name__ == "__main__":
    main()
