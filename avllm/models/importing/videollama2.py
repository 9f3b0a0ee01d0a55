"""Import VideoLLaMA2's connector, ``mm_projector.bin``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoConfig

from avllm.errors import UserError, loading
from avllm.models.importing._replay import features_of_clips
from avllm.models.importing.base import AdapterSource, Converted, Dims, Importer
from avllm.published import Published

PROJECTOR = r"^(.*\.)?mm_projector\."
STAGES = {"before": "s1", "after": "s2"}
LAYERS = {
    "first": "conv1.conv",
    "norm1": "conv1.bn",
    "second": "conv2.conv",
    "norm2": "conv2.bn",
    "squeeze": "se.fc1",
    "excite": "se.fc2",
    "third": "conv3.conv",
    "norm3": "conv3.bn",
    "shortcut.0": "downsample.conv",
    "shortcut.1": "downsample.bn",
}
"""Our names of a RegNet stage and of a block's layers, and timm's, which VideoLLaMA2 uses."""

ENCODERS = {"clip": "clip", "siglip": "siglip"}
"""Our encoders by the beginning of transformers' model type."""


class VideoLlama2(Importer):
    """Make VideoLLaMA2 (Cheng et al. 2024, arXiv 2406.07476) out of its connector's weights.

    Frames: CLIP's or SigLIP's patches of the last block but one, the STC connector.

    Args:
        projector: ``mm_projector.bin``, which its authors publish beside the LLM's weights.
        vision: folder or hub name of the vision tower, as transformers saves it.

    Raises:
        ValueError: the vision tower is of another family.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "padding": 1,
        "frames": 8,
        "select_layer": -2,
        "depth": None,
        "hidden_size": None,
        "mm_hidden_size": None,
        "mlp_depth": None,
    }
    inputs = ("frame_features",)

    def __init__(self, *, projector: str, vision: str) -> None:
        self.projector = Path(projector)
        self.vision = vision
        with loading("the vision tower's config", vision):
            config = AutoConfig.from_pretrained(vision, trust_remote_code=False)
        families = [own for name, own in ENCODERS.items() if config.model_type.startswith(name)]
        if not families:
            raise ValueError(
                f"the vision tower {vision!r} is a {config.model_type}; expected CLIP or SigLIP, "
                "which VideoLLaMA2 sees with"
            )
        self.encoder = families[0]

    @property
    def sources(self) -> list[Path]:
        """Return the files that are read."""
        return [self.projector]

    def convert(self, dims: Dims, allow: Sequence[str]) -> Converted:
        """See :meth:`Importer.convert`."""
        file = _without_prefix(Published.read(self.projector, allow), allow)
        converted = Converted()
        converted.encoders["video"] = {
            "type": self.encoder,
            "name": self.vision,
            "layers": [int(dims["select_layer"])],
            "feature": "patch",
        }
        spec = {"type": "stc", "stream": "video", **_options(file, dims)}
        converted.adapters.append(AdapterSource(spec, file, published_name))
        converted.model = {
            "layout": {"type": "concat"},
            "sampling": {"num_frames": int(dims["frames"])},
            "media_text": {"video": "{media}\n", "image": "{media}\n"},
        }
        return converted

    @classmethod
    def replay(
        cls, model: Any, arrays: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Compute ``video_tokens (B, N, D)`` of ``frame_features (B, T, P, D)``."""
        if "frame_features" not in arrays:
            return {}
        tokens = features_of_clips(arrays["frame_features"])
        return {"video_tokens": model.connect({"video": tokens})["video"].x.flatten(1, 2)}


def _without_prefix(file: Published, allow: Sequence[str]) -> Published:
    """Return the projector's tensors without what comes before their names.

    Raises:
        UserError: there are none.
    """
    tensors = {re.sub(PROJECTOR, "", name): x for name, x in file.tensors.items()}
    if "readout.0.weight" not in tensors:
        raise UserError(
            f"{file.path} has no mm_projector.readout.0.weight; expected VideoLLaMA2's "
            "mm_projector.bin with an STC connector",
            reason="weights",
        )
    return Published(file.path, tensors, allow)


def _options(file: Published, dims: Dims) -> dict[str, Any]:
    """Read the options of adapter ``stc`` off the tensors.

    Raises:
        UserError: ``dims`` gives another size than the tensors have.
    """
    depth = file.blocks(r"s1\.b(\d+)\.") - 1  # blocks are counted from 1
    hidden, seen = file.tensor("s1.b1.conv1.conv.weight").shape[:2]
    joint = file.tensor("sampler.0.weight")  # (hidden, hidden, time, space, space)
    # (hidden, channels of a group, 3, 3): one channel a group in the released weights
    group = file.tensor("s1.b1.conv2.conv.weight").shape[1]
    mlp = len([name for name in file.tensors if re.fullmatch(r"readout\.\d+\.weight", name)])
    read = {"depth": depth, "hidden_size": hidden, "mm_hidden_size": seen, "mlp_depth": mlp}
    dims.compare(read)
    return {
        "time": joint.shape[2],
        "space": joint.shape[3],
        "padding": int(dims["padding"]),
        "hidden": hidden,
        "depth": depth,
        "group": group,
        "mlp": mlp,
    }


def published_name(own: str) -> str:
    """Return VideoLLaMA2's name of a tensor of adapter ``stc``."""
    if own.startswith("joint."):
        return own.replace("joint.", "sampler.0.")
    block = re.fullmatch(r"(before|after)\.(\d+)\.(.+)\.(weight|bias)", own)
    if block is None:
        return own
    stage, number, layer, kind = block.groups()
    return f"{STAGES[stage]}.b{int(number) + 1}.{LAYERS[layer]}.{kind}"
