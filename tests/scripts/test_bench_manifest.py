"""The bench of large manifests runs; the figures themselves are no test."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from avllm.data.manifest import read_manifest, write_manifest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "manifest.py"


def test_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVLLM_CACHE", str(tmp_path / "cache"))
    bench = runpy.run_path(str(SCRIPT))
    manifest = tmp_path / "rows.jsonl"
    write_manifest(manifest, map(bench["caption_row"], range(3000)))
    assert len({row.media[0] for row in read_manifest(manifest)}) == 1000
    figures = bench["start"](manifest, workers=0)
    assert 0 < figures["index_s"] <= figures["first_batch_s"]
    assert figures["most_mib"] >= 0
