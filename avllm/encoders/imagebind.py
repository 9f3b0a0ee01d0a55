"""Encode sound with the audio trunk of ImageBind, one vector a segment of two seconds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from avllm.encoders._audio import FbankPreprocessor
from avllm.encoders._published_file import PublishedBackbone
from avllm.encoders.base import check_values
from avllm.published import Published
from avllm.tokens import EncoderInput

STEM = "modality_preprocessors.audio."
TRUNK = "modality_trunks.audio."
HEAD = "modality_heads.audio."
SCALE = "modality_postprocessors.audio.1.log_logit_scale"
PUBLISHED_NAMES = (
    (r"^cls_token$", STEM + "cls_token"),
    (r"^positions$", STEM + "pos_embedding_helper.pos_embed"),
    (r"^stem\.", STEM + "rgbt_stem.proj."),
    (r"^stem_norm\.", STEM + "rgbt_stem.norm_layer."),
    (r"^blocks\.", TRUNK + "blocks."),
    (r"^norm\.", HEAD + "0."),
    (r"^projection\.", HEAD + "2."),
)
"""Beginnings of the model's names and of those in ``imagebind_huge.pth``."""

OTHER_MODALITIES = r"modality_\w+\.(vision|text|depth|thermal|imu)\..*"


class ImageBindConfig(PretrainedConfig):
    """Shape of an :class:`ImageBindAudioModel`; the defaults are those of ImageBind-Huge.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the trunk.
        projection_dim: width of the joint embedding.
        num_mel_bins, frames: of a segment's spectrogram.
        patch_size, patch_stride: of the convolution that makes patches of it.
        layer_norm_eps: of the blocks and the head.
        stem_norm_eps: of the patches' norm.
        scale: length of an embedding.
    """

    model_type = "imagebind_audio"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        projection_dim: int = 1024,
        num_mel_bins: int = 128,
        frames: int = 204,
        patch_size: int = 16,
        patch_stride: int = 10,
        layer_norm_eps: float = 1e-6,
        stem_norm_eps: float = 1e-5,
        scale: float = 20.0,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.projection_dim = projection_dim
        self.num_mel_bins = num_mel_bins
        self.frames = frames
        self.patch_size = patch_size
        self.patch_stride = patch_stride
        self.layer_norm_eps = layer_norm_eps
        self.stem_norm_eps = stem_norm_eps
        self.scale = scale
        super().__init__(**kwargs)

    @property
    def patches(self) -> int:
        """Patches of a segment's spectrogram."""
        bands = (self.num_mel_bins - self.patch_size) // self.patch_stride + 1
        steps = (self.frames - self.patch_size) // self.patch_stride + 1
        return bands * steps

    @property
    def longest_segment(self) -> float:
        """Seconds that a spectrogram covers: Kaldi's frames begin every 10 ms and last 25."""
        return (self.frames - 1) / 100 + 0.025


