"""Train the toy world's language model from scratch: a small Llama that reads, and reasons about, logs of what happens.

    python scripts/toy_world/backbones/llm.py WORLD OUT

Reads the training split of a toy world alone: its captions, its questions, and `script.jsonl`. From the script of each
training clip a log is written: facts about the whole clip, what is where in a coarse grid of the picture, and what is
seen and heard in each quarter of a second. The model learns to caption the log and to answer the clip's questions from
it, "unanswerable" where the stream that is asked about is not in the log. An entry of the log takes one position, the
sum of its words' embeddings, as later one media token stands for a sum, a patch or a quarter of a second. OUT becomes
an ordinary Llama checkpoint with its tokenizer. One thread; a finished OUT is left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from batches import Padded, Sequence, pad, visible
from logs import LOG_WORDS, entries, facts
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from avllm.precision import has_fast_bfloat16, training_attention
from avllm.training.muon import Muon

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# a word with the space before it, a digit, a decimal (so that 1.3 is two tokens), or a mark
PIECES = Regex(r"\.\d|▁?\d|▁?[A-Za-z]+|▁?[^\s\w▁]|▁")
NEEDS = {"seen": "video", "heard": "audio", "both": "both"}
REFUSAL = "unanswerable"
LEARNED = 0.85  # of each kind of question; whether the look-ups form hangs on the seed
WHOLE_EVERY = 6  # steps; between them, facts and places are practised side by side
# The world's words of a sort, and words of that sort for things that the world does not have.
SORTS = (
    (
        ["red", "green", "blue", "yellow", "purple", "white"],
        "orange pink brown grey black gold silver violet cyan navy olive teal".split(),  # noqa: SIM905
    ),
    (
        ["circle", "square", "triangle", "cross", "ring"],
        "star heart moon arrow oval cube cone leaf fish tree house boat".split(),  # noqa: SIM905
    ),
    (["deep", "low", "middle", "high", "shrill"], "soft sharp dull bright flat round thin full hollow".split()),  # noqa: SIM905
)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding in which every word of the texts is one token, and any other text is spelled."""
    core = Tokenizer(models.BPE(byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split(PIECES, "isolated")]
    )
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    printable = [chr(c) for c in range(33, 127)] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=printable, special_tokens=SPECIAL, min_frequency=1, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# ---- examples --------------------------------------------------------------------------------------------------------


@dataclass
class Clip:
    """A training clip as text: its log, its facts by kind, its caption, and its questions with what they ask about."""

    log: dict[str, list[list[str]]]
    facts: dict[str, list[str]]
    caption: str
    questions: dict[tuple[str, str | None], list[tuple[str, str]]]  # by kind and thing asked about: question, answer


