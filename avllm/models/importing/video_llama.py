"""Import Video-LLaMA: what its authors, BLIP-2's and ImageBind's publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from avllm.encoders.imagebind import ImageBindAudioModel, published_config, take_audio
from avllm.models.importing._bert_qformer import BUFFERS, published_qformer, qformer_options
from avllm.models.importing._eva import eva_files
from avllm.models.importing._replay import next_token_arrays, stream_of_units
from avllm.models.importing.base import AdapterSource, BackboneFiles, Converted, Dims, Importer
from avllm.published import Published

UNSEEN = {
    "qformer.heads": 12,
    "qformer.cross_attention_frequency": 2,
    "video_qformer.heads": 12,
    "video_qformer.cross_attention_frequency": 1,
    "audio_qformer.heads": 12,
    "audio_qformer.cross_attention_frequency": 1,
    "vit.heads": 16,
    "vit.norm_eps": 1e-6,
    "vit.post_norm_eps": 1e-5,
    "imagebind.audio_heads": 12,
    "imagebind.stride": 10,
    "imagebind.mel_bins": 128,
    "imagebind.target_len": 204,
    "imagebind.norm_eps": 1e-6,
    "imagebind.stem_norm_eps": 1e-5,
    "frames": 8,
    "segments": 8,
}
"""Numbers of the released models that no tensor shows."""

QFORMER_SIZES = ("hidden_size", "layers", "intermediate", "queries")
SEEN = (
    *(f"qformer.{size}" for size in QFORMER_SIZES),
    *(f"video_qformer.{size}" for size in QFORMER_SIZES),
    *(f"audio_qformer.{size}" for size in QFORMER_SIZES),
    *("vit.img", "vit.patch", "vit.dim", "vit.depth", "vit.mlp_ratio"),
    *("imagebind.out", "imagebind.audio_dim", "imagebind.audio_blocks", "imagebind.kernel"),
    *("max_frame_pos", "max_audio_segments", "llm_hidden", "image_token_id"),
)
"""Numbers that may be given, and are compared with the tensors."""

TEXT_SIDE = (
    r"Qformer\.cls\..*",
    r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
    r"(t5|opt|vision|text)_proj\..*",
    r"itm_head\..*",
    r"temp",
)
"""Of BLIP-2: what reads texts, and projections, which Video-LLaMA does not use."""

FRAME = ("Qformer.bert.", "query_tokens")
VIDEO = ("video_Qformer.bert.", "video_query_tokens")
AUDIO = ("audio_Qformer.bert.", "audio_query_tokens")
"""Beginning of a Q-Former's names, and the name of its queries."""


