"""Train the toy world's ear from scratch: a small Whisper encoder that names sounds each 40 ms.

    python scripts/toy_world/backbones/audio.py WORLD OUT

Reads the training split of a toy world alone: its sound files, and `script.jsonl` for what sounds
when. No clip of it has a held-out pair of kind and pitch. The ear learns how high sounds between
two named pitches are, though, which no question asks; and it hears sounds that are moved to other
bands, also to such a pitch, without a label of the pitch. OUT becomes an ordinary Whisper
checkpoint (`WhisperModel` with an untrained one-layer decoder that is not used). One thread; a
finished OUT is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from avllm.data.media.load import load_audio
from avllm.encoders.whisper import Whisper
from avllm.precision import has_fast_bfloat16, training_attention
from avllm.training.muon import Muon

SECONDS = 6  # of the longest clip
HOP = 320  # samples between mel frames, twice Whisper's: half the steps are enough for this world
STEPS = 150  # of the encoder in a window, two mel frames each
STEP = 0.04  # seconds
PIECE = 10  # mel frames, 0.2 s: of what a window is cut into
KINDS = ("none", "tone", "chirp", "noise", "pulse")
PITCHES = (280.0, 540.0, 1040.0, 2000.0, 3850.0)  # Hz: deep, low, middle, high, shrill
CLICK, RECENT_CLICK, PULSE, STRIKE, BEGIN, END = range(6)  # places in the yes-or-no labels
EVENTS = 6
MOST_PULSES = 5
IGNORE = -100


@dataclass
class Sounds:
    """Log-mel windows of N clips and what is true at each of their steps.

    Attributes:
        mel: ``(N, mels, 2 * STEPS)``.
        classes: ``(N, STEPS, 2)`` long: kind and the number of pulses so far, IGNORE after the
            clip's end.
        height: ``(N, STEPS)``: 0 for no sound, 1 to 5 for the pitches, fractions between two,
            IGNORE after the end.
        events: ``(N, STEPS, 6)`` float 0 or 1.
        real: ``(N, STEPS)`` bool.
    """

    mel: Tensor
    classes: Tensor
    height: Tensor
    events: Tensor
    real: Tensor


def encoder_config() -> WhisperConfig:
    """Return two layers of width 96 over windows of 6 s."""
    sizes = {
        "d_model": 96,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
    }
    unused = {
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 96,
        "vocab_size": 64,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        **sizes, **unused, **ends, num_mel_bins=64, max_source_positions=STEPS, init_std=0.08
    )
    config._attn_implementation = training_attention("cpu")
    return config


def read_sounds(world: Path, split: str, preprocess: Any) -> Sounds:
    """Decode and label every clip of a split that has a sound track."""
    with (world / "script.jsonl").open(encoding="utf-8") as file:
        scripts = [
            s
            for s in map(json.loads, file)
            if s["split"] == split and s["form"] in ("av", "silent", "wav")
        ]
    mel = []
    labels = []
    for script in track(scripts, f"sounds of {split}"):
        sound = load_audio(world / script["file"], rate=preprocess.rate).sound
        mel.append(preprocess.prepare(sound.x[: preprocess.unit_samples])["input_features"].half())
        labels.append(label_steps(script))
    return Sounds(torch.stack(mel), *(torch.stack(part) for part in zip(*labels, strict=True)))


def label_steps(script: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return classes, height, events and real steps of one clip (see :class:`Sounds`)."""
    centre = (torch.arange(STEPS) + 0.5) * STEP
    real = centre < script["duration"]
    classes = torch.zeros(STEPS, 2, dtype=torch.long)
    height = torch.zeros(STEPS)
    events = torch.zeros(STEPS, EVENTS)
    for sound in script["sounds"]:
        on = (centre >= sound["start"]) & (centre < sound["end"])
        classes[on, 0] = KINDS.index(sound["kind"])
        height[on] = height_of(sound)
        for pulse in sound["pulses"]:
            classes[centre >= pulse, 1] += 1
            events[(centre >= pulse) & (centre < pulse + 0.09), PULSE] = 1
            # All of one width, so that a sum over steps counts.
            events[(centre - pulse).abs() < 1.5 * STEP, STRIKE] = 1
        events[(centre - sound["start"]).abs() < 1.5 * STEP, BEGIN] = 1
        events[(centre - sound["end"]).abs() < 1.5 * STEP, END] = 1
        classes[centre > sound["end"] + 0.5, 1] = 0
    for click in script["clicks"]:
        events[(centre - click).abs() < 1.5 * STEP, CLICK] = 1
        # Wide enough to survive pooling.
        events[(centre >= click) & (centre < click + 0.12), RECENT_CLICK] = 1
    classes[~real] = height[~real] = IGNORE
    return classes, height, events, real


