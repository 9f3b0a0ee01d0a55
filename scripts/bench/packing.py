"""Measure what it saves that unrelated rows share sequences, and that losses stay the same.

    python scripts/bench/packing.py [--json] [--tiny | --full] [--rows 32] [--length 2048]

Rows of 20 to 600 tokens, a third of them with the tokens of a clip, go through a connector and a
Llama with LoRA, each as a separate row (padded to the longest) and packed; forward and backward,
turn by turn in one process. One core takes a minute or two. The wider the model, the smaller the
share of attention, which packing makes longer: `--full` (twelve layers, 768 wide) takes one core a
quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from avllm.config_peft import LoraConfig
from avllm.data.collate import Batch, collate
from avllm.data.packing import fill_sequences
from avllm.data.row import IGNORE, Row
from avllm.evaluation.environment import environment
from avllm.log import hush_libraries
from avllm.models.attention import check_packing
from avllm.models.configuration_avllm import AVConfig
from avllm.models.modeling_avllm import AVLLM
from avllm.objectives.next_token import NextToken
from avllm.tokens import EncoderInput

FULL = {"hidden": 768, "layers": 12, "heads": 12, "vocab": 32_000}
USUAL = {"hidden": 512, "layers": 2, "heads": 8, "vocab": 8_000}
TINY = {"hidden": 32, "layers": 2, "heads": 2, "vocab": 64}
SHORTEST = 20  # tokens
LONGEST = 600  # tokens
CLIP = 16  # tokens
WIDTH = 64  # of features
PADDING_BAR = 0.03
SAME = 1e-5  # largest difference of losses and gradients


def build(size: dict[str, int], attention: str) -> AVLLM:
    """Return a projection of the features of one stream, and a Llama with LoRA."""
    shape = {"num_attention_heads": 2, "intermediate_size": WIDTH, "num_hidden_layers": 1}
    eye = {
        "model_type": "siglip_vision_model",
        "hidden_size": WIDTH,
        "image_size": 8,
        "patch_size": 8,
        **shape,
    }
    llm = {"model_type": "llama", "hidden_size": size["hidden"], "vocab_size": size["vocab"]}
    llm |= {"intermediate_size": 8 * size["hidden"] // 3, "attn_implementation": attention}
    llm |= {"num_hidden_layers": size["layers"], "num_attention_heads": size["heads"]}
    config = AVConfig(
        llm={"config": llm},
        encoders={"video": {"type": "siglip", "config": eye, "options": {}}},
        connector=[{"type": "mlp", "stream": "video"}],
        layout={"type": "concat"},
        media_token_ids={"video": size["vocab"]},
    )
    model = AVLLM(config).freeze().add_lora(LoraConfig(r=8)).freeze()
    for name, p in model.named_parameters():
        if "lora_B" in name:  # else the gradient of every lora_A would be zero
            torch.nn.init.normal_(p, std=0.02)
    return model.train()


def make_rows(count: int, vocab: int) -> list[Row]:
    """Return rows of lengths drawn evenly; every third has a clip.

    The last third of each is trained on.
    """
    rows = []
    for number, length in enumerate(torch.randint(SHORTEST, LONGEST + 1, (count,)).tolist()):
        ids = torch.randint(3, vocab, (length,))
        clips = []
        if number % 3 == 0:
            ids[2 : 2 + CLIP] = vocab
            mask = torch.ones(CLIP, 1, dtype=torch.bool)
            clips = [
                {
                    "video": EncoderInput(
                        {}, torch.zeros(CLIP, 2), mask, {"": torch.randn(CLIP, 1, WIDTH)}
                    )
                }
            ]
        labels = torch.where((torch.arange(length) >= 2 * length // 3) & (ids < vocab), ids, IGNORE)
        rows.append(Row(str(number), ids, labels, clips, ids >= vocab))
    return rows


def step(
    model: AVLLM, objective: NextToken, batch: Batch
) -> tuple[float, dict[str, Tensor], float]:
    """Return mean loss, gradients of all that trains, and seconds of forward and backward."""
    model.zero_grad()
    began = time.perf_counter()
    loss, _ = objective(model, batch)
    (loss / batch.num_targets).backward()
    seconds = time.perf_counter() - began
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return (
        float(loss.detach()) / batch.num_targets,
        {n: g.clone() for n, g in grads.items()},
        seconds,
    )


def padding_of(batch: Batch) -> float:
    """Return share of the batch's places without a token."""
    return 1 - float(batch.attention_mask.float().mean())


