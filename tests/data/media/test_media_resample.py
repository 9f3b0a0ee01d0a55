"""Check that resampling gives torchaudio's numbers, by every implementation."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torchaudio

from avllm.data.media.resample import _Same, _Sparse, _Whole, resampler


@pytest.mark.parametrize(
    "old, new",
    [(44_100, 16_000), (22_050, 16_000), (48_000, 16_000), (8_000, 16_000), (37, 36)],
)
@pytest.mark.parametrize("samples", [1, 500, 44_100, 50_001])
def test_torchaudios_numbers(old: int, new: int, samples: int) -> None:
    x = torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    theirs = torchaudio.transforms.Resample(old, new)(x)
    convert = resampler(Fraction(old, new))
    ours = convert(torch.nn.functional.pad(x, (convert.before, convert.after)))
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_zeros_are_left_out_where_no_sample_is_copied_for_it() -> None:
    assert isinstance(resampler(Fraction(441, 160)), _Sparse)
    assert isinstance(resampler(Fraction(3)), _Whole)
    same = resampler(Fraction(1))
    assert isinstance(same, _Same)
    assert same(torch.ones(7)).tolist() == [1.0] * 7
