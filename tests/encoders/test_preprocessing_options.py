"""A setting of `preprocessing` changes what an encoder is given, or is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders.encoder_families import CONFIGS, KEYS, OPTIONS, family

from avllm.encoders._backbone import Backbone
from avllm.errors import UserError
from avllm.models.encoders import check_encoder
from avllm.text_models.base import TextModelError
from avllm.text_models.load import load_text_model

CROPPED = {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": 32}
OTHER: dict[str, tuple[dict[str, Any], Any]] = {
    "sampling_rate": ({}, 8_000),
    "hop_length": ({}, 80),
    "n_fft": ({}, 256),
    "stride": ({}, 4),
    "mean": ({}, -1.0),
    "std": ({}, 2.0),
    "do_normalize": ({}, False),
    "return_attention_mask": ({}, True),
    "max_length_s": ({}, 0.5),
    "fft_window_size": ({}, 512),
    "frequency_min": ({}, 100),
    "frequency_max": ({}, 7_000),
    "padding": ({}, "pad"),
    "image_mean": ({}, [0.1, 0.2, 0.3]),
    "image_std": ({}, [0.1, 0.2, 0.3]),
    "resample": ({}, 0),
    "rescale_factor": ({}, 0.5),
    "max_num_patches": ({}, 9),
    "size": (CROPPED, {"shortest_edge": 128}),
    "crop_size": (CROPPED, 16),
    "do_center_crop": ({"size": 64, "crop_size": 32, "do_center_crop": False}, True),
}
"""By setting: the others that it needs, and a value that is not the usual one."""


def settings_of(key: str, preprocessing: dict[str, Any]) -> dict[str, Any]:
    """What decides an encoder's input, under some settings."""
    with torch.device("meta"):
        encoder = family(key)(
            CONFIGS[key], **OPTIONS.get(key, {}), preprocessing=preprocessing or None
        )
    return dict(encoder.preprocessor().settings())


@pytest.mark.parametrize("key", KEYS)
def test_each_setting_that_is_named_is_read(key: str) -> None:
    part = family(key)
    assert issubclass(part, Backbone)
    assert part.preprocessing_keys
    for name in part.preprocessing_keys:
        others, value = OTHER[name]
        if name == "return_attention_mask" and key in ("hubert", "data2vec_audio"):
            value = False  # their checkpoints have a mask
        assert settings_of(key, others) != settings_of(key, others | {name: value}), name


@pytest.mark.parametrize("key", KEYS)
def test_each_other_setting_is_refused(key: str) -> None:
    part: Any = family(key)
    spec = {"type": key, "config": CONFIGS[key], **OPTIONS.get(key, {})}
    known = part.preprocessing_keys[0]
    check_encoder(part.medium, spec | {"preprocessing": {known: OTHER[known][1]}})
    with pytest.raises(UserError, match=f"did you mean '{known}'") as refused:
        check_encoder(part.medium, spec | {"preprocessing": {f"{known}s": 1}})
    assert refused.value.reason == "unknown_option"


def test_the_nearest_setting_is_named() -> None:
    spec = {"type": "mel_conv", "config": CONFIGS["mel_conv"]}
    with pytest.raises(UserError, match=r"preprocessing\.hop .*did you mean 'hop_length'"):
        check_encoder("audio", spec | {"preprocessing": {"hop": 80}})


def test_options_of_text_models_name_the_nearest(tmp_path: Any) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("{type: hf, name: x, max_new_token: 3}")
    with pytest.raises(TextModelError, match="did you mean 'max_new_tokens'") as refused:
        load_text_model(str(path))
    assert refused.value.reason == "bad_options"