def read_clips(world: Path, split: str) -> list[Clip]:
    """Logs, captions and questions of a split, one entry a clip."""
    questions: dict[str, dict[tuple[str, str | None], list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(world / f"{split}.jsonl"):
        question, answer = row["messages"][0]["content"][-1]["text"], row["messages"][1]["content"][0]["text"]
        meta = row["meta"]
        questions[meta["clip"]][(meta["asked"], meta.get("slot"))].append((question, answer))
    captions = {
        row["meta"]["clip"]: row["messages"][1]["content"][0]["text"]
        for row in read_rows(world / f"captions_{split}.jsonl")
    }
    scripts = [s for s in read_rows(world / "script.jsonl") if s["split"] == split]
    return [
        Clip(
            entries(s),
            facts(s),
            captions.get(s["id"], ""),
            questions[s["id"]],
        )
        for s in scripts
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Writer:
    """Clips -> sequences of token ids.

    Args:
        tokenizer: of the LLM.
        most: questions behind one log. captions: share of logs that a caption stands behind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, most: int, captions: float = 0.25) -> None:
        self.tokenizer, self.most, self.captions = tokenizer, most, captions
        self.user, self.assistant, self.end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]

    def write(self, clip: Clip, draw: random.Random, form: str) -> Sequence:
        """A log, now and then without one of its streams, then the caption and some of the questions.

        Args:
            clip: to write about. draw: random numbers.
            form: ``whole``, or ``places``, for the questions on those alone.
        """
        kept = dict(clip.log)
        for stream in ("video", "audio"):
            if stream in kept and draw.random() < 0.07 and form != "places":
                del kept[stream]
                kept.pop("grid" if stream == "video" else stream, None)
        out = self.begin(clip, kept, form)
        if kept == clip.log and form != "places" and draw.random() < self.captions:
            self.add(out, [], self.ids(clip.caption))
        asked = [key for key in clip.questions if form != "places" or key[1]]
        for kind, slot in draw.sample(asked, min(self.most, len(asked))):
            question, answer = draw.choice(clip.questions[(kind, slot)])
            self.add(out, self.ids(question), self.ids(answer if answerable(kind, kept) else REFUSAL))
        return self.rename(out, draw)

    def rename(self, out: Sequence, draw: random.Random) -> Sequence:
        """Deal the names of colours, shapes and pitches out anew, each sort in half of the logs from words of its own.

        Some colours never go with some shapes in training. That is not to be learned: names are read off the log.
        """
        swap: dict[int, int] = {}
        for own, others in SORTS:
            new = draw.sample(others if draw.random() < 0.5 else own, len(own))
            swap |= {self.ids(a)[-1]: self.ids(b)[-1] for a, b in zip(own, new, strict=True)}
        out.bags = [[swap.get(i, i) for i in bag] for bag in out.bags]
        out.labels = [swap.get(i, i) for i in out.labels]
        return out

    def begin(self, clip: Clip, kept: dict[str, list[list[str]]], form: str) -> Sequence:
        """The log alone, of the streams that are kept."""
        words = [fact for kind, fact in clip.facts.items() if answerable(kind, kept)] if form == "whole" else []
        return self.start(words + kept.get("grid", []) + (interleave(kept) if form == "whole" else []))

    def start(self, words: list[list[str]]) -> Sequence:
        """A log of these entries, and nothing said about it yet."""
        bags = [[self.user], *map(self.bag, words)]
        return Sequence(bags, [-100] * len(bags), [0] * len(bags), list(range(len(bags))))

    def mix(self, clips: dict[str, list[Clip]], draw: random.Random) -> Sequence:
        """Facts of many clips, one of each kind, with their questions: the kinds that few clips have come in each log.

        Args:
            clips: those that are asked each kind. draw: random numbers.
        """
        missing = draw.choice([(), (), (), (), (), (), ("audio",), ("video",)])
        kept = dict.fromkeys(s for s in ("video", "audio") if s not in missing)
        about = {kind: draw.choice(others) for kind, others in clips.items()}
        told = [clip.facts[kind] for kind, clip in about.items() if answerable(kind, kept)]
        out = self.start(draw.sample(told, len(told)))
        for kind, clip in draw.sample(sorted(about.items(), key=itemgetter(0)), len(about)):
            question, answer = draw.choice(clip.questions[(kind, None)])
            self.add(out, self.ids(question), self.ids(answer if answerable(kind, kept) else REFUSAL))
        return self.rename(out, draw)

    def bag(self, words: list[str]) -> list[int]:
        """The last token of each word (all are one token)."""
        return [self.ids(word)[-1] for word in words]

    def add(self, out: Sequence, question: list[int], answer: list[int]) -> None:
        """One more text behind the log."""
        ids = [*question, self.assistant, *answer, self.end]
        part, start = out.parts[-1] + 1, out.parts.count(0)
        out.bags += [[i] for i in ids]
        silent = len(question)
        out.labels += [-100] * silent + [*answer, self.end, -100]
        out.parts += [part] * len(ids)
        out.positions += range(start, start + len(ids))


def interleave(log: dict[str, list[list[str]]]) -> list[list[str]]:
    """The entries of all streams in the order of time, those of the picture first."""
    steps = max((len(e) for e in log.values()), default=0)
    return [log[s][i] for i in range(steps) for s in ("video", "audio") if s in log and i < len(log[s])]


def answerable(kind: str, log: Collection[str]) -> bool:
    """Whether the streams that a kind of question asks about are there."""
    if kind.startswith("when"):
        return ("audio" if kind == "when.sound" else "video") in log
    stream = NEEDS[kind.split(".")[0]]
    return {"video", "audio"} <= set(log) if stream == "both" else stream in log


# ---- training --------------------------------------------------------------------------------------------------------


def embed(llm: LlamaForCausalLM, batch: Padded) -> Tensor:
    """``(R, L, D)``: the sum of each position's words."""
    words = F.embedding_bag(batch.words, llm.get_input_embeddings().weight, batch.starts, mode="sum")  # (R * L, D)
    return words.view(*batch.labels.shape, -1)


def loss_of(llm: LlamaForCausalLM, batch: Padded) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the texts, and which labels were the likeliest token ``(n,)``."""
    hidden = llm.model(
        inputs_embeds=embed(llm, batch),
        attention_mask=visible(batch.parts),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    told = batch.labels != -100
    logits, labels = llm.lm_head(hidden[told]).float(), batch.labels[told]
    return F.cross_entropy(logits, labels), logits.argmax(-1) == labels


def build_optimizer(llm: LlamaForCausalLM, lr: float) -> Muon:
    """Muon for the blocks' matrices, which learn much faster by it; AdamW for the rest."""
    matrices = [p for p in llm.model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in llm.parameters() if id(p) not in chosen]
    return Muon(
        [
            {"params": matrices, "matrices": True, "peak": 1.8 * lr, "weight_decay": 0.05},
            {"params": rest, "peak": lr},
        ],
        betas=(0.9, 0.95),
    )


def train(llm: LlamaForCausalLM, writer: Writer, clips: list[Clip], *, steps: int, batch: int, lr: float) -> None:
    """Warm-up and cosine."""
    draw, optimizer = random.Random(0), build_optimizer(llm, lr)
    crowded = [clip for clip in clips if any(slot and len(clip.log) > 1 for _, slot in clip.questions)]
    asked: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        for kind, slot in clip.questions:
            if not slot and kind in clip.facts:
                asked[kind].append(clip)
    for step in track(range(steps), "learning to read"):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min((step + 1) / 40, 0.5 * (1 + math.cos(math.pi * step / steps)))
        if step % WHOLE_EVERY == WHOLE_EVERY - 1:
            groups = [[writer.write(clip, draw, "whole") for clip in draw.sample(clips, batch)]]
        else:  # both in each step: turn by turn, the look-up that forms later often never did
            mixed = [writer.mix(asked, draw) for _ in range(batch)]
            groups = [mixed, [writer.write(clip, draw, "places") for clip in draw.sample(crowded, 5 * batch // 2)]]
        told = [sum(label != -100 for row in rows for label in row.labels) for rows in groups]
        llm.zero_grad()
        for rows, count in zip(groups, told, strict=True):  # apart: logs of places are a quarter as long
            with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16("cpu")):
                loss, _ = loss_of(llm, pad(rows))
            (loss * count / sum(told)).backward()
        nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def score(llm: LlamaForCausalLM, writer: Writer, clips: list[Clip]) -> dict[str, float]:
    """Share of right answers to the questions on logs of a split, by kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    for clip in clips:
        rows = writer.begin(clip, clip.log, "whole")
        ends = []
        asked = [(kind, question, answer) for (kind, _), pairs in clip.questions.items() for question, answer in pairs]
        for _, question, answer in asked:
            writer.add(rows, writer.ids(question), writer.ids(answer))
            ends.append(sum(label != -100 for label in rows.labels))
        hits = loss_of(llm, pad([rows]))[1]
        for (kind, _, answer), (start, end) in zip(asked, pairwise([0, *ends]), strict=True):
            right[REFUSAL if answer == REFUSAL else kind].append(bool(hits[start:end].all()))
    return {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}


def build_llm(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Four layers of width 192: 1.6 million parameters."""
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(
        **sizes, **ends, vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=True,
        initializer_range=0.06, attn_implementation=training_attention("cpu"),
    )  # fmt: skip
    llm = LlamaForCausalLM(config)
    for layer in llm.model.layers:  # at the start each token looks for its like and copies it (Trockman & Kolter 2023)
        heads = layer.self_attn
        heads.q_proj.weight.data.mul_(2**0.5)
        heads.k_proj.weight.data.copy_(heads.q_proj.weight.data)
        heads.o_proj.weight.data.copy_(heads.v_proj.weight.data.T)
    return llm


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path, help="folder that scripts/toy_world/make.py wrote")
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=380)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--questions", type=int, default=10, help="behind one log")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--attempts", type=int, default=3, help="with the next seed, while a kind is not learned")
    args = parser.parse_args()
    if args.out.is_dir():
        print(f"{args.out} is there already; delete it to train it again")
        return
    torch.set_num_threads(1)
    clips = read_clips(args.world, "train")
    texts = [
        " ".join(LOG_WORDS + [word for _, others in SORTS for word in others]),
        *(c.caption for c in clips),
        *(t for c in clips for pairs in c.questions.values() for pair in pairs for t in pair),
    ]
    tokenizer = build_tokenizer(texts)
    writer, shown = Writer(tokenizer, args.questions), read_clips(args.world, "validation")
    best: tuple[float, LlamaForCausalLM] | None = None
    for seed in range(args.seed, args.seed + args.attempts):
        torch.manual_seed(seed)
        llm = build_llm(tokenizer)
        train(llm, writer, clips, steps=args.steps, batch=args.batch, lr=args.lr)
        figures = score(llm.eval(), writer, shown)
        print(f"seed {seed}, answers on validation logs: " + ", ".join(f"{k} {v:.0%}" for k, v in figures.items()))
        best = max(best or (-1.0, llm), (min(figures.values()), llm), key=itemgetter(0))
        if best[0] >= LEARNED:
            break
        print(f"seed {seed} has not learned every kind of question ({LEARNED:.0%} each is enough)")
    assert best is not None
    llm = best[1]
    folder = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    folder.rename(args.out)


if __name__ == "__main__":
    main()
