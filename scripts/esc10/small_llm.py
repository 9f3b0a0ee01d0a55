"""Train a small Llama and its tokenizer from scratch, on the text of manifests alone.

    python scripts/esc10/small_llm.py OUT --captions captions_train.jsonl --questions train.jsonl

For data sets and machines on which no released language model is wanted. It reads each question
with the caption of the same file in the place of the media, so that it learns to answer from what
comes before the question; then captions and questions alone. Give it training manifests
only.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from avllm.data.manifest import read_manifest
from avllm.data.schema import Sample
from avllm.models.rows.chat_text import DEFAULT_TEMPLATE
from avllm.models.rows.rendered import MARK

SPECIAL = ["<pad>", "<s>", "</s>"]
IGNORE = -100


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of the texts: their words are one token, any text can be spelled."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, chat_template=DEFAULT_TEMPLATE)


class Chat(NamedTuple):
    """The text in the place of the media, the question after it, and the answer."""

    before: str
    asked: str
    answer: str


def chats(captions: list[Sample], questions: list[Sample]) -> list[Chat]:
    """Return conversations in text alone.

    They are questions after the caption of the same media, questions alone, and captions alone.
    """
    captions_of_media: dict[str, list[str]] = {}
    for sample in captions:
        captions_of_media.setdefault(media_of(sample), []).append(sample.answer or "")
    conversations = [Chat("", "", sample.answer or "") for sample in captions]
    for sample in questions:
        asked = sample.messages[-2].text
        texts = ["", *captions_of_media.get(media_of(sample), [])]
        conversations += [Chat(before, asked, sample.answer or "") for before in texts]
    return list(dict.fromkeys(conversations))


def media_of(sample: Sample) -> str:
    """Return a text that is equal for rows about the same files."""
    return " ".join(part.path for part in sample.media)


def pieces(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> list[str]:
    """Return the chat as text, cut as by the processor: around media and before the answer."""
    question = {"role": "user", "content": MARK + chat.asked}
    answer = {"role": "assistant", "content": chat.answer}
    prompt = str(
        tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    )
    whole = str(tokenizer.apply_chat_template([question, answer], tokenize=False))
    head, tail = prompt.split(MARK)
    return [p for p in (head, chat.before, tail, whole[len(prompt) :]) if p]


def token_rows(tokenizer: PreTrainedTokenizerFast, conversations: list[Chat]) -> Tensor:
    """Return ids ``(rows, L)``, padded with -100."""
    rows = []
    for conversation in conversations:
        ids = tokenizer(pieces(tokenizer, conversation), add_special_tokens=False)["input_ids"]
        rows.append(torch.tensor([i for piece in ids for i in piece]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield row numbers, drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(0, count, (size,), generator=generator)


def train(
    llm: LlamaForCausalLM, rows: Tensor, steps: int, batch_size: int, lr: float, seed: int
) -> float:
    """Next-token training on all tokens; returns the last loss."""
    optimizer = torch.optim.AdamW(llm.parameters(), lr=lr, weight_decay=0.01)
    bar = tqdm(
        batches(len(rows), batch_size, steps, seed),
        total=steps,
        desc="llm",
        unit="step",
        disable=None,
    )
    loss = torch.zeros(())
    for step, chosen in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
        labels = rows[chosen]
        real = labels != IGNORE
        loss = llm(
            input_ids=labels.masked_fill(~real, 0), attention_mask=real.long(), labels=labels
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return loss.item()


def make_llm(args: argparse.Namespace) -> dict[str, float]:
    """Tokenizer and model, trained and saved; returns what is worth knowing of them."""
    torch.manual_seed(args.seed)
    conversations = chats(read_manifest(args.captions), read_manifest(args.questions))
    texts = [text for chat in conversations for text in chat if text]
    tokenizer = make_tokenizer([*texts, "USER: ", "ASSISTANT: "], args.vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.dim,
        intermediate_size=3 * args.dim,
        num_hidden_layers=args.layers,
        num_attention_heads=args.dim // 32,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    llm = LlamaForCausalLM(config)
    rows = token_rows(tokenizer, conversations)
    loss = train(llm, rows, args.steps, args.batch_size, args.lr, args.seed)
    llm.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    return {
        "texts": len(conversations),
        "vocabulary": len(tokenizer),
        "parameters": llm.num_parameters(),
        "loss": loss,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the model and the tokenizer")
    parser.add_argument(
        "--captions", type=Path, required=True, help="training manifest of captions"
    )
    parser.add_argument(
        "--questions", type=Path, required=True, help="training manifest of questions and answers"
    )
    parser.add_argument(
        "--dim", type=int, default=128, help="width, a multiple of 32 (default 128)"
    )
    parser.add_argument("--layers", type=int, default=2, help="default 2")
    parser.add_argument("--vocabulary", type=int, default=1024, help="most tokens (default 1024)")
    parser.add_argument("--steps", type=int, default=300, help="default 300")
    parser.add_argument("--batch-size", type=int, default=32, help="default 32")
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="largest learning rate (default 3e-3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make the model and print one JSON object about it."""
    print(json.dumps(make_llm(parse(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
