"""Tokenizers of bytes with the chat templates' forms of today's LLMs, written for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# A last answer follows (empty) thoughts, earlier answers lose theirs, the generation prompt writes
# empty thoughts only where thinking is switched off: Qwen3's form.
EMPTY_THOUGHTS = """
{%- set last = namespace(user=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- else %}
    {%- set thoughts, text = '', m.content %}
    {%- if '</think>' in m.content %}
      {%- set thoughts = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
      {%- set text = m.content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > last.user %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}
    {{- text + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
# The generation prompt opens the thoughts, finished answers have lost theirs: DeepSeek-R1's form.
OPENED_THOUGHTS = """
{{- '<|bos|>' }}
{%- for m in messages %}
  {%- if m.role == 'user' %}{{ '<|User|>' + m.content }}
  {%- elif m.role == 'system' %}{{ m.content }}
  {%- else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}
{%- if thinking is defined %}{% endif %}"""
# The generation prompt opens the thoughts, and answers are written with theirs: Qwen3-Thinking's.
ALWAYS_THOUGHTS = EMPTY_THOUGHTS.replace(
    "{{ '<|im_start|>assistant\n' }}\n  {%- if enable",
    "{{ '<|im_start|>assistant\n<think>\n' }}\n  {%- if enable",
)
# The day stands in the system turn: Llama 3's form.
DATED = """
{%- if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|bos|>Today: ' + day + '\n' }}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SPECIAL = ["<pad>", "<|bos|>", "<|im_end|>", "<|im_start|>"]
ADDED = [
    "<think>",
    "</think>",
    "<|User|>",
    "<|Assistant|>",
]  # not special, as in Qwen3 and DeepSeek


def make_byte_tokenizer(folder: Path, template: str) -> Any:
    """Write a tokenizer in which each byte is a token, with a chat template."""
    letters = {
        letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    core = Tokenizer(models.BPE(letters, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokens = {"pad_token": "<pad>", "bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in ADDED])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_byte_llm(folder: Path, template: str) -> Path:
    """Write a tiny Llama with random weights and such a tokenizer."""
    tokenizer = make_byte_tokenizer(folder, template)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ends = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends, initializer_range=0.6)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
