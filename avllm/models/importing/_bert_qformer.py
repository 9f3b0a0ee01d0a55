"""Name and size the Q-Formers that LAVIS writes, which BLIP-2, Video-LLaMA and SALMONN share."""

from __future__ import annotations

import re
from typing import Any

from avllm.models.importing.base import Dims
from avllm.published import Published

BUFFERS = (
    r".*\.embeddings\.position_ids",
    r".*\.rotary_emb\.inv_freq",
    r"audio_encoder\.modality_preprocessors\.text\.mask",
    r"audio_encoder\.modality_postprocessors\.\w+\.1\.log_logit_scale",
)
"""Constants that the original computes itself. Its files hold them beside what was trained."""


def published_qformer(prefix: str, queries: str, own: str) -> str:
    """Return LAVIS' name of a tensor of adapter ``qformer``.

    Args:
        prefix: of the layers, ``Qformer.bert.``.
        queries: name of the learned queries.
        own: the adapter's name.
    """
    if own == "query_tokens":
        return queries
    name = own.removeprefix("qformer.")
    name = re.sub(r"^layernorm\.", "embeddings.LayerNorm.", name)
    name = re.sub(r"\.(attention|crossattention)\.attention\.", r".\1.self.", name)
    return prefix + name


def qformer_options(file: Published, prefix: str, queries: str, dims: Dims, section: str) -> Any:
    """Read the options of adapter ``qformer`` off the tensors of a Q-Former.

    Args:
        file: the published file.
        prefix: of the layers, ``Qformer.bert.``.
        queries: name of the learned queries, ``(1, Q, D)``.
        dims: has ``heads`` and ``cross_attention_frequency`` of the section.
        section: of ``dims``.

    Raises:
        PublishedError: there is no such Q-Former.
        UserError: ``dims`` gives another size than the tensors have.
    """
    _, count, width = file.tensor(queries).shape
    layers = file.blocks(re.escape(prefix) + r"encoder\.layer\.(\d+)\.")
    hidden = file.tensor(prefix + "encoder.layer.0.intermediate_query.dense.weight").shape[0]
    read = {"queries": count, "hidden_size": width, "layers": layers, "intermediate": hidden}
    dims.compare({f"{section}.{name}": size for name, size in read.items()})
    return {
        "num_queries": count,
        "dim": width,
        "layers": layers,
        "intermediate": hidden,
        "heads": dims[f"{section}.heads"],
        "cross_every": dims[f"{section}.cross_attention_frequency"],
    }
