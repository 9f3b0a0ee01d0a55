"""Encoders that take several frames at a time: their clock, filling, windows, and whole models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from encoders.encoder_families import CONFIGS, Frames, build, collate, encode, frames
from PIL import Image
from tiny import World, make_world
from torch import Tensor
from transformers.utils import is_timm_available

from avllm.config_model import ModelConfig
from avllm.data.cache.fill import ClipEncoding, FeatureCache, fill, recipe
from avllm.data.reading import MediaReader
from avllm.data.schema import ImagePart, MediaPart, VideoPart
from avllm.encoders._clip import ClipPreprocessor, join_spans
from avllm.encoders.base import UNITS
from avllm.encoders.pe_av_video import PEAVVideo, side_of
from avllm.errors import UserError
from avllm.inference.chat import Chat
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import save_checkpoint
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.tokens import EncoderInput

torch.set_num_threads(1)
STEP_FRAMES = {"videomae": 2, "vjepa2": 2, "pe_av_video": 1}
FPS = 8


def timed(count: int) -> Frames:
    """Frames of half a second whose grey is ten times their number."""
    media = frames(count)
    grey = torch.arange(count, dtype=torch.uint8) * 10
    return Frames(grey.view(-1, 1, 1, 1).expand_as(media.x).contiguous(), media.span)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("key", STEP_FRAMES)
def test_each_step_has_the_frames_of_its_span(key: str, count: int) -> None:
    made = build(key).preprocessor()
    clip = made(timed(count), 0.5 * count)
    size = STEP_FRAMES[key]
    greys = grey_levels(made, clip.inputs["pixel_values"])
    assert len(clip.span) == -(-count // size) == len(clip.mask)
    assert clip.mask.all()
    for number, (start, end) in enumerate(clip.span.tolist()):
        seen = [min(number * size + i, count - 1) for i in range(size)]
        shown = greys[number * size : number * size + size]
        assert shown.tolist() == pytest.approx([10 * frame for frame in seen], abs=0.01)
        assert start == 0.5 * seen[0]
        assert end == 0.5 * (seen[-1] + 1)
    filling = [10 * (count - 1)] * (len(greys) - count)
    assert greys[count:].tolist() == pytest.approx(filling, abs=0.01)


def grey_levels(made: ClipPreprocessor, pixels: Tensor) -> Tensor:
    """The mean grey of each frame of the units, 0 to 255, filling included."""
    red = pixels.flatten(0, 1)[:, 0].mean((1, 2))
    return (red * made.std[0] + made.mean[0]) * 255


@pytest.mark.parametrize("key", STEP_FRAMES)
@pytest.mark.parametrize("changed", [0, 3, 6])
def test_a_changed_frame_changes_the_step_whose_span_holds_it(key: str, changed: int) -> None:
    encoder = build(key, layers=[0])
    media = frames(7)
    other = media.x.clone()
    other[changed] = 255 - other[changed]
    before, after = (
        before_mixing(encoder, encoder.preprocessor()(Frames(x, media.span), 3.5))
        for x in (media.x, other)
    )
    difference = (after - before).flatten(1).norm(dim=1)  # (T,)
    assert (difference > 1e-6).nonzero().flatten().tolist() == [changed // STEP_FRAMES[key]]
    start, end = join_spans(media.span, STEP_FRAMES[key])[difference.argmax()].tolist()
    assert start <= 0.5 * changed < end


@torch.no_grad()
def before_mixing(encoder: Any, clip: EncoderInput) -> Tensor:
    """The features of each step before anything mixes the steps, (T, ...)."""
    if hasattr(encoder.backbone, "embedder"):  # PE-AV's layer 0 comes after a convolution over time
        return encoder.backbone.embedder(clip.inputs["pixel_values"])[0]
    return encode(encoder, [clip])[""][0]


def test_spans_of_chosen_frames_reach_from_the_first_to_the_last() -> None:
    span = torch.tensor([[0.0, 1.0], [4.0, 5.0], [5.0, 6.0]])  # as a selector leaves them
    assert join_spans(span, 2).tolist() == [[0.0, 5.0], [5.0, 6.0]]
    assert join_spans(torch.zeros(1, 2), 2).tolist() == [[0.0, 0.0]]


def test_regions_are_in_the_step_that_holds_their_time() -> None:
    @dataclass(frozen=True)
    class Region:
        box: tuple[float, ...]
        time: float | None

    media = frames(5)
    regions = (Region((0, 0, 0.5, 0.5), None), Region((0, 0, 1, 1), 1.6))
    clip = build("vjepa2").preprocessor()(Frames(media.x, media.span, regions), 2.5)
    assert clip.extra["region_mask"].tolist() == [[True, False], [True, True], [True, False]]
    assert clip.extra["region_boxes"].shape == (3, 2, 4)


@pytest.mark.parametrize(
    ("units", "most", "expected"),
    [([3, 0, 1], 8, [3, 1]), ([9], 4, [3, 3, 3]), ([5, 8], 4, [3, 2, 4, 4]), ([1], 1, [1])],
)
def test_windows_of_a_clip_are_nearly_equal(
    units: list[int], most: int, expected: list[int]
) -> None:
    encoder = build("vjepa2", window=2 * most)
    assert encoder.group_sizes(SimpleNamespace(units=torch.tensor(units))) == expected


def test_a_window_of_many_frames_is_a_smaller_batch() -> None:
    encoder = build("videomae")
    assert encoder.units_at_once == UNITS // 4
    clips = [encoder.preprocessor()(frames(n), 3.0) for n in (61, 20)]
    assert encoder.group_sizes(collate(clips)) == [16, 5]


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="window=1"):
        build("vjepa2", window=1)
    with pytest.raises(ValueError, match="window=4"):
        build("pe_av_video", window=4, feature="pooled")
    with pytest.raises(ValueError, match="steps"):
        ClipPreprocessor((8, 8), 1, steps=2**30)
    long = ClipPreprocessor((4096, 4096), 1, steps=2**15)
    with pytest.raises(UserError) as error:
        long(frames(1), 0.5)
    assert error.value.reason == "too_large"


@pytest.mark.skipif(is_timm_available(), reason="timm is installed")
def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match="pip install timm"):
        PEAVVideo({})


def test_the_width_of_timms_tokens_is_read_as_it_is_saved() -> None:
    config = PEAVVideo.read_config({"vision_config": {"num_classes": 24}})
    again = PEAVVideo.read_config(config.to_dict())
    assert config.vision_config.num_labels == again.vision_config.num_labels == 24
    assert PEAVVideo.read_config({}).vision_config.num_labels == 1024


def test_the_side_of_frames_is_in_the_name_of_timms_model() -> None:
    names = {"vit_pe_core_small_patch16_384": 384, "vit_pe_core_large_patch14_336": 336, "x": 336}
    for name, side in names.items():
        config = PEAVVideo.read_config({"vision_config": {"architecture": name}})
        assert int(side_of(config.vision_config)) == side


# ---- whole models, on real files -----------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"), clips=1)
    write_timed(made.captions.parent / "timed.mp4", count=20)
    Image.new("RGB", (60, 40), "red").save(made.captions.parent / "red.png")
    return made


def write_timed(path: Path, count: int) -> None:
    """A video whose n-th frame is grey 10 n."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "1"})
        stream.width, stream.height = 48, 32
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        for number in range(count):
            grey = np.full((32, 48, 3), 10 * number, np.uint8)
            container.mux(stream.encode(VideoFrame.from_ndarray(grey, "rgb24")))
        container.mux(stream.encode())


