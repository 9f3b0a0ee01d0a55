"""Train the toy world's eye from scratch: a small Pyramid Vision Transformer that names patches.

    python scripts/toy_world/backbones/vision.py WORLD OUT

Reads the training split of a toy world alone: frames of its clips, and `script.jsonl` for what is
where. Colours are learned from unchanged pictures; shapes, sizes and places from pictures
whose colours went through a random matrix, since a net that sees both together learns "what is red
is never a circle" from the pairs that are held out. OUT becomes an ordinary `PvtV2Model`
checkpoint. One thread; a finished OUT is not trained again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from transformers import PvtImageProcessor, PvtV2Config, PvtV2Model

from avllm.data.media.load import Sampling, load_image, load_video
from avllm.precision import has_fast_bfloat16
from avllm.training.muon import Muon

SIDE = 96  # pixels
GRID = 8  # patches a side
PATCH = SIDE // GRID
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": 7.0, "big": 13.0}  # radius in pixels
MOST_THINGS = 4
IGNORE = -100
COVERED = 0.12  # share of a patch that a thing must cover for the patch to belong to it


@dataclass
class Pictures:
    """N frames and what is true of them.

    Attributes:
        x: uint8 ``(N, SIDE, SIDE, 3)``.
        classes: ``(N, GRID**2, 3)`` long: colour (0 = background), shape and size of the thing at
            each patch, IGNORE for shape and size of background, and for what has no name.
        places: ``(N, GRID**2, 3)``: x and y from the patch's centre to the thing's centre, in
            patches, and whether the thing is the moving one.
        moving: ``(N, 3)``: whether the moving thing is seen, and its x and y, from -1 to 1.
        named: ``(N, 3)`` long: colour, shape and size of the moving thing.
        count: ``(N,)`` long, things seen.
        lit: ``(N,)``: whether a wall is lit, because the moving thing has just hit it.
    """

    x: Tensor
    classes: Tensor
    places: Tensor
    moving: Tensor
    named: Tensor
    count: Tensor
    lit: Tensor

    def rows(self, index: Tensor) -> Pictures:
        """Return those frames alone."""
        return Pictures(*(value[index] for value in vars(self).values()))


def vision_config() -> PvtV2Config:
    """Return two stages, the second of width 96 on a grid of 8 x 8 tokens."""
    return PvtV2Config(
        image_size=SIDE,
        num_encoder_blocks=2,
        depths=[1, 3],
        hidden_sizes=[32, 96],
        num_attention_heads=[1, 2],
        mlp_ratios=[1, 2],
        patch_sizes=[7, 5],
        strides=[4, 3],
        sr_ratios=[4, 1],
        drop_path_rate=0.0,
    )


# ---- what is where


def read_pictures(world: Path, split: str, clips: int, frames: int, seed: int) -> Pictures:
    """Decode up to `clips` random clips of a split, and take up to `frames` frames of each."""
    with (world / "script.jsonl").open(encoding="utf-8") as file:
        scripts = [s for s in map(json.loads, file) if s["split"] == split and s["objects"]]
    rng = random.Random(seed)
    pixels = []
    labels = []
    for script in track(rng.sample(scripts, min(clips, len(scripts))), f"pictures of {split}"):
        path = world / script["file"]
        if script["form"] == "jpg":
            decoded = load_image(path)
        else:
            decoded = load_video(path, sampling=Sampling(fps=script["fps"]), rate=None)
        assert decoded.frames is not None
        steps = min(len(decoded.frames.x), len(script["objects"][0]["x"]))
        chosen = sorted(rng.sample(range(steps), min(frames, steps)))
        pixels.append(decoded.frames.x[chosen])
        labels += [(*label_frame(script["objects"], t), is_lit(script, t)) for t in chosen]
    return Pictures(torch.cat(pixels), *(torch.stack(part) for part in zip(*labels, strict=True)))


def label_frame(
    things: list[dict[str, Any]], t: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return classes, places, moving, named and count of one frame (see :class:`Pictures`).

    The first thing lies on top.
    """
    classes = torch.tensor([0, IGNORE, IGNORE]).repeat(GRID**2, 1)
    places = torch.zeros(GRID**2, 3)
    best = torch.full((GRID**2,), COVERED)
    centres = (torch.arange(GRID) + 0.5) * PATCH
    columns = centres.repeat(GRID)
    rows = centres.repeat_interleave(GRID)
    grid = torch.stack([columns, rows], 1)  # (GRID**2, 2): x, y
    seen = [thing for thing in things if thing["visible"][t]]
    for thing in seen:
        centre = torch.tensor([thing["x"][t], thing["y"][t]])
        cover = disc_cover(centre, SIZES[thing["size"]])
        covered = cover > best
        best[covered] = cover[covered]
        classes[covered] = names(thing) + torch.tensor([1 if thing["colour"] else 0, 0, 0])
        places[covered, :2] = (centre - grid[covered]) / PATCH
        places[covered, 2] = float(thing is things[0])
    first = things[0]
    at = [first["x"][t] / (SIDE / 2) - 1, first["y"][t] / (SIDE / 2) - 1]
    moving = torch.tensor([float(first["visible"][t]), *at])
    return classes, places, moving, names(first), torch.tensor(len(seen))