def typical_padding(count: int, length: int, draws: int = 200) -> dict[str, float]:
    """Return mean and worst padding of packed micro batches, over draws of their lengths.

    Args:
        count: rows of a micro batch.
        length: longest sequence.
        draws: of lengths.
    """
    paddings = []
    for _ in range(draws):
        rows = make_rows(count, 64)
        filled = [len(r.input_ids) for r in fill_sequences(rows, length)]
        paddings.append(1 - sum(filled) / (max(filled) * len(filled)))
    return {
        "mean": round(statistics.mean(paddings), 5),
        "worst": round(max(paddings), 5),
        "draws": draws,
    }


def measure(
    size: dict[str, int], count: int, length: int, turns: int, attention: str
) -> dict[str, Any]:
    """Return padding, tokens a second and the largest differences of loss and gradients."""
    torch.manual_seed(0)
    model = build(size, attention)
    check_packing(model)
    objective = NextToken(model)
    rows = make_rows(count, size["vocab"])
    batches = {
        "unpacked": collate(rows, pad_id=0),
        "packed": collate(fill_sequences(rows, length), pad_id=0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    made: dict[str, tuple[float, dict[str, Tensor]]] = {}
    step(model, objective, collate(rows[:4], pad_id=0))  # warms up
    for _ in range(turns):
        for name, batch in batches.items():
            loss, grads, taken = step(model, objective, batch)
            made[name] = loss, grads
            seconds[name].append(taken)
    loss, grads = made["unpacked"]
    packed_loss, packed_grads = made["packed"]
    tokens = sum(len(row.input_ids) for row in rows)
    ratios = [u / p for u, p in zip(seconds["unpacked"], seconds["packed"], strict=True)]
    return {
        "padding": {name: round(padding_of(batch), 5) for name, batch in batches.items()},
        "padding_bar": PADDING_BAR,
        "padding_over_draws": typical_padding(count, length),
        "tokens_per_s": {
            name: round(tokens / statistics.median(t), 1) for name, t in seconds.items()
        },
        "faster": round(statistics.median(ratios), 3),
        "loss_difference": abs(loss - packed_loss),
        "gradient_difference": max(float((grads[n] - packed_grads[n]).abs().max()) for n in grads),
        "largest_gradient": max(float(g.abs().max()) for g in grads.values()),
        "difference_bar": SAME,
        "model": size,
        "rows": count,
        "tokens": tokens,
        "shapes": {name: list(batch.input_ids.shape) for name, batch in batches.items()},
        "attention": attention,
        "turns": turns,
    }


def main() -> None:
    """Measure, with the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--tiny", action="store_true", help="a model of a few thousand weights, to see that it runs"
    )
    sizes.add_argument("--full", action="store_true", help="a model of a hundred million weights")
    parser.add_argument("--rows", type=int, default=32, help="of a micro batch")
    parser.add_argument("--length", type=int, default=2048, help="longest sequence that rows share")
    parser.add_argument("--turns", type=int, default=2, help="of each contestant")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument(
        "--threads", type=int, default=None, help="of torch; as it finds them when not given"
    )
    arguments = parser.parse_args()
    hush_libraries()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    size = USUAL
    if arguments.tiny:
        size = TINY
    elif arguments.full:
        size = FULL
    figures = measure(size, arguments.rows, arguments.length, arguments.turns, arguments.attention)
    padding = figures["padding"]
    speed = figures["tokens_per_s"]
    bar = f"bar {PADDING_BAR:.0%}"
    print(f"padding {padding['packed']:.2%} packed ({bar}), {padding['unpacked']:.2%} unpacked")
    speeds = f"{speed['packed']:,.0f} tokens/s packed, {speed['unpacked']:,.0f} unpacked"
    print(f"{speeds}: {figures['faster']} times")
    loss = figures["loss_difference"]
    gradient = figures["gradient_difference"]
    print(f"differences: loss {loss:.1e}, gradient {gradient:.1e} (bar {SAME})")
    if arguments.json:
        print(json.dumps({**figures, "environment": environment()}))


if __name__ == "__main__":
    main()
