"""Encode clips with PE-AV: one token a frame, in the space of the sound that belongs to it."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from torch import Tensor
from transformers import (
    AutoConfig,
    PeVideoEncoder,
    PeVideoEncoderConfig,
    PretrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)
from transformers.utils import is_timm_available

from avllm.encoders._backbone import Backbone
from avllm.encoders._clip import ClipPreprocessor, WholeClips
from avllm.encoders._visual import HALF, checkpoint_size, pair

TIMM = TimmWrapperConfig.model_type
USUAL_SIDE = 336  # pixels


class PEAVVideo(WholeClips):
    """The video tower of PE-AV (Vyas et al. 2025, arXiv:2512.19687).

    Each frame becomes one token by Perception Encoder (arXiv:2504.13181), and a transformer lets
    the tokens of a clip see each other. Loads out of a full PE-AV checkpoint as well. Released
    checkpoints take the frames' encoder from timm, which has to be installed.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        feature: ``patch`` (a token a frame), or ``pooled`` (one vector a clip, before the
            projection into the space of texts; last layer only).
        window: frames that attention sees at once; None means all of a clip.

    Raises:
        ValueError: an unknown feature, pooled with inner layers or with a window, or no timm.
    """

    config_class = PeVideoEncoderConfig
    model_class = PeVideoEncoder
    tower = "video_config"
    key_mapping: ClassVar[dict[str, str]] = {r"^(video_model\.)?video_encoder\.": ""}
    other_keys = (
        r"(text_model|audio_model|audio_video_encoder)\.",
        r"(video_model\.)?(text_\w+|video_\w*head)\b",
        r"\w+_(head|logit_scale|logit_bias)\b",
    )
    features = ("patch", "pooled")
    preprocessing_files = ("video_preprocessor_config.json", "processor_config.json")
    defaults: ClassVar[dict[str, Any]] = {"resample": 2, "image_mean": HALF, "image_std": HALF}

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        feature: str = "patch",
        window: int | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, layers=layers, feature=feature, preprocessing=preprocessing)
        self.window = window
        if window is not None and (window < 1 or feature == "pooled"):
            raise ValueError(
                f"PEAVVideo: window={window} with feature {feature!r}; expected at least 1, and "
                "none where a clip is one vector"
            )

    @classmethod
    def read_config(cls, config: PretrainedConfig | dict[str, Any]) -> PretrainedConfig:
        """See :meth:`Backbone.read_config`; in a full model the tower is one level deeper.

        transformers takes the frames' encoder for timm's whatever its type, and does not look at
        ``num_classes``, by which the width of its tokens is saved.
        """
        if isinstance(config, PretrainedConfig):
            config = config.to_dict()
        config = config.get("audio_video_config", config)
        read = super().read_config(config)
        given = config.get("vision_config") or {}
        if given.get("model_type", TIMM) != TIMM:
            read.vision_config = AutoConfig.for_model(**given)
        elif read.vision_config.model_type == TIMM:
            read.vision_config.num_labels = read.vision_config.num_classes
        return read

    @classmethod
    def saved_config(cls, name_or_path: str, revision: str | None = None) -> PretrainedConfig:
        """Return the tower's config; it is read as it was saved, see :meth:`read_config`."""
        saved, _ = PretrainedConfig.get_config_dict(name_or_path, revision=revision)
        return cls.read_config(saved)

    @classmethod
    def build(cls, config: PretrainedConfig) -> PreTrainedModel:
        """Build the backbone with random weights.

        Raises:
            ValueError: its frames' encoder is timm's, and timm is not installed.
        """
        if config.vision_config.model_type == TIMM and not is_timm_available():
            raise ValueError(
                "PEAVVideo: its frames are encoded by a model of timm, which is not installed; "
                "pip install timm"
            )
        return super().build(config)

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        return Backbone.options(self) | {"feature": self.feature, "window": self.window}

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that the backbone gets."""
        usual = side_of(self.backbone_config.vision_config)
        return checkpoint_size(self.preprocessing) or pair(usual)

    def tokens(self) -> int:
        """Return P."""
        return 1

    def most_units(self) -> int:
        """See :meth:`WholeClips.most_units`."""
        return self.window or super().most_units()

    def preprocessor(self) -> ClipPreprocessor:
        """Return the preprocessing of pictures; a frame is a step."""
        is_pooled = self.feature == "pooled"
        return ClipPreprocessor(**self.picture_fields(), frames=1, whole=is_pooled)

    def call_options(self) -> dict[str, Any]:
        """Return nothing: the frames' encoder has one size."""
        return {}

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Encode the frames of one clip: ``pixel_values (U, 1, 3, h, w)``."""
        frames = inputs["pixel_values"].flatten(0, 1)
        return super().forward(pixel_values_videos=frames[None])

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Make each frame a unit: ``(1, [1 +] U, D)`` -> ``(U, 1, 1, D)``.

        The clip's pooled vector is that of every unit, of which the first is given out.
        """
        frames = out.last_hidden_state[0]  # (U, D); inner layers have the class token, too
        x = x[0, -len(frames) :]
        if self.feature == "pooled":
            x = out.pooler_output.expand_as(frames)
        return x[:, None, None]


def side_of(vision: PretrainedConfig) -> Any:
    """Return the side in pixels that the frames' encoder takes; timm's names end in it."""
    if vision.model_type != TIMM:
        return vision.image_size
    side = re.search(r"\d+$", vision.architecture)
    return side[0] if side else USUAL_SIDE
