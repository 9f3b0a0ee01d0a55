"""Options under which each adapter is tested.

A new one is tested with its defaults on ``video``; one that needs more gets a row here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from avllm.registry import choices

QFORMER = {"num_queries": 3, "dim": 8, "layers": 2, "heads": 2, "cross_every": 1}
CASES: dict[str, list[dict[str, Any]]] = {
    "anchor_position": [{}, {"width": 3, "height": 2, "neighbours": True}],
    "causal_qformer": [
        {"seconds": 0.6, "causal_dim": 8, "causal_heads": 2} | QFORMER,
    ],
    "clue_aggregator": [
        {"streams": ["video", "audio"], "num_queries": 3, "dim": 8, "layers": 1, "heads": 2}
    ],
    "dynamic_prompt": [{"num_tokens": 3, "seconds": 0.5, "dim": 8, "layers": 2, "heads": 2}],
    "layer_aggregator": [
        {"layers": ["video.4"], "heads": 2},
        {"layers": ["video.4"], "heads": 2, "per": "frame"},
        {"heads": 3},
    ],
    "perceiver": [
        {"num_queries": 3, "layers": 2, "heads": 2},
        {"num_queries": 2, "layers": 1, "heads": 2, "dim": 8, "per": "frame"},
        {"num_queries": 2, "layers": 1, "heads": 3, "per": "window", "seconds": 0.5},
    ],
    "pool_mlp": [
        {"rates": [2, 3]},
        {"rates": [2], "mode": "stack"},
        {"rates": [2], "shared": False, "dim": 5, "hidden": 7},
    ],
    "region_packer": [
        {"time": 3, "heads": 2},
        {"space": 2, "heads": 2},
        {"time": 2, "space": 2, "heads": 3},
    ],
    "shared_space_projector": [
        {"stream": "audio", "like": "video", "hidden": 5},
        {"stream": "audio", "like": "video", "mode": "raw"},
        {"stream": "audio", "like": "video", "normalize": True},
    ],
    "slowfast_tokens": [{"frames": 2, "pool": 2}, {"pool": 1}],
    "stc": [
        {"group": 2, "depth": 1, "hidden": 4, "dim": 5},
        {"group": 2, "depth": 2, "padding": 1, "mlp": 1},
        {"group": 3, "depth": 1, "time": 3, "space": 1},
    ],
    "substitute": [{"by": "video.4"}, {"by": "video.4", "keep": 2}],
    "temporal_encoder": [
        {"kind": "pool", "num_tokens": 4},
        {"kind": "transformer", "num_tokens": 4, "heads": 2},
        {"kind": "st_attn_pool", "num_tokens": 5},
        {"kind": "ttm", "num_tokens": 5, "memory": 6, "read": 3, "heads": 2},
    ],
    "token_marks": [{}, {"n": 3, "steps": "first"}],
    "token_merge": [{"most": 5}, {"most": 9, "alike": 0.3}],
    "train_as": [
        {"by": "video.4"},
        {"by": "video.4", "seconds": 0.5, "over": True, "instead": True},
    ],
    "universal_projection": [
        {"streams": ["video", "video.4"], "dim": 8, "layers": 1, "heads": 2},
        {"streams": ["video", "video.4"], "per": "frame", "heads": 2, "modality_token": False},
    ],
    "branch": [{"to": "video.copy"}, {"to": ["video.a", "video.b"]}],
    "join": [{"first": "video.4"}],
    "linear": [{"dim": 5}, {"norm": True}],
    "mlp": [{"depth": 1}, {"depth": 3, "hidden": 7, "norm": True}],
    "position": [
        {"kind": "seconds"},
        {"kind": "learned", "max_steps": 16},
        {"kind": "learned", "max_steps": 3},
    ],
    "qformer": [
        {"per": "frame"} | QFORMER,
        {"per": "clip"} | QFORMER,
        {"per": "window", "seconds": 0.5} | QFORMER,
        {"per": "frame", "instruction": "llm"} | QFORMER,
        {"per": "clip", "instruction": "llm"} | QFORMER,
        {"per": "window", "seconds": 0.5, "context": 1.2} | QFORMER,
        {"per": "clip", "layers": 3, "cross_every": 2}
        | {k: v for k, v in QFORMER.items() if k not in ("layers", "cross_every")},
    ],
    "sync_concat": [
        {"streams": ["video", "audio"], "seconds": 0.5},
        {"streams": ["video", "audio"], "seconds": 0.5, "tokens": "keep"},
        {"streams": ["video", "audio"], "seconds": 0.5, "tokens": "keep", "absent": "zeros"},
        {"streams": ["video", "audio"], "seconds": 0.5, "consume": True},
    ],
    "step_concat": [
        {"streams": ["video", "audio"]},
        {"streams": ["audio", "video"], "norm": False},
        {"streams": ["video"]},
    ],
    "temporal_pool": [
        {"seconds": 0.5},
        {"tokens": "mean"},
        {"seconds": 0.7, "tokens": "mean"},
        {},
        {"seconds": 0.7, "reduce": "max"},
    ],
}


SQUARE = {
    "region_packer",
    "slowfast_tokens",
    "spatial_pool",
    "stc",
    "temporal_encoder",
}  # these take square grids of tokens only: all test clips have four a step


def cases() -> list[tuple[str, dict[str, Any]]]:
    """(adapter, options) of everything that the registry lists."""
    found = [(name, options) for name in choices("adapters") for options in CASES.get(name, [{}])]
    return [
        (name, options if "streams" in options else {"stream": "video", **options})
        for name, options in found
    ]


def _last_words(options: dict[str, Any]) -> list[str]:
    """Name the feed-forwards of the last layer, whose outputs for an instruction are dropped."""
    if "instruction" not in options:
        return []
    last = options["layers"] - 1
    return [rf"layer\.{last}\.(intermediate|output)\."]


def _never_absent(options: dict[str, Any]) -> list[str]:
    """In all test clips both streams have the same steps, so that no token lacks its neighbour."""
    return ["absent"] if options.get("tokens") == "keep" else []


LEFT_OUT: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "qformer": _last_words,
    "sync_concat": _never_absent,
}
"""By adapter, a function of its options: patterns of the parameters that a mode does not use."""


def dead_parameters(adapter: nn.Module, left_out: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return parameters that should have a gradient and have none, and those of the contrary.

    A bias of the keys moves all scores of a query alike: its gradient is zero in any softmax
    attention.
    """
    reached = {
        n: p.grad is not None and bool(p.grad.any())
        for n, p in adapter.named_parameters()
        if p.requires_grad
    }
    unused = {name for name in reached if any(re.search(pattern, name) for pattern in left_out)}
    keys = {name for name in reached if name.endswith(("key.bias", "k_proj.bias"))}
    dead = [name for name, has in reached.items() if not has and name not in unused | keys]
    return dead, [name for name in sorted(unused) if reached[name]]


def case_name(value: Any) -> str:
    """A test id: the adapter's name, or its options."""
    if isinstance(value, dict):
        return (
            "-".join(f"{k}={v}" for k, v in value.items() if k != "stream" and k not in QFORMER)
            or "defaults"
        )
    return str(value)