class VideoLlama(Importer):
    """Make Video-LLaMA (Zhang et al. 2023, arXiv 2306.02858) out of its published files.

    Frames: EVA ViT-g and its norm, BLIP-2's Q-Former on each frame, learned positions, a Q-Former
    on the clip, a projection. Sound: ImageBind's embedding of segments of 2 s, learned positions, a
    Q-Former, a projection. Either branch may be left out.

    Args:
        vl: Video-LLaMA's vision branch, ``VL_*.pth``; goes with ``vit`` and ``qformer``.
        al: its audio branch, ``AL_*.pth``; goes with ``imagebind``.
        imagebind: ``imagebind_huge.pth``.
        vit: ``eva_vit_g.pth``.
        qformer: ``blip2_pretrained_flant5xxl.pth``.

    Raises:
        ValueError: files of a branch are missing, or no branch is given.
    """

    defaults: ClassVar[Mapping[str, Any]] = UNSEEN | dict.fromkeys(SEEN)
    inputs = ("pixel_values", "mel", "input_ids", "labels")

    def __init__(
        self,
        *,
        vl: str | None = None,
        al: str | None = None,
        imagebind: str | None = None,
        vit: str | None = None,
        qformer: str | None = None,
    ) -> None:
        sight = {"vl": vl, "vit": vit, "qformer": qformer}
        sound = {"al": al, "imagebind": imagebind}
        self.sees = _is_given(sight)
        self.hears = _is_given(sound)
        if not self.sees and not self.hears:
            raise ValueError("no file is given; expected vl, vit and qformer, or al and imagebind")
        self.files = {name: path for name, path in (sight | sound).items() if path is not None}

    @property
    def sources(self) -> list[Path]:
        """Return the files that are read."""
        return [Path(path) for path in self.files.values()]

    def convert(self, dims: Dims, allow: Sequence[str]) -> Converted:
        """See :meth:`Importer.convert`."""
        files = {name: Published.read(path, allow) for name, path in self.files.items()}
        converted = Converted()
        if self.sees:
            _add_sight(converted, files["vl"], files["vit"], files["qformer"], dims)
        if self.hears:
            _add_sound(converted, files["al"], files["imagebind"], dims)
        converted.model = {
            # As in the original's conversations: what is heard, then what is seen.
            "layout": {"type": "concat", "streams": sorted(converted.encoders)},
            "sampling": {"num_frames": int(dims["frames"])},
            "media_text": {
                "video": "<Video>{media}</Video> ",
                "audio": "<Audio>{media}</Audio> ",
                "image": "<Image>{media}</Image> ",
            },
        }
        return converted

    @classmethod
    def replay(
        cls, model: Any, arrays: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """See :meth:`Importer.replay`."""
        made: dict[str, Tensor] = {}
        if "video" in model.encoders and "pixel_values" in arrays:
            made |= _replay_sight(model, arrays["pixel_values"])
            if "input_ids" in arrays:
                made |= next_token_arrays(model, arrays, made["video_tokens"], values)
        if "audio" in model.encoders and "mel" in arrays:
            made |= _replay_sound(model, arrays["mel"])
        return made


def _is_given(files: Mapping[str, str | None]) -> bool:
    """Return whether the files of a branch are given.

    Raises:
        ValueError: some are, and others are not.
    """
    missing = [name for name, path in files.items() if path is None]
    if missing and len(missing) < len(files):
        raise ValueError(
            f"{', '.join(missing)} is not given; expected all of {', '.join(files)}, or none"
        )
    return not missing


def _add_sight(
    converted: Converted, vl: Published, vit: Published, blip2: Published, dims: Dims
) -> None:
    """Add the branch of frames."""
    frame = qformer_options(blip2, *FRAME, dims, "qformer")
    clip = qformer_options(vl, *VIDEO, dims, "video_qformer")
    table = vl.tensor("video_frame_position_embedding.weight")  # (positions, D)
    dims.compare({"max_frame_pos": table.shape[0]})
    converted.encoders["video"] = {"type": "eva"}
    converted.backbones["video"] = eva_files(vit, blip2, dims)
    blip2.leave([*TEXT_SIDE, *BUFFERS])
    vl.leave(BUFFERS)
    converted.adapters += [
        AdapterSource(
            {"type": "qformer", "stream": "video", "per": "frame", **frame},
            blip2,
            partial(published_qformer, *FRAME),
        ),
        AdapterSource(
            {
                "type": "position",
                "stream": "video",
                "kind": "learned",
                "max_steps": table.shape[0],
            },
            vl,
            lambda own: own.replace("embedding", "video_frame_position_embedding.weight"),
        ),
        AdapterSource(
            {"type": "qformer", "stream": "video", "per": "clip", **clip},
            vl,
            partial(published_qformer, *VIDEO),
        ),
        AdapterSource(
            {"type": "linear", "stream": "video"},
            vl,
            lambda own: own.replace("proj.", "llama_proj."),
        ),
    ]


def _add_sound(converted: Converted, al: Published, imagebind: Published, dims: Dims) -> None:
    """Add the branch of sound."""
    clip = qformer_options(al, *AUDIO, dims, "audio_qformer")
    table = al.tensor("audio_position_embedding.weight")  # (positions, D)
    dims.compare({"max_audio_segments": table.shape[0]})
    files = _imagebind_files(imagebind, dims)
    converted.backbones["audio"] = files
    converted.encoders["audio"] = {
        "type": "imagebind",
        "feature": "pooled",
        "segments": int(dims["segments"]),
        "seconds": min(2.0, files.config.longest_segment),
    }
    al.leave(BUFFERS)
    converted.adapters += [
        AdapterSource(
            {
                "type": "position",
                "stream": "audio",
                "kind": "learned",
                "max_steps": table.shape[0],
            },
            al,
            lambda own: own.replace("embedding", "audio_position_embedding.weight"),
        ),
        AdapterSource(
            {"type": "qformer", "stream": "audio", "per": "clip", **clip},
            al,
            partial(published_qformer, *AUDIO),
        ),
        AdapterSource(
            {"type": "linear", "stream": "audio"},
            al,
            lambda own: own.replace("proj.", "audio_llama_proj."),
        ),
    ]


def _imagebind_files(file: Published, dims: Dims) -> BackboneFiles:
    """Return the audio branch of ImageBind."""
    config = published_config(
        file,
        num_attention_heads=dims["imagebind.audio_heads"],
        patch_stride=dims["imagebind.stride"],
        num_mel_bins=dims["imagebind.mel_bins"],
        frames=dims["imagebind.target_len"],
        layer_norm_eps=dims["imagebind.norm_eps"],
        stem_norm_eps=dims["imagebind.stem_norm_eps"],
    )
    dims.compare(
        {
            "imagebind.out": config.projection_dim,
            "imagebind.audio_dim": config.hidden_size,
            "imagebind.audio_blocks": config.num_hidden_layers,
            "imagebind.kernel": config.patch_size,
        }
    )
    with torch.device("meta"):
        model = ImageBindAudioModel(config)
    state = take_audio(file, model)
    config.dtype = state["projection.weight"].dtype
    return BackboneFiles(config, state, {"sampling_rate": 16_000, "mean": -4.268, "std": 9.138})


def _replay_sight(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Compute the arrays of frames ``(B, 3, T, H, W)``."""
    units = pixels.transpose(1, 2).flatten(0, 1)  # (B * T, 3, H, W)
    encoder = model.encoders["video"]
    bare = encoder.backbone(
        pixel_values=units.to(encoder.backbone.dtype), output_hidden_states=True
    )
    stream = stream_of_units("pixel_values", units, len(pixels), encoder.tokens())
    features = model.encode_media({"video": stream})
    after_frame = model.connector[0](features)["video"]
    return {
        "vit": bare.hidden_states[-1],
        "ln_vision": features["video"].x.flatten(0, 1),
        "frame_queries": after_frame.x.flatten(0, 1),
        "video_tokens": model.connect(features)["video"].x.flatten(1, 2),
    }


def _replay_sound(model: Any, mel: Tensor) -> dict[str, Tensor]:
    """Compute the arrays of segments ``(B, S, 1, mels, frames)``."""
    units = mel.flatten(0, 1)
    backbone = model.encoders["audio"].backbone
    bare = backbone(units.to(backbone.dtype))
    stream = stream_of_units("mel", units, len(mel), 1)
    features = model.encode_media({"audio": stream})
    return {
        "imagebind_trunk_cls": bare.last_hidden_state[:, 0].unflatten(0, mel.shape[:2]),
        "imagebind_embedding": features["audio"].x.flatten(1, 2),
        "audio_tokens": model.connect(features)["audio"].x.flatten(1, 2),
    }
