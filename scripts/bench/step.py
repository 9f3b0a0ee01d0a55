"""Measure a stage-3 step (connector + LoRA, features given) against the bare LLM + LoRA.

    python scripts/bench/step.py [--json] [--tiny] [--pairs 7] [--threads 2]

Both take the same sequence lengths, targets and optimizer, and turn by turn in one process, so that
whatever else the machine does meets both. `ratio` compares with the bare LLM under the same loss
(its head on targets only); `ratio_hf` with the loss that transformers itself computes (its head on
every token).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avllm.config_peft import LoraConfig
from avllm.data.collate import Batch, collate
from avllm.data.row import IGNORE, Row
from avllm.evaluation.environment import environment
from avllm.log import hush_libraries
from avllm.models.configuration_avllm import AVConfig
from avllm.models.modeling_avllm import AVLLM
from avllm.objectives.next_token import next_token_loss, targets
from avllm.tokens import EncoderInput
from avllm.training.task import Task

FULL = {
    "hidden": 768,
    "layers": 12,
    "heads": 12,
    "vocab": 32_000,
    "text": 216,
    "frames": 16,
    "side": 14,
    "seconds": 10,
}
TINY = {
    "hidden": 32,
    "layers": 2,
    "heads": 2,
    "vocab": 64,
    "text": 12,
    "frames": 2,
    "side": 4,
    "seconds": 1,
}
TARGETS = 24  # tokens of an answer
BAR = 1.10


def build(size: dict[str, int]) -> AVLLM:
    """Return a Llama with LoRA and a connector of features as of SigLIP and Whisper.

    They are pooled to 4 tokens a frame and 2 a second, and projected.
    """
    hidden = size["hidden"]
    llm = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3,
        "vocab_size": size["vocab"],
    }
    llm |= {"num_hidden_layers": size["layers"], "num_attention_heads": size["heads"]}
    one_layer = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": hidden}
    eye = {
        "model_type": "siglip_vision_model",
        "hidden_size": hidden,
        **one_layer,
        "image_size": 8,
        "patch_size": 8,
    }
    ear = {
        "model_type": "whisper",
        "d_model": hidden,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
    }
    ear |= {
        "encoder_ffn_dim": hidden,
        "decoder_layers": 1,
        "decoder_ffn_dim": 8,
        "decoder_attention_heads": 2,
    }
    config = AVConfig(
        llm={"config": llm},
        encoders={
            "video": {"type": "siglip", "config": eye, "options": {}},
            "audio": {"type": "whisper", "config": ear, "options": {}},
        },
        connector=[
            {"type": "spatial_pool", "stream": "video", "factor": size["side"] // 2},
            {"type": "temporal_pool", "stream": "audio", "seconds": 0.5},
            {"type": "position", "stream": "video"},
            {"type": "position", "stream": "audio"},
            {"type": "mlp", "stream": "video"},
            {"type": "mlp", "stream": "audio"},
        ],
        layout={"type": "interleave"},
        media_token_ids={"video": size["vocab"], "audio": size["vocab"] + 1},
    )
    return AVLLM(config).freeze().add_lora(LoraConfig(r=16)).train()


def features(size: dict[str, int]) -> dict[str, EncoderInput]:
    """Return features of a clip: patches of each frame, 50 steps of sound a second."""
    inputs = {}
    for name, steps, tokens in (
        ("video", size["frames"], size["side"] ** 2),
        ("audio", 50 * size["seconds"], 1),
    ):
        edges = torch.linspace(0, size["seconds"], steps + 1)
        mask = torch.ones(steps, tokens, dtype=torch.bool)
        x = torch.randn(steps, tokens, size["hidden"])
        inputs[name] = EncoderInput({}, torch.stack([edges[:-1], edges[1:]], 1), mask, {"": x})
    return inputs


def make_row(model: AVLLM, size: dict[str, int], number: int) -> Row:
    """Return a clip, a question and an answer."""
    from avllm.registry import build as build_part

    clip = features(size)
    grids = model.connector.output_grid({name: item.grid for name, item in clip.items()})
    order = build_part("layouts", model.config.layout).order(grids)
    media = torch.tensor([model.config.media_token_ids[name] for name in order])
    words = torch.randint(
        3, size["vocab"], (size["text"] - 3 * (number % 2),)
    )  # rows of two lengths: some padding
    ids = torch.cat([media, words])
    labels = torch.full_like(ids, IGNORE)
    labels[-min(TARGETS, len(words) // 2) :] = ids[-min(TARGETS, len(words) // 2) :]
    return Row(str(number), ids, labels, [clip], ids >= size["vocab"])


def steps(model: AVLLM, batch: Batch) -> dict[str, Callable[[], Tensor]]:
    """Return the losses of the three contestants; the bare ones get embeddings for nothing."""
    task = Task(model, [{"type": "next_token"}])
    embeds = torch.randn(*batch.input_ids.shape, model.llm.get_input_embeddings().embedding_dim)
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": batch.attention_mask.long(),
        "use_cache": False,
    }
    places, ids = targets(batch.labels)

    def ours() -> Tensor:
        losses, _ = task(batch)
        return losses["next_token"] / batch.num_targets

    def bare() -> Tensor:
        hidden = model.llm.get_decoder()(**inputs).last_hidden_state
        return next_token_loss(model.llm.get_output_embeddings()(hidden[places]), ids)[0] / len(ids)

    def bare_hf() -> Tensor:
        return model.llm(**inputs, labels=batch.labels).loss

    return {"ours": ours, "bare": bare, "bare_hf": bare_hf}


def timed(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> float:
    """Return seconds of forward, backward and update."""
    began = time.perf_counter()
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def measure(size: dict[str, int], batch_size: int, pairs: int) -> dict[str, Any]:
    """Return medians in milliseconds and the median ratios of turns taken side by side."""
    torch.manual_seed(0)
    model = build(size)
    batch = collate([make_row(model, size, i) for i in range(batch_size)], pad_id=0)
    lora = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    connector = list(model.connector.parameters())
    contestants = steps(model, batch)
    optimizers = {
        name: torch.optim.AdamW([*lora, *connector] if name == "ours" else lora, lr=1e-5)
        for name in contestants
    }
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(pairs + 1):
        for name, loss in contestants.items():
            seconds = timed(loss, optimizers[name])
            if turn:  # the first turn warms up
                taken[name].append(seconds)

    def ratio(other: str) -> float:
        return statistics.median(a / b for a, b in zip(taken["ours"], taken[other], strict=True))

    return {
        "ratio": round(ratio("bare"), 4),
        "ratio_hf": round(ratio("bare_hf"), 4),
        "bar": BAR,
        "milliseconds": {name: round(1000 * statistics.median(t), 2) for name, t in taken.items()},
        "pairs": pairs,
        "batch": batch_size,
        "length": batch.input_ids.shape[1],
        "media_tokens": int((batch.input_ids[0] >= size["vocab"]).sum()),
        "parameters": {
            "llm": sum(p.numel() for p in model.llm.parameters()),
            "lora": sum(p.numel() for p in lora),
            "connector": sum(p.numel() for p in connector),
        },
    }


def main() -> None:
    """Measure, with the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of a few thousand weights, to see that it runs"
    )
    parser.add_argument("--pairs", type=int, default=7, help="turns of each contestant")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--threads", type=int, default=None, help="of torch; as it finds them when not given"
    )
    arguments = parser.parse_args()
    hush_libraries()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    figures = measure(TINY if arguments.tiny else FULL, arguments.batch_size, arguments.pairs)
    took = figures["milliseconds"]
    print(
        f"stage-3 step {took['ours']} ms, bare LLM + LoRA {took['bare']} ms: "
        f"{figures['ratio']}x (bar {BAR}x)"
    )
    print(f"against transformers' own loss ({took['bare_hf']} ms): {figures['ratio_hf']}x")
    if arguments.json:
        print(json.dumps({**figures, "environment": environment()}))


if __name__ == "__main__":
    main()
