"""The feature cache: what decides an address, what is kept, what a bad file becomes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from avllm.data.cache import CacheError, FeatureCache, fill, recipe
from avllm.data.media import MediaError
from avllm.data.schema import VideoPart
from avllm.encoders.base import Encoder
from avllm.tokens import EncoderInput

CPU = torch.device("cpu")


class Double(Encoder):
    """Gives back its input times its one weight."""

    stream = "video"
    layer_names = [""]

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"": self.weight * inputs["x"][:, None]}  # (U, 1, P, D)


class Prepare:
    """Stands for decoding: as many steps as the file has bytes, counted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, place: tuple[Path, VideoPart]) -> dict[str, EncoderInput]:
        self.calls += 1
        path = place[0] / place[1].video
        if not path.is_file():
            raise MediaError(path, "missing", "no such file")
        t = path.stat().st_size
        if t == 0:
            return {}
        x = torch.arange(t * 6.0).view(t, 2, 3)
        return {"video": EncoderInput({"x": x}, torch.zeros(t, 2), torch.ones(t, 2, dtype=torch.bool))}


def made_by(**changes: object) -> dict[str, object]:
    """A recipe."""
    return {"encoders": "abc", "dtype": None, **changes}


def test_a_filled_cache_gives_features_and_decodes_once(tmp_path: Path) -> None:
    names = ["one", "twoo", "nothing"]
    for name, size in zip(names, (3, 4, 0), strict=True):
        (tmp_path / name).write_bytes(b"x" * size)
    places = [(tmp_path, VideoPart(video=n)) for n in [*names, "one", "gone"]]
    encoders, prepare = nn.ModuleDict({"video": Double()}), Prepare()
    cache = FeatureCache(tmp_path / "cache", made_by())
    assert fill(cache, places, prepare, encoders, device=CPU, batch_size=2) == 3
    assert prepare.calls == 4
    clip = cache.get(places[1])["video"]
    assert clip.features is not None
    torch.testing.assert_close(clip.features[""], 2 * torch.arange(24.0).view(4, 2, 3))
    assert clip.inputs == {}
    assert cache.get(places[2]) == {}
    with pytest.raises(MediaError, match="no such file"):
        cache.get(places[4])
    again = FeatureCache(tmp_path / "cache", made_by())
    assert fill(again, places[:4], prepare, encoders, device=CPU) == 0
    assert prepare.calls == 4


def test_what_decides_an_address(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    shutil.copy(tmp_path / "a", tmp_path / "copy")
    cache = FeatureCache(tmp_path / "cache", made_by())

    def key(cache: FeatureCache, **part: object) -> str:
        return cache.key((tmp_path, VideoPart(**part)))  # type: ignore[arg-type]

    own = key(cache, video="a")
    assert own == key(cache, video="copy"), "the content counts, not the name"
    others = [key(cache, video="b"), key(cache, video="a", start=0.5), key(cache, video="a", sound="off")]
    others += [key(FeatureCache(tmp_path / "cache", made_by(encoders="other")), video="a")]
    others += [key(FeatureCache(tmp_path / "cache", made_by(dtype="float16")), video="a")]
    assert len({own, *others}) == 6


def test_kept_in_half_precision_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    place = (tmp_path, VideoPart(video="a"))
    cache = FeatureCache(tmp_path / "cache", made_by(dtype="float16"))
    fill(cache, [place], Prepare(), nn.ModuleDict({"video": Double()}), device=CPU)
    features = cache.get(place)["video"].features
    assert features is not None
    assert features[""].dtype == torch.float16


def test_a_trained_encoder_is_refused() -> None:
    encoder = Double()
    encoder.weight.requires_grad_(True)
    with pytest.raises(CacheError, match="trains encoders.video.weight"):
        recipe(None, nn.ModuleDict({"video": encoder}), "fp32")
