"""Import SALMONN: its window-level Q-Former and its LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from avllm.encoders._beats_model import BeatsModel
from avllm.encoders.beats import BEATs
from avllm.errors import UserError
from avllm.models.importing._bert_qformer import BUFFERS, published_qformer, qformer_options
from avllm.models.importing._replay import features_of_clips
from avllm.models.importing.base import AdapterSource, BackboneFiles, Converted, Dims, Importer
from avllm.published import Published

SPEECH = ("speech_Qformer.bert.", "speech_query_tokens")
"""Beginning of the Q-Former's names, and the name of its queries."""

STEP = 0.02  # seconds of a step of Whisper's
WINDOW = 30.0  # seconds that BEATs hears at once, as Whisper does
LORA = re.compile(r"llama_model\..*\.(\w+)\.lora_[AB]\.default\.weight")
NORMS = {"norms.0.": "ln_speech.", "norms.1.": "ln_audio."}


class Salmonn(Importer):
    """Make SALMONN (Tang et al. 2023, arXiv 2310.13289) out of its published file.

    Whisper's and BEATs' tokens are normed and put side by side; a Q-Former reads each window of 17
    steps (0.34 s); a projection follows; the LLM has LoRA. The end of a sound that is no whole
    window is one, too; the original leaves it out.

    Args:
        ckpt: SALMONN's file, ``salmonn_v1.pth``.
        whisper: folder or hub name of Whisper, as transformers saves it.
        beats: ``BEATs_*.pt``; None for a file that was trained without it.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "qformer.heads": 12,
        "qformer.cross_attention_frequency": 1,
        "qformer.hidden_size": None,
        "qformer.layers": None,
        "qformer.intermediate": None,
        "qformer.queries": None,
        "window": 17,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
    }
    inputs = ("speech_features", "sound_features")

    def __init__(self, *, ckpt: str, whisper: str, beats: str | None = None) -> None:
        self.ckpt = Path(ckpt)
        self.whisper = whisper
        self.beats = beats

    @property
    def sources(self) -> list[Path]:
        """Return the files that are read."""
        return [self.ckpt] if self.beats is None else [self.ckpt, Path(self.beats)]

    def convert(self, dims: Dims, allow: Sequence[str]) -> Converted:
        """See :meth:`Importer.convert`.

        Raises:
            UserError: ``beats``: the file was trained with BEATs, which is not given.
        """
        file = Published.read(self.ckpt, allow)
        if "ln_audio.weight" in file and self.beats is None:
            raise UserError(
                f"{self.ckpt} has ln_audio, the norm of what BEATs hears; expected its file, too: "
                "--beats BEATs_iter3_plus_AS2M.pt",
                reason="beats",
            )
        converted = Converted()
        converted.encoders["speech"] = {
            "medium": "audio",
            "type": "whisper",
            "name": self.whisper,
        }
        if self.beats is not None:
            converted.encoders["sounds"] = {"medium": "audio", "type": "beats", "window": WINDOW}
            converted.backbones["sounds"] = _beats_files(self.beats)
        window = {"per": "window", "seconds": round(int(dims["window"]) * STEP, 6)}
        options = qformer_options(file, *SPEECH, dims, "qformer")
        converted.adapters = [
            AdapterSource(
                {"type": "step_concat", "streams": list(converted.encoders)}, file, _published_norm
            ),
            AdapterSource(
                {"type": "qformer", "stream": "speech", **window, **options},
                file,
                partial(published_qformer, *SPEECH),
            ),
            AdapterSource(
                {"type": "linear", "stream": "speech"},
                file,
                lambda own: own.replace("proj.", "speech_llama_proj."),
            ),
        ]
        converted.lora = _lora(file, dims)
        file.leave(BUFFERS)
        converted.model = {
            "layout": {"type": "concat"},
            "media_text": {"audio": "<Speech>{media}</Speech> "},
        }
        return converted

    @classmethod
    def replay(
        cls, model: Any, arrays: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Compute ``speech_tokens (B, N, D)`` of features ``(B, T, D)`` with 50 steps a second."""
        streams = {}
        for stream, name in (("speech", "speech_features"), ("sounds", "sound_features")):
            if name in arrays and stream in model.encoders:
                streams[stream] = features_of_clips(arrays[name].unsqueeze(2), STEP)
        if "speech" not in streams:
            return {}
        return {"speech_tokens": model.connect(streams)["speech"].x.flatten(1, 2)}


def _beats_files(path: str) -> BackboneFiles:
    """Return BEATs in the form of a folder."""
    file = Published.read(path)
    config = BEATs.published_config(file)
    with torch.device("meta"):
        model = BeatsModel(config)
    state = BEATs.take(file, model)
    config.dtype = state["norm.weight"].dtype
    own = {"sampling_rate": 16_000, "mean": 15.41663, "std": 6.55582}
    return BackboneFiles(config, state, own)


def _published_norm(own: str) -> str:
    """Return SALMONN's name of a tensor of adapter ``step_concat``."""
    for ours, theirs in NORMS.items():
        own = own.replace(ours, theirs)
    return own


def _lora(file: Published, dims: Dims) -> AdapterSource | None:
    """Return the LLM's LoRA set, sized by its tensors; None for a file without one."""
    targets: set[str] = set()
    rank = 0
    for name, x in file.tensors.items():
        match = LORA.fullmatch(name)
        if match:
            targets.add(match[1])
            rank = min(x.shape)  # (r, width) and (width, r)
    if not targets:
        return None
    spec = {
        "r": rank,
        "alpha": dims["lora_alpha"],
        "dropout": dims["lora_dropout"],
        "targets": sorted(targets),
    }
    return AdapterSource(spec, file, lambda own: f"llama_model.{own}")
