"""bfloat16 where the hardware has it, float32 elsewhere, and what was asked for everywhere."""

from __future__ import annotations

import pytest
import torch

from avllm.precision import (
    CPU_FEATURES,
    choose_precision,
    has_fast_bfloat16,
    product_dtype,
    training_attention,
)


@pytest.mark.parametrize("feature", [None, *CPU_FEATURES])
def test_auto_follows_the_processor(feature: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**dict.fromkeys(CPU_FEATURES, False), **({feature: True} if feature else {})}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert has_fast_bfloat16("cpu") == (feature is not None)
    assert choose_precision("auto", "cpu") == ("bf16" if feature else "fp32")
    assert product_dtype("cpu") == (torch.bfloat16 if feature else torch.float32)
    assert training_attention("cpu") == ("eager" if feature else "sdpa")


def test_what_is_asked_for_is_done_anywhere() -> None:
    assert [choose_precision(p, "cpu") for p in ("fp32", "bf16")] == ["fp32", "bf16"]
    with pytest.raises(ValueError, match="precision is 'fp16'.*'auto', 'fp32', 'bf16'"):
        choose_precision("fp16", "cpu")
