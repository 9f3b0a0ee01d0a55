"""Test recipes that make data: true boundaries in their files, the same bytes from any engine."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making_deadly import Deadly
from making_fixtures import (
    COLOURS,
    RATE,
    captioned_row,
    colour_changes,
    heard_between,
    read_lines,
    recipe_module,
    tone,
    write_clip,
    write_lines,
)

from avllm.data.manifest import read_manifest
from avllm.data.media.load import load_audio, probe
from avllm.data.media.write import faster, fitted, write_wav
from avllm.data.schema import resolve
from avllm.data.store.append_only import AppendOnly
from avllm.recipes import frame as recipe
from avllm.recipes import making
from avllm.recipes.captioned import clause, licences, sentence

ROOT = Path(__file__).resolve().parents[2]
HERTZ = {"v0": 700.0, "v1": 1300.0, "v2": 1900.0, "v3": 2500.0, "v4": 3100.0, "v5": 3700.0}
PU: dict[str, Any] = {
    "shortest": 0.8,
    "longest": 1.6,
    "most": 3,
    "fps": 10,
    "width": 48,
    "height": 32,
    "shard_size": 1,
    "rate": 32_000,
}
SOUND: dict[str, Any] = {"rate": RATE, "snr": "0,6,12", "times": 2, "shard_size": 2}
PLACES = ["beach", "barn", "kitchen", "forest"]


def made(name: str, source: Path, output: Path, **options: Any) -> recipe.RecipeReport:
    module = recipe_module(name)
    return recipe.make(module.ABOUT, module.rows, source, output, name=name, **options)


def hashes(output: Path) -> dict[str, str]:
    """Return the hashes of a run's files, without those that say how and where it was done."""
    how = {"recipe.json", "run.json", "tasks.jsonl"}
    files = sorted(p for p in output.rglob("*") if p.is_file() and p.name not in how)
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write six clips of a colour and a tone each, and clips and rows that cannot be used."""
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for number, (name, hertz) in enumerate(HERTZ.items()):
        colour = list(COLOURS)[number % len(COLOURS)]
        write_clip(folder / f"{name}.mp4", colour, hertz, 2.0)
        rows.append(
            captioned_row(
                name, "video", f"{name}.mp4", f"A {colour} wall hums at {hertz:.0f} hertz."
            )
        )
    write_clip(folder / "mute.mp4", "red", None, 2.0)
    write_clip(folder / "brief.mp4", "red", 500.0, 0.5)
    (folder / "broken.mp4").write_bytes((folder / "v0.mp4").read_bytes()[:900])
    rows += [
        captioned_row(name, "video", f"{name}.mp4", f"Something {name}.", "CC BY")
        for name in ("mute", "brief", "broken")
    ]
    rows.append(captioned_row("sound", "audio", "v0.mp4", "Only sound."))
    rows.append(captioned_row("empty", "video", "v0.mp4", " "))
    write_lines(folder / "train.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def untrimmed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pu")
    made("pu_valor", videos, output, **PU)
    return output


def test_boundaries_of_untrimmed_videos_are_found_again_in_the_files(
    untrimmed: Path, videos: Path
) -> None:
    colour_of = {name: list(COLOURS)[i % len(COLOURS)] for i, name in enumerate(HERTZ)} | {
        "mute": "red"
    }
    dense = [s for s in read_manifest(untrimmed / "train.jsonl") if s.kind == "dense_caption"]
    assert len(dense) >= 2
    heard = 0
    for sample in dense:
        path, events = resolve(sample.media[0], untrimmed), sample.meta["events"]
        assert [a["end"] for a in events[:-1]] == [b["start"] for b in events[1:]]
        assert probe(path).duration == pytest.approx(events[-1]["end"], abs=0.05)
        expected = [(e["start"], colour_of[e["clip"]]) for e in events]
        changes = [
            pair for i, pair in enumerate(expected) if i == 0 or pair[1] != expected[i - 1][1]
        ]
        seen = colour_changes(path, fps=40)
        assert [c for _, c in seen] == [c for _, c in changes]
        assert [t for t, _ in seen] == pytest.approx([t for t, _ in changes], abs=0.1)  # one frame
        for event in (e for e in events if e["sound"]):
            start, end = heard_between(path, HERTZ[event["clip"]])
            assert (start, end) == pytest.approx((event["start"], event["end"]), abs=0.02)
            heard += 1
    assert heard >= 4
    assert {e["speed"] != 1 for s in dense for e in s.meta["events"]} == {True}


def test_rows_of_an_untrimmed_video_say_the_same_as_its_events(untrimmed: Path) -> None:
    samples = read_manifest(untrimmed / "train.jsonl")
    by_id = {sample.id: sample for sample in samples}
    for dense in (s for s in samples if s.kind == "dense_caption"):
        events = dense.meta["events"]
        captions = [e["caption"] for e in events]
        assert len(set(captions)) == len(captions)
        lines = (dense.answer or "").split("\n")
        assert lines == [
            f"From {e['start']:.1f} to {e['end']:.1f} seconds: {e['caption']}" for e in events
        ]
        for number, event in enumerate(events):
            when = by_id[dense.id.replace("dense", f"when-{number}")]
            what = by_id[dense.id.replace("dense", f"what-{number}")]
            span = f"rom {event['start']:.1f} to {event['end']:.1f} seconds"
            assert when.answer == f"F{span}."
            assert event["caption"][1:-1] in when.messages[0].text
            assert what.answer == event["caption"]
            assert f"f{span}" in what.messages[0].text
            assert when.media == what.media == dense.media
    assert {s.licence for s in samples} <= {"CC0", "CC BY; CC0"}


def test_clips_that_cannot_be_used_are_named_with_their_reasons(untrimmed: Path) -> None:
    dropped = {
        d["where"]: d["reason"]
        for d in read_lines(untrimmed / "dropped.jsonl")
        if d["where"].startswith("train")
    }
    broken = dropped.pop("train.jsonl:9")
    assert broken in ("truncated", "undecodable", "no_video")
    assert dropped == {
        "train.jsonl:8": "too_short",
        "train.jsonl:10": "no_video",
        "train.jsonl:11": "no_caption",
    }
    used = {
        e["clip"]
        for s in read_manifest(untrimmed / "train.jsonl")
        for e in s.meta.get("events", [])
    }
    assert used == {*HERTZ, "mute"}


def test_similar_captions_share_a_cluster_and_equal_ones_share_no_video() -> None:
    module = recipe_module("pu_valor")
    captions = [f"a dog barks {w}" for w in PLACES] + [
        f"rain falls, water drips {w}" for w in PLACES
    ]
    labels = module.clusters(captions, 4, seed=0)
    assert len(set(labels[:4])) == len(set(labels[4:])) == 1
    assert labels[0] != labels[4]
    given = module.clusters(["x"] * 4, 2, 0, np.asarray([[0.0], [0.1], [9.0], [9.1]]))
    assert (given[0] == given[1], given[0] == given[2]) == (True, False)


def test_no_untrimmed_video_has_fewer_clips_than_asked_for(videos: Path, tmp_path: Path) -> None:
    module = recipe_module("pu_valor")
    rows = [
        captioned_row(n, "video", str(videos / f"{n}.mp4"), f"Scene {n}.") for n in list(HERTZ)[:5]
    ]
    manifest = write_lines(tmp_path / "train.jsonl", rows)

    def job(embeddings: Path | None = None) -> Any:
        return module.PuValor(
            manifest, 0, 50, (3, 3), (0.8, 1.6), (0.8, 1.25), 10, (48, 32), RATE,
            embeddings, "train"
        )  # fmt: skip

    planned = list(job().plan())
    (task,) = [item for item in planned if isinstance(item, dict)]
    assert len(task["clips"]) == 3
    left = [item for item in planned if isinstance(item, recipe.Drop)]
    assert [drop.reason for drop in left] == ["too_few_alike"] * 2
    assert {drop.detail for drop in left} | {clip["id"] for clip in task["clips"]} == set(
        list(HERTZ)[:5]
    )
    task["clips"][0]["path"] = str(tmp_path / "gone.mp4")
    shard = making.Shard(0, 0, 1, tmp_path)
    shard.folder.mkdir(parents=True)
    assert [item.reason for item in job().make([task], shard)] == ["missing_media", "too_few_clips"]
    assert not list(shard.folder.iterdir())
    np.save(tmp_path / "four.npy", np.zeros((4, 2)))
    with pytest.raises(recipe.RecipeError, match=r"four\.npy.*\(4, 2\)") as caught:
        list(job(tmp_path / "four.npy").plan())
    assert caught.value.reason == "bad_embeddings"


def test_the_seed_decides_and_neither_workers_nor_a_kill_change_a_byte(
    untrimmed: Path, videos: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    made("pu_valor", videos, other, **PU, seed=1)
    assert hashes(other) != hashes(untrimmed)
    killed = tmp_path / "killed"
    made("pu_valor", videos, killed, **PU)
    whole = sorted((killed / "shards").iterdir())
    for shard in whole[1:]:  # as a kill leaves it: some shards, a half one, no manifest
        shard.rename(shard.with_name(shard.name + ".partial"))
        (shard.with_name(shard.name + ".partial") / "items.jsonl").write_text("{half")
    (killed / "train.jsonl").unlink()
    stamp = (whole[0] / "items.jsonl").stat().st_mtime_ns
    made("pu_valor", videos, killed, **PU)
    assert hashes(killed) == hashes(untrimmed)
    assert (whole[0] / "items.jsonl").stat().st_mtime_ns == stamp
    with pytest.raises(recipe.RecipeError, match="fps") as caught:
        made("pu_valor", videos, killed, **{**PU, "fps": 5})
    assert caught.value.reason == "other_settings"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write tones with silence around them, and name a silent file and a missing one."""
    folder = tmp_path_factory.mktemp("sounds")
    rows = []
    for number in range(6):
        x = np.concatenate(
            [
                np.zeros(3000 * number),
                tone(600.0 + 400 * number, 0.5 + 0.2 * number),
                np.zeros(5000),
            ]
        )
        write_wav(folder / f"{number}.wav", x.astype(np.float32), RATE)
        rows.append(
            captioned_row(
                f"s{number}", "audio", f"{number}.wav", f"A tone of {600 + 400 * number} hertz."
            )
        )
    write_wav(folder / "still.wav", np.zeros(RATE, np.float32), RATE)
    rows += [captioned_row(n, "audio", f"{n}.wav", f"A {n} file.") for n in ("still", "gone")]
    write_lines(folder / "train.jsonl", rows)
    return folder