def height_of(sound: dict[str, Any]) -> float:
    """Return 1 to 5 for the five pitches; other frequencies lie between, linearly in octaves."""
    height = float(
        np.interp(math.log(sound["frequency"]), np.log(PITCHES), range(1, len(PITCHES) + 1))
    )
    return round(height) if sound["pitch"] else height


class Listener(nn.Module):
    """The encoder with a linear head for the labels."""

    SIZES = (len(KINDS), MOST_PULSES + 1, 1 + len(PITCHES))

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, sum(self.SIZES) + EVENTS)

    def forward(self, mel: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return logits ``(N, STEPS, size)`` of kind, count and pitch, and of the events.

        Args:
            mel: ``(N, mels, 2 * STEPS)``.
        """
        logits = self.head(self.encoder(mel).last_hidden_state).float()
        *classes, events = logits.split([*self.SIZES, EVENTS], dim=-1)
        return classes, events

    def loss(self, sounds: Sounds, rows: Tensor) -> Tensor:
        """Return cross-entropies per real step, of rows ``(n,)`` of the sounds."""
        mel, labels, height = disguise(
            sounds.mel[rows].float(), sounds.classes[rows].clone(), sounds.height[rows].clone()
        )
        (*classes, pitch), events = self(mel)
        of_kind, of_count = (F.cross_entropy(x.mT, labels[..., i]) for i, x in enumerate(classes))
        total = 2 * of_kind + 2 * of_count + height_loss(pitch, height)
        rare = torch.tensor([6.0, 2.0, 2.0, 4.0, 4.0, 4.0])  # few steps are events
        labelled = sounds.real[rows] & (labels[..., 0] != IGNORE)
        return total + 8 * F.binary_cross_entropy_with_logits(
            events[labelled], sounds.events[rows][labelled], pos_weight=rare
        )


def height_loss(logits: Tensor, height: Tensor) -> Tensor:
    """Return the cross-entropy of ``logits (N, STEPS, 6)``.

    A height between two pitches is partly the one, partly the other.
    """
    labelled = height != IGNORE
    if not labelled.any():
        return logits.sum() * 0.0
    above = height[labelled] % 1
    below = height[labelled].long()
    likely = logits[labelled].log_softmax(-1)
    next_above = (below + 1).clamp(max=len(PITCHES))
    low = likely.gather(-1, below[:, None])[:, 0]
    high = likely.gather(-1, next_above[:, None])[:, 0]
    return -((1 - above) * low + above * high).mean()


def disguise(
    mel: Tensor, labels: Tensor, height: Tensor, moved: float = 0.425, cut: float = 0.15
) -> tuple[Tensor, Tensor, Tensor]:
    """Separate kind and pitch: some kinds never have some pitch, which is not to be learned.

    Some windows are moved by a number of bands, half of them by a few, and coloured at random, so
    that neither pitch nor timbre shows their kind. Others keep their pitch but are cut into random
    pieces, blurred over the bands and speckled, so that their kind no longer shows. The rest stay
    unchanged.

    Args:
        mel: ``(n, mels, frames)``.
        labels: ``(n, STEPS, 2)``, changed in place.
        height: ``(n, STEPS)``, changed in place.
        moved: share of windows.
        cut: share of windows.
    """
    n, bands, frames = mel.shape
    lot = torch.rand(n)
    is_moved = lot < moved
    is_cut = (lot >= moved) & (lot < moved + cut)
    few = torch.rand(n) < 0.5
    by = torch.where(few, torch.randint(-6, 7, (n,)), torch.randint(0, bands, (n,))) * is_moved
    source = (torch.arange(bands) - by[:, None]) % bands  # (n, bands)
    colour = F.interpolate(0.15 * torch.randn(n, 1, 8), bands, mode="linear")[:, 0]
    colour = colour * is_moved[:, None]  # (n, bands)
    mixed = mel.gather(1, source[..., None].expand(-1, -1, frames)) + colour[..., None]
    for _ in range(4):
        blurred = F.avg_pool2d(mixed[:, None], (3, 1), 1, (1, 0), count_include_pad=False)[:, 0]
        mixed = torch.where((is_cut & (torch.rand(n) < 0.5))[:, None, None], blurred, mixed)
    mixed = mixed + 0.15 * (torch.rand(n) * is_cut)[:, None, None] * torch.randn_like(mixed)
    pieces = (torch.rand(n, 1, frames // PIECE) < 0.5).repeat_interleave(PIECE, dim=2)
    keep = pieces | ~is_cut[:, None, None]  # (n, 1, frames)
    labels[is_cut] = height[is_moved] = IGNORE
    height.masked_fill_(~keep[:, 0, ::2], IGNORE)
    return torch.where(keep, mixed, mel.amin((1, 2), keepdim=True)), labels, height


def build_optimizer(listener: Listener, lr: float, matrix_lr: float) -> Muon:
    """Return Muon for the blocks' matrices, which learn much faster by it, AdamW for the rest."""
    matrices = [p for p in listener.encoder.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in listener.parameters() if id(p) not in chosen]
    return Muon(
        [
            {"params": matrices, "matrices": True, "peak": matrix_lr, "weight_decay": 0.02},
            {"params": rest, "peak": lr, "weight_decay": 0.01},
        ]
    )


def train(
    listener: Listener, sounds: Sounds, epochs: int, batch: int, lr: float, matrix_lr: float
) -> None:
    """Train with warm-up and cosine."""
    optimizer = build_optimizer(listener, lr, matrix_lr)
    order = torch.cat([torch.randperm(len(sounds.mel)) for _ in range(epochs)])
    steps = len(order) // batch
    for step in track(range(steps), "learning to hear"):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = group["peak"] * min((step + 1) / 30, cosine)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16("cpu")):
            loss = listener.loss(sounds, order[step * batch : (step + 1) * batch])
        listener.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(listener.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def score(listener: Listener, sounds: Sounds) -> dict[str, float]:
    """Return share of right steps by label, and of click steps that are heard."""
    listener.eval()
    rows = torch.arange(len(sounds.mel)).split(64)
    classes, events = zip(*(listener(sounds.mel[r].float()) for r in rows), strict=True)
    kind, count, pitch = (torch.cat(c).argmax(-1) for c in zip(*classes, strict=True))
    labels = (
        ("kind", kind, sounds.classes[..., 0]),
        ("pitch", pitch, sounds.height),
        ("pulses", count, sounds.classes[..., 1]),
    )
    figures = {}
    for name, guess, label in labels:
        labelled = (label != IGNORE) & (label % 1 == 0)
        figures[name] = float((guess == label)[labelled].float().mean())
    click = torch.cat(events)[..., CLICK] > 0
    figures["click recall"] = float(click[sounds.events[..., CLICK] > 0].float().mean())
    listener.train()
    return figures


def main() -> None:
    """Train, say how well it hears the validation split, and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world", type=Path, help="folder that scripts/toy_world/make.py wrote")
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--epochs", type=int, default=8)
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
    model = WhisperModel(encoder_config())
    extractor = WhisperFeatureExtractor(feature_size=64, chunk_length=SECONDS, hop_length=HOP)
    preprocess = Whisper(model.config, preprocessing=extractor.to_dict()).preprocessor()
    listener = Listener(model.encoder, model.config.d_model)
    train(
        listener,
        read_sounds(args.world, "train", preprocess),
        args.epochs,
        args.batch,
        args.lr,
        args.matrix_lr,
    )
    figures = score(listener, read_sounds(args.world, "validation", preprocess))
    print("validation: " + ", ".join(f"{name} {value:.1%}" for name, value in figures.items()))
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    extractor.save_pretrained(partial)
    partial.rename(args.out)


if __name__ == "__main__":
    main()
