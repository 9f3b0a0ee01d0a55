"""Strided convolutions over the mel spectrogram."""

import pytest
import torch
from encoders.encoder_families import build, encode, sound

from avllm.encoders.mel_conv import MelConvConfig

torch.set_num_threads(1)


def test_a_step_for_each_product_of_the_strides():
    made = build("mel_conv").preprocessor()
    assert (made.steps, made.unit_samples) == (
        25,
        25 * 4 * 160,
    )  # 100 frames, strides 1 x 2 x 1 x 2


def test_a_soft_recording_is_heard_as_a_loud_one():
    encoder = build("mel_conv")
    loud = sound(1.0, 16_000)
    clips = [encoder.preprocessor()(type(loud)(x, 16_000), 1.0) for x in (loud.x, 0.5 * loud.x)]
    first, second = (encode(encoder, [clip])[""] for clip in clips)
    torch.testing.assert_close(first, second, atol=1e-3, rtol=0)


def test_an_earlier_layer_is_averaged_onto_the_last_ones_steps():
    encoder = build("mel_conv", layers=[0, -1])
    clip = encoder.preprocessor()(sound(1.0, 16_000), 1.0)
    with torch.no_grad():
        finest = encoder.backbone(**clip.inputs, output_hidden_states=True).hidden_states[
            0
        ]  # (1, 100, 32)
        given = encoder(**clip.inputs)["0"]  # (1, 25, 1, 32)
    torch.testing.assert_close(given[:, :, 0], finest.unflatten(1, (25, 4)).mean(2))


def test_silence_gives_finite_numbers():
    encoder = build("mel_conv")
    clip = encoder.preprocessor()(type(sound(1.0, 16_000))(torch.zeros(16_000), 16_000), 1.0)
    assert encode(encoder, [clip])[""].isfinite().all()


@pytest.mark.parametrize("wrong", [{"strides": [1, 2]}, {"kernel_sizes": [3, 3, 4, 5]}])
def test_shapes_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="equal length and odd kernels"):
        MelConvConfig(**wrong)