def pitch(event: dict[str, Any]) -> float:
    return 600.0 + 400 * int(event["clip"].removeprefix("s"))


@pytest.fixture(scope="module")
def composed(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("composed")
    made("compose_audio", sounds, output, **SOUND)
    return output


def test_boundaries_of_composed_sounds_are_found_again_in_the_files(composed: Path) -> None:
    captions = [
        s for s in read_manifest(composed / "train.jsonl") if str(s.kind).endswith(".caption")
    ]
    assert {s.kind for s in captions} == {"concat.caption", "overlay.caption"}
    for sample in captions:
        for event in sample.meta["events"]:
            times = heard_between(resolve(sample.media[0], composed), pitch(event))
            assert times == pytest.approx((event["start"], event["end"]), abs=0.02)


def test_an_overlay_has_the_ratio_that_is_stated(composed: Path) -> None:
    samples = [s for s in read_manifest(composed / "train.jsonl") if s.kind == "overlay.caption"]
    assert len({s.meta["snr"] for s in samples}) > 1
    for sample in samples:
        front, back = sample.meta["events"]
        path = resolve(sample.media[0], composed)
        sound = load_audio(path, rate=RATE, start=front["start"], end=front["end"]).sound
        assert sound is not None
        x = sound.x.numpy()[200:-200]
        power = [
            abs(np.mean(x * np.exp(-2j * np.pi * pitch(e) * np.arange(len(x)) / RATE))) ** 2
            for e in (front, back)
        ]
        assert 10 * np.log10(power[0] / power[1]) == pytest.approx(sample.meta["snr"], abs=0.5)
        assert back["start"] <= front["start"] < front["end"] <= back["end"]


def test_captions_say_the_order_and_negatives_say_another(composed: Path) -> None:
    samples = {s.id: s for s in read_manifest(composed / "train.jsonl")}
    module = recipe_module("compose_audio")
    for sample in (s for s in samples.values() if str(s.kind).endswith(".caption")):
        first, second = (e["caption"].lower().rstrip(".") for e in sample.meta["events"])
        wrong = sample.meta["negatives"]
        assert first in sample.answer.lower()
        assert second in sample.answer.lower()
        assert sample.answer not in wrong
        assert len(set(wrong)) == len(wrong) == 3
        templates = module.FORWARD if sample.kind == "concat.caption" else module.IN_FRONT
        fitting = {t.format(first, second).lower() + "." for t in templates}
        assert sample.answer.lower() in fitting
        assert not fitting & {w.lower() for w in wrong}
        choice = samples[sample.id.replace("-caption", "-choice")]
        assert sorted(choice.choices or []) == sorted([sample.answer, *wrong])
        assert choice.answer == sample.answer
        onset = samples.get(sample.id.replace("-caption", "-onset"))
        assert (onset is None) == (sample.kind == "overlay.caption")
        if onset is not None:
            assert onset.seconds == sample.meta["events"][1]["start"] == float(onset.answer or "")


def test_clips_that_find_no_partner_are_named(tmp_path: Path) -> None:
    module = recipe_module("compose_audio")
    said = ["A dog barks.", "a dog barks", "A DOG barks.", "Rain falls.", "a Dog barks!"]
    rows = [captioned_row(f"s{n}", "audio", f"{n}.wav", caption) for n, caption in enumerate(said)]
    manifest = write_lines(tmp_path / "train.jsonl", rows)
    job = module.ComposeAudio(manifest, 0, 2, (0.3, 5.0), 0.5, (0.0,), -40.0, RATE, "train")
    planned = list(job.plan())
    tasks = [item for item in planned if isinstance(item, dict)]
    alone = [item for item in planned if isinstance(item, recipe.Drop)]
    assert [len(tasks), len(alone)] == [2, 6]
    assert {task["other"] for task in tasks} == {""}
    for turn, task in enumerate(tasks, start=1):
        left = {drop.detail.split(",")[0] for drop in alone if drop.detail.endswith(f"turn {turn}")}
        assert left | {clip["id"] for clip in task["clips"]} == {f"s{n}" for n in range(5)}
    assert len(module.audible(tone(500.0, 0.5), RATE, 0.0)) > 0


def test_both_orders_are_the_same_events_turned_round(composed: Path) -> None:
    samples = {s.id: s for s in read_manifest(composed / "train.jsonl")}
    for name in {s.meta["pair"] for s in samples.values() if "pair" in s.meta}:
        one, two = (samples[f"{name}-{tag}-caption"].meta["events"] for tag in ("ab", "ba"))
        assert [e["clip"] for e in one] == [e["clip"] for e in two][::-1]
        lengths = [e["end"] - e["start"] for e in one]
        assert lengths == pytest.approx([e["end"] - e["start"] for e in two][::-1])
        assert all(0 <= events[1]["start"] - events[0]["end"] < 0.6 for events in (one, two))


def test_sounds_that_cannot_be_used_are_named(composed: Path) -> None:
    reasons = {(d["where"], d["reason"]) for d in read_lines(composed / "dropped.jsonl")}
    assert {r for w, r in reasons if w == "train.jsonl:7"} == {"silent"}
    assert {r for w, r in reasons if w == "train.jsonl:8"} == {"missing_media"}


def test_workers_of_other_processes_write_the_same_sounds(
    sounds: Path, composed: Path, tmp_path: Path
) -> None:
    made("compose_audio", sounds, tmp_path / "two", **SOUND, workers=2)
    assert hashes(tmp_path / "two") == hashes(composed)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'avllm[ray]'"
)
def test_ray_gives_the_same_rows_and_bytes(
    sounds: Path,
    composed: Path,
    videos: Path,
    untrimmed: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Start Ray once: a whole run, a run that continues another engine's, a worker's error."""
    import ray

    request.addfinalizer(ray.shutdown)
    options: dict[str, Any] = {"engine": "ray", "workers": 1}
    made("compose_audio", sounds, tmp_path / "sounds", **SOUND, **{**options, "workers": 2})
    assert hashes(tmp_path / "sounds") == hashes(composed)
    shutil.copytree(untrimmed, tmp_path / "videos")
    shards = sorted((tmp_path / "videos" / "shards").iterdir())
    shutil.rmtree(shards[0])
    shards[1].rename(shards[1].with_name(shards[1].name + ".partial"))
    made("pu_valor", videos, tmp_path / "videos", **PU, **options)
    assert hashes(tmp_path / "videos") == hashes(untrimmed)
    (tmp_path / "model.yaml").write_text(
        "{type: server, url: 'http://127.0.0.1:9/v1', model: m, attempts: 1}"
    )
    with pytest.raises(recipe.RecipeError, match="127.0.0.1:9"):
        made(
            "describe_clean",
            sounds,
            tmp_path / "captions",
            model=str(tmp_path / "model.yaml"),
            **options,
        )


def test_work_that_cannot_begin_says_why(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        AppendOnly(tmp_path / "out" / making.JOB / "lock.jsonl"),
        pytest.raises(recipe.RecipeError) as caught,
    ):
        made("compose_audio", sounds, tmp_path / "out", **SOUND)
    assert caught.value.reason == "locked"
    for name, options, reason in (
        ("compose_audio", {"snr": "loud"}, "bad_snr"),
        ("compose_audio", {"shortest": 3, "longest": 1}, "bad_range"),
        ("compose_audio", {"manifest": "nothing.jsonl"}, "no_file"),
        ("pu_valor", {"width": 47}, "odd_size"),
        ("pu_valor", {"rate": 20_000}, "bad_rate"),
    ):
        with pytest.raises(recipe.RecipeError) as caught:
            made(name, sounds, tmp_path / "out", **options)
        assert caught.value.reason == reason, options
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(making.MakingError, match="ray"):
        made("compose_audio", sounds, tmp_path / "out", **SOUND, engine="ray")


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    with pytest.raises(making.MakingError) as caught:
        list(making.make(Deadly(), tmp_path, workers=2, shard_size=1))
    assert caught.value.reason == "worker_died"


def test_captions_become_parts_of_sentences() -> None:
    for caption, part in {
        "A dog barks.": "a dog barks",
        "Rain falls on a roof": "rain falls on a roof",
        "I walk!": "I walk",
        "TV static.": "TV static",
        "english speech": "english speech",
        "French horns play.": "French horns play",
    }.items():
        assert clause(caption) == part
    assert sentence("rain falls") == "Rain falls."
    assert sentence("Who is it?") == "Who is it?"


def test_the_licence_of_what_is_made_names_all_and_hides_none() -> None:
    assert licences(["CC0", "CC BY", "CC0"]) == {"licence": "CC BY; CC0"}
    assert licences(["CC0", None]) == {"licence": "unknown: a clip names none"}


def test_the_speed_of_sound_changes_its_length_and_not_its_pitch() -> None:
    x = tone(1000.0, 1.0)
    for speed in (0.8, 1.0, 1.25):
        length = round(len(x) / speed)
        y = faster(x, RATE, speed, length)
        assert len(y) == length
        assert np.abs(np.fft.rfft(y)).argmax() / length * RATE == pytest.approx(1000, abs=2)
        assert np.abs(y[:400]).max() > 0.25
        assert np.abs(y[-400:]).max() > 0.25
    assert faster(x, RATE, 1.0, 20_000)[16_000:].max() == 0


def test_frames_are_fitted_with_their_aspect_kept() -> None:
    frames = np.full((1, 10, 40, 3), 200, np.uint8)
    out = fitted(frames, 20, 20)
    assert out.shape == (1, 20, 20, 3)
    lit = (out[0, :, 10, 0] == 200).nonzero()[0].tolist()
    assert lit == [7, 8, 9, 10, 11]  # 20 x 5 of it, in the middle
    assert fitted(frames, 40, 10) is frames
