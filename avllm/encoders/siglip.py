"""Encode frames with SigLIP, or SigLIP 2 of a fixed resolution (SigLIP to transformers)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import SiglipVisionConfig, SiglipVisionModel

from avllm.encoders._visual import BICUBIC, HALF, VisualBackbone


class SigLIP(VisualBackbone):
    """SigLIP's vision tower (Zhai et al. 2023, arXiv:2303.15343; SigLIP 2: arXiv:2502.14786).

    There is no class token; ``feature="pooled"`` is the output of the attention-pooling head, if
    the config has the head. Arguments: see :class:`~avllm.encoders._visual.VisualBackbone`.
    """

    config_class = SiglipVisionConfig
    model_class = SiglipVisionModel
    tower = "vision_config"
    other_keys = (r"text_model\.", r"logit_(scale|bias)$")
    prefix = 0
    features = ("patch", "pooled")
    defaults: ClassVar[dict[str, Any]] = {
        "resample": BICUBIC,
        "image_mean": HALF,
        "image_std": HALF,
    }

    def check_feature(self) -> None:
        """See :meth:`Backbone.check_feature`; ``pooled`` needs the head."""
        super().check_feature()
        if self.feature == "pooled" and not self.backbone_config.vision_use_head:
            raise ValueError(
                'SigLIP: feature="pooled" needs the pooling head, '
                "but the config has vision_use_head=False"
            )
