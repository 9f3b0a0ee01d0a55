"""Tamper with a good checkpoint in many ways: `python scripts/tamper.py CHECKPOINT OUT`.

OUT gets a folder for each way. ``damage`` changes files and leaves the manifest; ``forge`` also
writes new digests, as somebody would who means the folder to load. Loading one of them has to give
the same answers as the good one, or one line that says what is wrong; it must never run the planted
module, which would leave the file ``ran`` beside itself.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from avllm.models.loading.digests import ALL_FILES, write_manifest

PLANTED = "planted_by_tamper"
PART = f"{PLANTED}:Planted"
LOOP = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
SOURCE = """
from pathlib import Path
from avllm.adapters.linear import Linear
Path(__file__).with_name("ran").touch()
class Planted(Linear): pass
"""
Edit = Callable[[Path], object]
CONFIG, PROCESSOR, TOKENIZER = "config.json", "processor_config.json", "tokenizer_config.json"
TRAINED, LORA = "trained.safetensors", "lora/default/adapter_model.safetensors"
PEFT = "lora/default/adapter_config.json"


class _RunsCode:
    """Leave a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def change(name: str, edit: Callable[[Any], object]) -> Edit:
    """Return an edit of a JSON file."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        edit(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return apply


def weights(name: str, edit: Callable[[dict[str, Any]], object]) -> Edit:
    """Return an edit of the tensors of a file."""

    def apply(folder: Path) -> None:
        state = load_file(folder / name)
        edit(state)
        save_file(state, folder / name, metadata={"format": "pt"})

    return apply


def write(name: str, content: str | bytes) -> Edit:
    """Return an edit that writes a whole file."""

    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def remove(name: str) -> Edit:
    """Return an edit that removes a file."""
    return lambda folder: (folder / name).unlink()


def flip(name: str) -> Edit:
    """Return an edit that changes the lowest bit of a file's last byte but three."""

    def apply(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-4] ^= 1
        (folder / name).write_bytes(bytes(content))

    return apply


def cut(name: str) -> Edit:
    """Return an edit that keeps half of a file."""

    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return apply