def compose(world: World, key: str, **sampling: Any) -> tuple[AVLLM, AVProcessor]:
    description = ModelConfig.model_validate(
        world.model
        | {
            "encoders": {"video": {"type": key, "config": CONFIGS[key]}},
            "connector": [{"type": "mlp", "stream": "video"}],
            "sampling": sampling,
        }
    )
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(0)
    model = AVLLM.from_backbones(description, ids).eval()
    return model.requires_grad_(False), AVProcessor.from_model(model, tokenizer)


@torch.no_grad()
@pytest.mark.parametrize("key", STEP_FRAMES)
def test_files_and_pictures_in_a_model_with_a_feature_cache(
    world: World, tmp_path: Path, key: str
) -> None:
    model, processor = compose(world, key, fps=FPS, max_frames=32)
    root = world.captions.parent
    parts: list[MediaPart] = [
        VideoPart(video="timed.mp4", start=0.25, end=2.125),  # 15 frames, the first is number 2
        ImagePart(image="red.png"),
    ]
    reader = MediaReader(processor)
    inputs = reader.inputs(parts, root)
    size = STEP_FRAMES[key]
    video, picture = (clip["video"] for clip in inputs)
    assert video.grid.steps == -(-15 // size)
    check_clock(processor.preprocessors["video"], video.inputs["pixel_values"], video.span, size)
    assert picture.span.tolist() == [[0.0, 0.0]]
    assert picture.mask.all()
    shown = picture.inputs["pixel_values"].flatten(0, 1)
    assert len(picture.inputs["pixel_values"]) == 1
    assert all(torch.equal(frame, shown[0]) for frame in shown)

    cache = FeatureCache(tmp_path / "cache", recipe(processor, model.encoders, "no"))
    places = [(root, part) for part in parts]
    fill(cache, places, ClipEncoding(reader.inputs, model.encoders, torch.device("cpu")))
    expected = encode(model.encoders["video"], [video, picture])[""]
    for number, place in enumerate(places):
        item = cache.get(place)["video"]
        assert item.features is not None
        steps = len(item.span)
        torch.testing.assert_close(item.features[""], expected[number, :steps], atol=1e-5, rtol=0)
        assert torch.equal(item.span, inputs[number]["video"].span)


def check_clock(made: ClipPreprocessor, pixels: Tensor, span: Tensor, size: int) -> None:
    """The grey of each frame is that of the moment at which its step says it is."""
    greys = grey_levels(made, pixels)
    for number, (start, end) in enumerate(span.tolist()):
        first = number * size
        frame_count = min(size, 15 - first)
        assert start == pytest.approx(first / FPS, abs=1e-4)
        assert end == pytest.approx((first + frame_count) / FPS, abs=1e-4)
        for frame in range(first, first + frame_count):
            assert float(greys[frame]) == pytest.approx(10 * (frame + 2), abs=3)


@torch.no_grad()
def test_a_model_of_clips_answers_and_comes_back(world: World, tmp_path: Path) -> None:
    model, processor = compose(world, "videomae", num_frames=6)
    save_checkpoint(model, processor, tmp_path / "checkpoint", [])
    chat = Chat.load(tmp_path / "checkpoint")
    file = str(world.captions.parent / "timed.mp4")
    (seen,) = chat.look(video=file)
    assert seen.tokens == {"video": 3 * 16}
    assert processor.blanks["video"].grid.steps == 1
    assert seen.frames is not None
    assert seen.frames.shape == (6, 32, 32, 3)  # as the encoder gets them, without the filling
    assert [int(x) for x in seen.frames.float().mean((1, 2, 3)).diff() > 10] == [1] * 5
    content = [{"type": "video", "video": file}, {"type": "text", "text": "what colour ?"}]
    sample = {"id": "s", "messages": [{"role": "user", "content": content}]}
    batch = processor([sample])
    assert torch.equal(chat.model(batch).logits, model(batch).logits)