def names(thing: dict[str, Any]) -> Tensor:
    """Return colour, shape (IGNORE where they have no name) and size as numbers."""
    shape = SHAPES.index(thing["shape"]) if thing["shape"] else IGNORE
    colour = COLOURS.index(thing["colour"]) if thing["colour"] else IGNORE
    return torch.tensor([colour, shape, list(SIZES).index(thing["size"])])


def is_lit(script: dict[str, Any], t: int) -> Tensor:
    """Return whether a wall was hit at this frame or at the one before."""
    since = [t - round(bounce * script["fps"]) for bounce in script["events"]["bounces"]]
    return torch.tensor(float(any(0 <= s < 2 for s in since)))


def disc_cover(centre: Tensor, radius: float) -> Tensor:
    """Return the share ``(GRID**2,)`` of each patch that lies within a disc: pixels."""
    at = torch.arange(SIDE) + 0.5
    square_distance = (at[None] - centre[0]) ** 2 + (at[:, None] - centre[1]) ** 2
    inside = square_distance < radius**2  # (SIDE, SIDE)
    return inside.float().reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).flatten()


# ---- learning


class Looker(nn.Module):
    """The encoder with linear heads for the labels of its patches and of their mean."""

    PATCH_SIZES = (1 + len(COLOURS), len(SHAPES), len(SIZES), 2, 1)
    FRAME_SIZES = (1, 2, MOST_THINGS + 1, 1, len(COLOURS), len(SHAPES), len(SIZES))

    def __init__(
        self, encoder: nn.Module, width: int, scale: tuple[list[float], list[float]]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch_head = nn.Linear(width, sum(self.PATCH_SIZES))
        self.frame_head = nn.Linear(width, sum(self.FRAME_SIZES))
        mean, std = scale
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return logits by label, of patches and of frames.

        Args:
            x: pictures ``(N, 3, SIDE, SIDE)`` from 0 to 1.
        """
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16("cpu")):
            tokens = self.encoder(x).last_hidden_state.flatten(2).transpose(1, 2)  # (N, GRID**2, D)
        tokens = tokens.float()
        of_patches = self.patch_head(tokens).split(self.PATCH_SIZES, -1)
        of_frame = self.frame_head(tokens.mean(1)).split(self.FRAME_SIZES, -1)
        return of_patches, of_frame

    def loss(self, pictures: Pictures, plain: int) -> Tensor:
        """Return the loss; the first `plain` pictures teach colours, the others shapes.

        The others are recoloured. All teach the rest.
        """
        x = pictures.x.permute(0, 3, 1, 2).float() / 255
        of_patches, of_frame = self(torch.cat([x[:plain], recolour(x[plain:])]))
        is_plain = torch.arange(len(x)) < plain
        return patch_loss(of_patches, pictures, is_plain) + frame_loss(of_frame, pictures, is_plain)


def patch_loss(logits: tuple[Tensor, ...], pictures: Pictures, is_plain: Tensor) -> Tensor:
    """Return the loss of the patches; ``is_plain (N,)`` pictures teach colours, others shapes."""
    colour, shape, size, offset, is_moving = logits
    labels = pictures.classes
    places = pictures.places
    covered = labels[..., 2] != IGNORE  # (N, GRID**2)
    total = 3 * F.cross_entropy(colour[is_plain].flatten(0, 1), labels[is_plain][..., 0].flatten())
    total += F.cross_entropy(
        shape[~is_plain].flatten(0, 1), labels[~is_plain][..., 1].flatten(), ignore_index=IGNORE
    )
    total += F.cross_entropy(size.flatten(0, 1), labels[..., 2].flatten(), ignore_index=IGNORE)
    total += F.smooth_l1_loss(offset[covered], places[covered][:, :2], beta=0.2)
    return total + F.binary_cross_entropy_with_logits(is_moving[covered], places[covered][:, 2:])


def frame_loss(logits: tuple[Tensor, ...], pictures: Pictures, is_plain: Tensor) -> Tensor:
    """Return the loss of the frame: the moving thing, the count, and whether a wall is lit."""
    seen, at, count, lit, colour, shape, size = logits
    there = pictures.moving[:, 0] > 0
    named = pictures.named
    total = 2 * F.smooth_l1_loss(at[there], pictures.moving[there, 1:], beta=0.05)
    total += F.binary_cross_entropy_with_logits(seen[:, 0], pictures.moving[:, 0])
    total += F.binary_cross_entropy_with_logits(lit[:, 0], pictures.lit)
    total += 0.5 * F.cross_entropy(count, pictures.count)
    total += 0.5 * F.cross_entropy(colour[there & is_plain], named[there & is_plain, 0])
    total += 0.5 * F.cross_entropy(shape[there & ~is_plain], named[there & ~is_plain, 1])
    return total + 0.5 * F.cross_entropy(size[there], named[there, 2])


def recolour(x: Tensor) -> Tensor:
    """Mix the channels of pictures ``(N, 3, H, W)`` at random, so that hues mean nothing."""
    mix = 0.7 * torch.randn(len(x), 3, 3)
    ground = 0.25 + 0.5 * torch.rand(len(x), 3, 1, 1)
    return (torch.einsum("nij,njhw->nihw", mix, x - 0.3) + ground).clamp(-0.1, 1.1)


def build_optimizer(looker: Looker, lr: float, matrix_lr: float) -> Muon:
    """Return Muon for the encoder's matrices, AdamW for the rest.

    With Muon it learns from several times fewer pictures.
    """
    matrices = [p for p in looker.encoder.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in looker.parameters() if id(p) not in chosen]
    return Muon(
        [
            {"params": matrices, "matrices": True, "peak": matrix_lr, "weight_decay": 0.02},
            {"params": others, "peak": lr, "weight_decay": 0.02},
        ]
    )


def train(
    looker: Looker, pictures: Pictures, steps: int, batch: int, lr: float, matrix_lr: float
) -> None:
    """Train with warm-up, then a straight line down to zero."""
    optimizer = build_optimizer(looker, lr, matrix_lr)
    order = torch.cat(
        [torch.randperm(len(pictures.x)) for _ in range(steps * batch // len(pictures.x) + 1)]
    )
    for step in track(range(steps), "learning to see"):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min((step + 1) / 50, 1 - step / steps)
        rows = order[step * batch : (step + 1) * batch]
        loss = looker.loss(pictures.rows(rows), plain=batch // 3)
        looker.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(looker.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def score(looker: Looker, pictures: Pictures) -> dict[str, float]:
    """Return shares of right patches by label, of right counts, and errors of places in pixels."""
    looker.eval()
    parts = [
        looker(pictures.x[r].permute(0, 3, 1, 2).float() / 255)
        for r in torch.arange(len(pictures.x)).split(64)
    ]
    of_patches, of_frames = zip(*parts, strict=True)
    colour, shape, size, offset, _ = [torch.cat(values) for values in zip(*of_patches, strict=True)]
    frame_logits = [torch.cat(values) for values in zip(*of_frames, strict=True)]
    seen, at, count, lit, _, named_shape, _ = frame_logits
    labels = pictures.classes
    covered = labels[..., 2] != IGNORE
    there = pictures.moving[:, 0] > 0
    shaped = labels[..., 1] != IGNORE
    named = pictures.named[:, 1] != IGNORE
    looker.train()
    return {
        "colour": float(
            (colour.argmax(-1) == labels[..., 0])[labels[..., 0] != IGNORE].float().mean()
        ),
        "shape": float((shape.argmax(-1) == labels[..., 1])[shaped].float().mean()),
        "size": float((size.argmax(-1) == labels[..., 2])[covered].float().mean()),
        "count": float((count.argmax(-1) == pictures.count).float().mean()),
        "moving thing seen": float(((seen[:, 0] > 0) == there).float().mean()),
        "wall lit": float(((lit[:, 0] > 0) == (pictures.lit > 0)).float().mean()),
        "moving thing's shape": float(
            (named_shape.argmax(-1) == pictures.named[:, 1])[there & named].float().mean()
        ),
        "px to the centre": float(
            (offset - pictures.places[..., :2])[covered].square().mean().sqrt() * PATCH
        ),
        "px of the moving thing": float(
            (at - pictures.moving[:, 1:])[there].square().mean().sqrt() * SIDE / 2
        ),
    }


def main() -> None:
    """Train, say how well it sees the validation split, and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world", type=Path, help="folder that scripts/toy_world/make.py wrote")
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument(
        "--clips", type=int, default=1000, help="training clips to take frames from"
    )
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--matrix-lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.is_dir():
        print(f"{args.out} is there already; delete it to train it again")
        return
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    config = vision_config()
    config._attn_implementation = "eager"  # PVT has no other
    model = PvtV2Model(config).to(memory_format=torch.channels_last)
    processor = PvtImageProcessor(size={"height": SIDE, "width": SIDE})
    looker = Looker(
        model, config.hidden_sizes[-1], (list(processor.image_mean), list(processor.image_std))
    )
    pictures = read_pictures(args.world, "train", args.clips, args.frames, args.seed)
    train(looker, pictures, args.steps, args.batch, args.lr, args.matrix_lr)
    figures = score(looker, read_pictures(args.world, "validation", 60, 8, args.seed))
    shown = [f"{n} {v:.1f}" if "px" in n else f"{n} {v:.1%}" for n, v in figures.items()]
    print(f"validation: {', '.join(shown)}")
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(args.out)


if __name__ == "__main__":
    main()
