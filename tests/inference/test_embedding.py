"""Vectors of rows: a forward pass by hand, batch = single, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import row, text, write_rows
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.inference.embedding import FORMS, Pool, embed_file, embed_rows, form_rows
from avllm.inference.journal import JournalError
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[AVLLM, AVProcessor]:
    return AVLLM.from_pretrained(str(checkpoint)), AVProcessor.from_pretrained(checkpoint)


@pytest.fixture
def manifest(clips: list[Path], tmp_path: Path) -> Path:
    """A clip with sound, a silent one, a text alone, a file that is missing, a longer clip."""
    red, blue, green = ({"type": "video", "video": str(clip)} for clip in clips)
    missing = {"type": "video", "video": "no.mp4"}
    rows = [
        row("red", [red], "red and a low sound"),
        row("blue", [blue], "blue"),
        {"id": "words", "messages": [{"role": "user", "content": [text("green and high")]}]},
        row("missing", [missing], "nothing"),
        row("green", [green, text("what colour is it ?")], "green and a high sound ."),
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_vector_is_that_of_a_forward_pass_by_hand(
    pool: Pool, loaded: tuple[AVLLM, AVProcessor], manifest: Path, checkpoint: Path
) -> None:
    model, processor = loaded
    output = manifest.with_name("v.npz")
    embed_file(lambda: loaded, checkpoint, manifest, output, pool, batch_size=8)
    vectors = np.load(output)
    assert vectors["ids"].tolist() == ["red", "blue", "words", "missing", "green"]
    has = {form: (~np.isnan(vectors[form]).any(1)).tolist() for form in FORMS}
    assert has == {
        "text": [True, True, True, False, True],
        "video": [True, True, False, False, True],
        "audio": [True, False, False, False, True],
        "both": [True, False, False, False, True],
    }
    sample = Sample.model_validate_json(manifest.read_text().splitlines()[0])
    clips = processor.load_clips(sample.media, manifest.parent)
    rows = form_rows(processor, sample, [processor.prepare(clip) for clip in clips])
    streams = {"text": set(), "video": {"video"}, "audio": {"audio"}, "both": {"video", "audio"}}
    for form, one in rows.items():
        assert {name for clip in one.clips for name in clip} == streams[form]
        batch = processor.collate([one])
        with torch.no_grad():
            inputs = model.merge_media(batch.input_ids, model.media_tokens(batch))
            states = model.llm.model(inputs_embeds=inputs).last_hidden_state[0]
        expected = states[-1] if pool == "last" else states.mean(0)
        torch.testing.assert_close(torch.from_numpy(vectors[form][0]), expected, atol=1e-5, rtol=0)
    together = embed_rows(model, processor, list(rows.values()), pool)
    for one, vector in zip(rows.values(), together, strict=True):
        alone = embed_rows(model, processor, [one], pool)[0]
        torch.testing.assert_close(vector, alone, atol=1e-5, rtol=0)


def test_a_run_goes_on_and_is_compared(
    loaded: tuple[AVLLM, AVProcessor], manifest: Path, checkpoint: Path
) -> None:
    whole, cut = manifest.with_name("whole.npz"), manifest.with_name("cut.npz")
    embed_file(lambda: loaded, checkpoint, manifest, whole, batch_size=2)
    lines = whole.with_suffix(".jsonl").read_bytes().splitlines(keepends=True)
    embed_file(lambda: loaded, checkpoint, manifest, cut, batch_size=2)
    cut.unlink()
    cut.with_suffix(".jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:30])  # a kill's torn line
    counts = embed_file(lambda: loaded, checkpoint, manifest, cut, batch_size=1)
    assert (counts.before, counts.rows, counts.errors) == (2, 5, 1)
    one, other = np.load(whole), np.load(cut)
    for form in FORMS:
        np.testing.assert_allclose(one[form], other[form], atol=1e-5)
    with pytest.raises(JournalError) as caught:
        embed_file(lambda: loaded, checkpoint, manifest, cut, "mean")
    assert caught.value.reason == "other_run"
    with pytest.raises(UserError) as refused:
        embed_file(lambda: loaded, checkpoint, manifest, manifest.with_name("v.parquet"))
    assert refused.value.reason == "suffix"


def test_the_command(checkpoint: Path, manifest: Path) -> None:
    output = manifest.with_name("v.npz")
    arguments = ["embed", str(checkpoint), str(manifest), "--output", str(output)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "5 rows" in done.output
    errors = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert "no.mp4" in errors[3]["error"]