class ImageBindBlock(nn.Module):
    """A transformer block with norms before attention and MLP.

    Attention sees one learned key and value more than there are tokens.
    """

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = nn.MultiheadAttention(
            width, config.num_attention_heads, add_bias_kv=True, batch_first=True
        )
        self.norm_2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, config.intermediate_size),
                "fc2": nn.Linear(config.intermediate_size, width),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(U, N, D)`` to ``(U, N, D)``."""
        normed = self.norm_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = F.gelu(self.mlp["fc1"](self.norm_2(x)))
        return x + self.mlp["fc2"](hidden)


class ImageBindAudioModel(PreTrainedModel):
    """ImageBind's audio branch (Girdhar et al. 2023, arXiv:2305.05665, section 3.3)."""

    config_class = ImageBindConfig
    base_model_prefix = "imagebind"
    main_input_name = "mel"

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        size = config.patch_size
        self.stem = nn.Conv2d(1, width, size, stride=config.patch_stride, bias=False)
        self.stem_norm = nn.LayerNorm(width, eps=config.stem_norm_eps)
        std = width**-0.5
        self.cls_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=std))
        self.positions = nn.Parameter(torch.empty(1, 1 + config.patches, width).normal_(std=std))
        blocks = [ImageBindBlock(config) for _ in range(config.num_hidden_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(width, config.projection_dim, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's initialisation."""

    def forward(
        self, mel: Tensor, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """Encode segments ``(U, 1, mels, frames)``.

        Returns:
            ``last_hidden_state (U, 1 + patches, D)`` after the head's norm, the class token first;
            ``pooler_output (U, projection_dim)``, the joint embedding, of length ``scale``; if
            asked for, ``hidden_states``: the embedding and each block's output.
        """
        patches = self.stem(mel).flatten(2).transpose(1, 2)  # (U, patches, D)
        patches = self.stem_norm(patches)
        first = self.cls_token.expand(len(mel), -1, -1)
        x = torch.cat([first, patches], 1) + self.positions  # (U, 1 + patches, D)
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        x = self.norm(x)
        embedding = F.normalize(self.projection(x[:, 0]), dim=-1) * self.config.scale
        hidden_states = tuple(states) if output_hidden_states else None
        return BaseModelOutputWithPooling(
            last_hidden_state=x, pooler_output=embedding, hidden_states=hidden_states
        )


AutoConfig.register(ImageBindConfig.model_type, ImageBindConfig, exist_ok=True)


@dataclass(frozen=True)
class SegmentPreprocessor(FbankPreprocessor):
    """Take segments of equal length, spread evenly over the sound, as ImageBind's loader does.

    The first begins with the sound and the last ends with it; they may overlap, and a sound that
    is shorter than one segment is taken as often as there are segments.

    Attributes:
        segments: their number; None lets them follow one another over all of the sound.
    """

    segments: int | None = 8

    @property
    def reach(self) -> int:
        """Samples of a segment."""
        return self.unit_samples

    def __call__(self, media: Any, duration: float) -> EncoderInput:
        """Return the segments of a sound, ``mel (U, 1, mels, frames)``, and their spans.

        Args:
            media: see :class:`~avllm.encoders._audio.SoundPreprocessor`. duration: not read.
        """
        if self.segments is None:
            return super().__call__(media, duration)
        self._check(media)
        check_values(self.segments * self.mels * self.frames, f"{self.segments} segments of sound")
        samples = media.x.shape[0]
        room = max(0, samples - self.unit_samples)
        mels: list[Tensor] = []
        spans: list[list[float]] = []
        for number in range(self.segments):
            start = room * number // max(1, self.segments - 1)
            end = min(start + self.unit_samples, samples)
            mels.append(self.prepare(media.x[start:end])["mel"])
            spans.append([media.start + start / self.rate, media.start + end / self.rate])
        mask = torch.ones(self.segments, 1, dtype=torch.bool)
        return EncoderInput({"mel": torch.stack(mels)}, torch.tensor(spans), mask)

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``mel`` (1, mels, frames) of a segment's samples, without their mean."""
        bank = super().prepare(x - x.mean())["input_values"]  # (frames, mels)
        return {"mel": bank.T[None].contiguous()}


class ImageBind(PublishedBackbone):
    """ImageBind's audio trunk (Girdhar et al. 2023, arXiv:2305.05665): one token a segment.

    ``name`` is the published ``imagebind_huge.pth`` itself, whose other modalities are not read, or
    a folder that ``avllm ckpt import`` wrote.

    Args:
        config, layers, preprocessing: see :class:`~avllm.encoders._backbone.Backbone`.
        feature: ``cls`` (the class token; in the last layer after the head's norm) or ``pooled``
            (the embedding in the space that ImageBind's modalities share; last layer only).
        segments: number of segments, spread evenly over the sound; None lets them follow one
            another over all of it.
        seconds: length of a segment.
        heads: of attention; the published file does not show the number, which is 12. None takes
            the config's.

    Raises:
        ValueError: a feature or a layer that does not exist, or a segment that is longer than the
            spectrogram that the trunk reads.
    """

    medium = "audio"
    config_class = ImageBindConfig
    model_class = ImageBindAudioModel
    features = ("cls", "pooled")
    preprocessing_keys = ("sampling_rate", "mean", "std")

    def __init__(
        self,
        config: PretrainedConfig | dict[str, Any],
        *,
        layers: list[int] | None = None,
        feature: str = "cls",
        segments: int | None = 8,
        seconds: float = 2.0,
        heads: int | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        config = self.read_config(config)
        if heads is not None:
            config.num_attention_heads = heads
        super().__init__(config, layers=layers, preprocessing=preprocessing)
        self.feature = feature
        self.segments = segments
        self.seconds = seconds
        self.heads = heads
        self.rate = int((preprocessing or {}).get("sampling_rate", 16_000))
        self.check_feature()
        self._check_segments()

    def _check_segments(self) -> None:
        most = self.backbone_config.longest_segment
        if not 0.025 <= self.seconds <= most:
            raise ValueError(
                f"ImageBind: seconds={self.seconds}; expected from 0.025 to {most:g}, the "
                f"{self.backbone_config.frames} frames that the trunk reads"
            )
        if self.segments is not None and self.segments < 1:
            raise ValueError(f"ImageBind: segments={self.segments}; expected 1 or more, or none")

    @property
    def out_dims(self) -> dict[str, int]:
        """Width of each layer given out."""
        if self.feature == "pooled":
            return dict.fromkeys(self.layer_names, int(self.backbone_config.projection_dim))
        return super().out_dims

    def options(self) -> dict[str, Any]:
        """See :meth:`Backbone.options`."""
        own: dict[str, Any] = {"feature": self.feature, "heads": self.heads}
        own |= {"segments": self.segments, "seconds": self.seconds}
        return super().options() | own

    def preprocessor(self) -> SegmentPreprocessor:
        """Return Kaldi filter banks of segments, by the config and the checkpoint's settings."""
        settings = self.preprocessing or {}
        frames = int(self.backbone_config.frames)
        return SegmentPreprocessor(
            rate=self.rate,
            unit_samples=round(self.seconds * self.rate),
            steps=1,
            tokens=1,
            mels=int(self.backbone_config.num_mel_bins),
            frames=frames,
            used=frames,
            mean=float(settings.get("mean", -4.268)),
            std=float(settings.get("std", 9.138)) / 2,  # values become (x - mean) / (2 std)
            segments=self.segments,
        )

    def arrange(self, x: Tensor, out: Any) -> Tensor:
        """Choose the class token or the embedding: ``(U, N, D)`` -> ``(U, 1, 1, D)``."""
        if self.feature == "pooled":
            return out.pooler_output[:, None, None]
        return x[:, None, :1]

    @classmethod
    def published_config(cls, file: Published) -> ImageBindConfig:
        """Return the config that the published file's shapes show."""
        return published_config(file)

    @classmethod
    def take(cls, file: Published, model: ImageBindAudioModel) -> dict[str, Tensor]:
        """Return the tensors of the sound's branch."""
        return take_audio(file, model)


def published_config(file: Published, **unseen: Any) -> ImageBindConfig:
    """Read the sizes of a published ImageBind off its tensors.

    Args:
        file: the whole model.
        unseen: fields that no tensor shows, where they are not those of ImageBind-Huge.

    Raises:
        PublishedError: the file has no audio branch.
    """
    stem = file.tensor(STEM + "rgbt_stem.proj.weight")  # (D, 1, patch, patch)
    log_scale = file.tensor(SCALE).double()
    return ImageBindConfig(
        hidden_size=stem.shape[0],
        patch_size=stem.shape[-1],
        num_hidden_layers=file.blocks(re.escape(TRUNK) + r"blocks\.(\d+)\."),
        intermediate_size=file.tensor(TRUNK + "blocks.0.mlp.fc1.weight").shape[0],
        projection_dim=file.tensor(HEAD + "2.weight").shape[0],
        scale=min(100.0, log_scale.exp().item()),
        **unseen,
    )


def take_audio(file: Published, model: nn.Module) -> dict[str, Tensor]:
    """Return the audio branch of a published ImageBind by the names of our model.

    Raises:
        PublishedError: a tensor is missing, left over or of another shape.
    """
    state = file.take(model.state_dict(), published_name)
    file.leave([OTHER_MODALITIES])
    file.refuse_rest()
    return state


def published_name(own: str) -> str:
    """Return the name in ``imagebind_huge.pth`` of a tensor of the model."""
    for pattern, theirs in PUBLISHED_NAMES:
        if re.match(pattern, own):
            return re.sub(pattern, theirs, own)
    return own