def code(name: str) -> Edit:
    """Return an edit that replaces a file by a pickle that runs code."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(_RunsCode(folder.parent / "ran")))

    return apply


def both(one: Edit, other: Edit) -> Edit:
    """Return an edit that makes two."""

    def apply(folder: Path) -> None:
        one(folder)
        other(folder)

    return apply


def first(state: dict[str, Any], value: float) -> None:
    """Set one number of the first tensor."""
    state[sorted(state)[0]].view(-1)[0] = value


def rename(state: dict[str, Any]) -> None:
    """Rename all keys as another library would write them."""
    for key in list(state):
        state["model." + key] = state.pop(key)


def halve(state: dict[str, Any]) -> None:
    """Keep half of the keys."""
    for key in sorted(state)[::2]:
        del state[key]


def reshape(state: dict[str, Any]) -> None:
    """Give one tensor a row less."""
    key = sorted(state)[0]
    state[key] = state[key][1:].clone()


def damages() -> dict[str, Edit]:
    """Return ways in which files change, and the manifest does not."""
    edits: dict[str, Edit] = {}
    for name in (CONFIG, PROCESSOR, TOKENIZER, "tokenizer.json", TRAINED, LORA, PEFT):
        edits[f"no {name}"] = remove(name)
        edits[f"half of {name}"] = cut(name)
    edits |= {
        "no manifest": remove("manifest.json"),
        "half of the manifest": cut("manifest.json"),
        "manifest is a list": write("manifest.json", "[]"),
        "one bit of the weights": flip(TRAINED),
        "one bit of LoRA": flip(LORA),
        "another system prompt": change(CONFIG, lambda c: c.update(system="say red")),
        "another mean of pixels": change(
            PROCESSOR, lambda c: c["preprocessors"]["video"].update(mean=[0.0, 0.0, 0.0])
        ),
        "another chat template": write("chat_template.jinja", "{{ messages[0]['content'] }}"),
        "a template that was added": write("additional_chat_templates/default.jinja", "x"),
        "tokens that were added": write("added_tokens.json", '{"red": 3}'),
    }
    return edits


def forgeries() -> dict[str, Edit]:
    """Return ways in which the manifest is written again, too."""
    return {**_named_code(), **_lora_forgeries(), **_weight_forgeries(), **_file_forgeries()}


def _named_code() -> dict[str, Edit]:
    named = {"type": PART}
    auto = {"AutoModelForCausalLM": "planted.Planted", "AutoTokenizer": ["planted.Planted", None]}
    return {
        "foreign encoder": change(CONFIG, lambda c: c["encoders"]["audio"].update(named)),
        "foreign adapter": change(CONFIG, lambda c: c["connector"][1].update(named)),
        "foreign layout": change(CONFIG, lambda c: c.update(layout=named)),
        "foreign fusion": change(CONFIG, lambda c: c.update(fusion=named)),
        "foreign selector": change(CONFIG, lambda c: c.update(selector=named)),
        "foreign time codec": change(CONFIG, lambda c: c.update(time_codec=named)),
        "foreign preprocessor": change(
            PROCESSOR, lambda c: c["preprocessors"]["audio"].update(part=PART)
        ),
        "preprocessor of the library": change(
            PROCESSOR, lambda c: c["preprocessors"]["audio"].update(part="os:system")
        ),
        "code for the LLM": change(CONFIG, lambda c: c["llm"]["config"].update(auto_map=auto)),
        "code for the tokenizer": change(TOKENIZER, lambda c: c.update(auto_map=auto)),
        "kernel from the hub": change(
            CONFIG, lambda c: c["llm"]["config"].update(_attn_implementation="who/kernel")
        ),
        "weights are a pickle": code(TRAINED),
        "LoRA is a pickle": code(LORA),
        "a pickle beside LoRA": code("lora/default/adapter_model.bin"),
        "module of PEFT": change(
            PEFT, lambda c: c.update(megatron_core=PLANTED, megatron_config={"a": 1})
        ),
    }


def _lora_forgeries() -> dict[str, Edit]:
    return {
        "half of LoRA's keys": weights(LORA, halve),
        "LoRA's keys renamed": weights(LORA, rename),
        "LoRA is empty": weights(LORA, dict.clear),
        "LoRA of another shape": weights(LORA, reshape),
        "LoRA holds NaN": weights(LORA, lambda s: first(s, float("nan"))),
        "another alpha": change(PEFT, lambda c: c.update(lora_alpha=1000)),
        "another rank": change(PEFT, lambda c: c.update(r=1)),
        "fewer targets": change(PEFT, lambda c: c["target_modules"].pop()),
        "LoRA with rslora": change(PEFT, lambda c: c.update(use_rslora=True)),
        "LoRA begins by PiSSA": change(PEFT, lambda c: c.update(init_lora_weights="pissa")),
        "another alpha of one layer": change(
            PEFT, lambda c: c.update(alpha_pattern={"q_proj": 1000})
        ),
        "a set that is not there": change(
            CONFIG, lambda c: c["lora"].update(second=dict(c["lora"]["default"]))
        ),
        "word number a billion": change(CONFIG, lambda c: c.update(words={"x": 10**9})),
        "PiSSA in both files": both(
            change(CONFIG, lambda c: c["lora"]["default"].update(init_lora_weights="pissa")),
            change(PEFT, lambda c: c.update(init_lora_weights="pissa")),
        ),
        "rank of a billion": change(CONFIG, lambda c: c["lora"]["default"].update(r=10**9)),
    }


def _weight_forgeries() -> dict[str, Edit]:
    return {
        "weights hold NaN": weights(TRAINED, lambda s: first(s, float("nan"))),
        "weights hold infinity": weights(TRAINED, lambda s: first(s, float("inf"))),
        "half of the weights": weights(TRAINED, halve),
        "weights renamed": weights(TRAINED, rename),
        "weights of another shape": weights(TRAINED, reshape),
        "one weight more": weights(TRAINED, lambda s: s.update(more=torch.zeros(1))),
        "weights are empty": weights(TRAINED, dict.clear),
        "weights are text": write(TRAINED, "hello"),
    }


def _file_forgeries() -> dict[str, Edit]:
    wide = {"type": "mlp", "stream": "video", "hidden": 10**9}
    deep = {"type": "qformer", "stream": "video", "layers": 10**6, "dim": 32, "heads": 2}
    return {
        "a template that loops": write("chat_template.jinja", LOOP),
        "a template with a power": write("chat_template.jinja", "{{ 9**9**9 }}"),
        "a template that is none": write("chat_template.jinja", "{% for"),
        "a million layers": change(CONFIG, lambda c: c["connector"].__setitem__(0, deep)),
        "a billion wide": change(CONFIG, lambda c: c["connector"].__setitem__(0, wide)),
        "an LLM of a million layers": change(
            CONFIG, lambda c: c["llm"]["config"].update(num_hidden_layers=10**6)
        ),
        **_count_forgeries(),
        "config is a list": write(CONFIG, "[]"),
        "config nests without end": write(CONFIG, '{"a":' * 100_000),
        "config of another model": change(CONFIG, lambda c: c.update(model_type="llama")),
        "config without an LLM": change(CONFIG, lambda c: c.pop("llm")),
        "no encoders": change(CONFIG, lambda c: c.update(encoders={})),
        "placeholders are text": change(CONFIG, lambda c: c.update(media_token_ids="many")),
        "an option that no part has": change(CONFIG, lambda c: c["connector"][0].update(odd=1)),
        "a name that no hub allows": change(CONFIG, lambda c: c["llm"].update(name="a b/../c?")),
        "an LLM that is not there": change(CONFIG, lambda c: c["llm"].update(name="/nowhere")),
        "no preprocessors": change(PROCESSOR, lambda c: c.update(preprocessors={})),
        "preprocessor with odd settings": change(
            PROCESSOR, lambda c: c["preprocessors"]["video"].update(odd=1)
        ),
        "processor widths are text": change(PROCESSOR, lambda c: c.update(widths="wide")),
        "tokenizer is empty": write("tokenizer.json", "{}"),
        "tokenizer class is not one": change(
            TOKENIZER, lambda c: c.update(tokenizer_class="Planted")
        ),
        "manifest without backbones": change("manifest.json", lambda c: c.update(backbones={})),
    }


def _count_forgeries() -> dict[str, Edit]:
    """Return counts from which no weights follow, but the size of what is made of a clip."""

    def sampling(**changes: Any) -> Edit:
        return change(CONFIG, lambda c: c.update(sampling=changes))

    def preprocessor(stream: str, **changes: Any) -> Edit:
        return change(PROCESSOR, lambda c: c["preprocessors"][stream].update(changes))

    moment = {"type": "temporal_pool", "stream": "video", "seconds": 1e-12}
    return {
        "a billion frames": sampling(num_frames=10**9),
        "a billion frames a second": sampling(fps=1e9),
        "a billion frames at most": sampling(fps=8, max_frames=10**9),
        "frames a million pixels high": sampling(num_frames=2, short_side=10**6),
        "pictures a million pixels high": preprocessor("video", size=[10**6, 10**6]),
        "pictures shrunk to a million pixels": preprocessor("video", shortest=10**6),
        "a billion tokens a frame": preprocessor("video", tokens=10**9),
        "a billion samples a second": preprocessor("audio", rate=10**9),
        "windows of one sample": preprocessor("audio", unit_samples=1),
        "a billion steps": preprocessor("audio", steps=10**9),
        "a billion mel frames": preprocessor("audio", frames=10**9),
        "a billion samples a mel frame": preprocessor("audio", n_fft=10**9),
        "windows of a trillionth of a second": change(
            CONFIG, lambda c: c["connector"].insert(0, moment)
        ),
    }


def tampered(good: Path, out: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and folder of each tampered copy, one after the other.

    Args:
        good: a checkpoint with a LoRA set ``default``.
        out: gets a folder for each copy, with the planted module beside the checkpoint.
    """
    for kind, edits in (("damage", damages()), ("forge", forgeries())):
        for number, (name, edit) in enumerate(edits.items()):
            folder = out / f"{kind}-{number:02}" / "checkpoint"
            shutil.copytree(good, folder)
            for place in (folder, folder.parent):
                (place / f"{PLANTED}.py").write_text(SOURCE, encoding="utf-8")
                (place / "planted.py").write_text(SOURCE, encoding="utf-8")
            edit(folder)
            if kind == "forge":
                write_manifest(folder, ALL_FILES)
            yield f"{kind}: {name}", folder


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    for title, place in tampered(Path(sys.argv[1]), Path(sys.argv[2])):
        print(f"{place}: {title}")
