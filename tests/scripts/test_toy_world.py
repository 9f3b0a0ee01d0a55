"""The toy world: the same bytes from the same seed, no shortcut, files as in the script."""

import copy
import hashlib
import importlib
import json
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

WORLD = Path(__file__).resolve().parents[2] / "scripts" / "toy_world"
if str(WORLD) not in sys.path:
    sys.path.insert(0, str(WORLD))

toy_world = importlib.import_module("make")
balance = importlib.import_module("balance")
questions = importlib.import_module("questions")
rendering = importlib.import_module("rendering")
scripting = importlib.import_module("scripting")

CLIPS = 100


def world(out: Path, *options: str) -> Path:
    toy_world.main([str(out), "--clips", str(CLIPS), *options])
    return out


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text(row: dict) -> str:
    return row["messages"][1]["content"][0]["text"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return world(tmp_path_factory.mktemp("toy") / "one", "--workers", "2")


@pytest.fixture(scope="module")
def scripts() -> dict[str, list[dict]]:
    """Scripts of a whole-size world; no file is needed to count what they say."""
    return {s: scripting.script_split(0, s, n) for s, n in scripting.split_sizes(3000).items()}


@pytest.fixture(scope="module")
def rows(scripts) -> dict[str, list[dict]]:
    return {s: questions.question_rows(clips, s, 0) for s, clips in scripts.items()}


def test_bytes_follow_from_the_seed_and_not_from_the_workers(made, tmp_path):
    again = hashes(world(tmp_path / "again", "--workers", "1"))
    assert again == hashes(made)
    other = hashes(world(tmp_path / "other", "--seed", "1"))
    media = [name for name in again if name.startswith("clips/")]
    assert not {again[n] for n in media} & set(other.values())


def test_a_whole_world_is_kept_and_a_half_one_completed(made, tmp_path, capsys):
    before = hashes(made)
    stamp = (made / "script.jsonl").stat().st_mtime_ns
    world(made)
    assert "already" in capsys.readouterr().out
    assert (made / "script.jsonl").stat().st_mtime_ns == stamp
    for clip in list((made / "clips").iterdir())[::3]:
        clip.unlink()
    assert hashes(world(made)) == before
    with pytest.raises(SystemExit, match="other settings"):
        toy_world.main([str(made), "--clips", "50"])
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not empty"):
        world(tmp_path)


def test_manifests_are_valid_and_rows_of_a_clip_are_adjacent(made):
    manifest = pytest.importorskip("avllm.data.manifest")
    for split in scripting.SPLITS:
        for name in (f"{split}.jsonl", f"captions_{split}.jsonl"):
            for sample in manifest.read_manifest(made / name):
                for part in sample.media:
                    assert (made / part.path).exists()
        order = [r["meta"]["clip"] for r in jsonl(made / f"{split}.jsonl")]
        assert len(set(order)) == 1 + sum(a != b for a, b in pairwise(order))


def test_no_file_and_no_caption_is_shared_between_the_splits(made):
    files = hashes(made / "clips")
    assert len(set(files.values())) == len(files) == CLIPS
    captions = {}
    for split in scripting.SPLITS:
        captions[split] = [text(row) for row in jsonl(made / f"captions_{split}.jsonl")]
    assert not set(captions["train"]) & set(captions["test"])
    assert all(len(set(captions[s])) == len(captions[s]) for s in ("validation", "test", "unseen"))


def decoded_sound(path: Path) -> np.ndarray:
    """Samples by their time stamps, by a plain decode; what lies before 0 is dropped."""
    with av.open(str(path)) as file:
        chunks = [(f.pts, f.to_ndarray().reshape(-1)) for f in file.decode(audio=0)]
    x = np.zeros(max(at + len(y) for at, y in chunks))
    for at, y in chunks:
        x[max(at, 0) : at + len(y)] = y[max(-at, 0) :]
    return x


def test_a_click_written_at_one_second_is_found_there(tmp_path):
    audio = np.zeros(3 * scripting.RATE, np.float32)
    audio[scripting.RATE : scripting.RATE + 160] = 0.8
    path = tmp_path / "click.mp4"
    rendering.write_mp4(path, np.full((24, 96, 96, 3), 90, np.uint8), audio)
    second = np.argmax(np.abs(decoded_sound(path)) > 0.4) / scripting.RATE
    assert second == pytest.approx(1.0, abs=0.010)
    with av.open(str(path)) as file:
        assert [f.time for f in file.decode(video=0)] == [i / 8 for i in range(24)]
    media = pytest.importorskip("avllm.data.media.load")
    clip = media.load_video(path, sampling=media.Sampling(fps=8), rate=scripting.RATE)
    second = clip.sound.start + int((clip.sound.x.abs() > 0.4).int().argmax()) / clip.sound.rate
    assert second == pytest.approx(1.0, abs=0.010)
    assert clip.frames.span[0, 0] == 0


def test_every_click_of_a_script_is_heard_at_its_time(made):
    clips = [s for s in jsonl(made / "script.jsonl") if s["form"] in ("av", "wav") and s["clicks"]]
    assert len(clips) > 20
    for script in clips:
        x = np.abs(decoded_sound(made / script["file"])) / 32768 ** (script["form"] == "wav")
        for click in script["clicks"]:
            at = round(click * scripting.RATE)
            loudest = at - 800 + int(np.argmax(x[at - 800 : at + 800]))
            assert loudest / scripting.RATE == pytest.approx(click, abs=0.010), script["id"]


def test_forms_are_what_they_say(made):
    for script in jsonl(made / "script.jsonl"):
        with av.open(str(made / script["file"])) as file:
            streams = Counter(s.type for s in file.streams)
        expected = {"av": (1, 1), "mute": (1, 0), "silent": (1, 1), "wav": (0, 1), "jpg": (1, 0)}[
            script["form"]
        ]
        assert (streams["video"], streams["audio"]) == expected
        if script["form"] == "silent":
            assert np.abs(decoded_sound(made / script["file"])).max() == 0


def test_bounces_are_where_the_path_turns_at_a_wall(scripts):
    checked = 0
    for script in (s for s in scripts["train"] if s["objects"] and s["form"] != "jpg"):
        thing, walls = script["objects"][0], script["walls"]
        across, radius = np.asarray(thing[walls["axis"]]), scripting.SIZES[thing["size"]]
        room = np.minimum(across - radius - walls["at"][0], walls["at"][1] - radius - across)
        touching = [
            i / 8
            for i in np.flatnonzero((np.abs(room) < 0.02) & np.asarray(thing["visible"], bool))
        ]
        assert touching == script["events"]["bounces"], script["id"]
        bounces = script["events"]["bounces"]
        assert all(b - a >= 0.5 for a, b in pairwise(bounces))
        for click, at_bounce in zip(script["clicks"], script["click_at_bounce"], strict=True):
            off = [abs(click - t) for t in bounces]
            assert (min(off) == 0) if at_bounce else (not off or min(off) >= 0.35)
        checked += len(bounces)
    assert checked > 1000


def test_direction_is_the_net_movement_of_the_drawn_thing(scripts):
    for script in (s for s in scripts["test"] if s["form"] == "av" and s["direction"]):
        thing = script["objects"][0]
        shown = np.flatnonzero(thing["visible"])
        dx, dy = (thing[a][shown[-1]] - thing[a][shown[0]] for a in "xy")
        if shown[-1] - shown[0] >= 8:
            seen = (
                ("right" if dx > 0 else "left")
                if abs(dx) > abs(dy)
                else ("down" if dy > 0 else "up")
            )
            assert seen == script["direction"]


def test_frames_show_the_thing_where_the_script_says(scripts):
    clips = [
        s
        for s in scripts["train"]
        if s["form"] == "av" and s["program"] == "when" and len(s["objects"]) == 1
    ]
    for script in clips[:8]:
        frames = rendering.render_frames(script, np.random.default_rng(0)).astype(int)
        thing = script["objects"][0]
        near = np.abs(frames - rendering.paint(thing)).max(axis=-1) < 20
        assert (near.sum(axis=(1, 2)) > 20).tolist() == [bool(v) for v in thing["visible"]]
        for t in np.flatnonzero(thing["visible"]):
            ys, xs = np.nonzero(near[t])
            assert abs(xs.mean() + 0.5 - thing["x"][t]) < 1.5
            assert (
                abs(ys.mean() + 0.5 - thing["y"][t]) < 0.15 * scripting.SIZES[thing["size"]] + 1.5
            )


def test_held_out_combinations_are_in_unseen_alone(scripts):
    for split, clips in scripts.items():
        for clip in clips:
            held = [scripting.is_held_out(t) for t in clip["objects"]]
            sounds = [{(s["kind"], s["pitch"]), (s["kind"], s["timbre"])} for s in clip["sounds"]]
            assert held == [split == "unseen" and i == 0 for i in range(len(held))]
            assert all(bool(s & scripting.UNSEEN_SOUNDS) == (split == "unseen") for s in sounds)


def test_what_has_no_name_is_not_asked_for_by_one(scripts, rows):
    for split, clips in scripts.items():
        asked = defaultdict(list)
        for row in rows[split]:
            asked[row["meta"]["clip"]].append(
                (row["meta"]["asked"], row["meta"].get("slot"), row["kind"])
            )
        for clip in (c for c in clips if c["form"] == "av"):
            named = {t["shape"] for t in clip["objects"]} - {None}
            coloured = {t["shape"] for t in clip["objects"] if t["colour"]} & named
            between = {shape for t in clip["objects"] for shape in t["between"] or ()}
            assert not named & between, (
                "a shape between two others lies near none that another thing has"
            )
            kinds = {kind for kind, _, _ in asked[clip["id"]]}
            assert named or "seen.shape" not in kinds
            assert coloured or "seen.colour" not in kinds or not named
            assert {
                slot for kind, slot, _ in asked[clip["id"]] if kind == "seen.named_colour"
            } <= coloured
            assert clip["sounds"][0]["pitch"] or "heard.pitch" not in kinds
        pictures = [c["objects"] for c in clips if c["objects"]]
        for look in ("shape", "colour"):
            nameless = sum(not all(t[look] for t in things) for things in pictures)
            assert split == "unseen" or 0.1 < nameless / len(pictures) < 0.4, look


def test_answers_are_balanced_overall_and_within_every_wording(rows):
    for split in ("train", "test"):
        answers, worded = defaultdict(Counter), defaultdict(Counter)
        for row in rows[split]:
            if row["kind"] in questions.CHOICES:
                answers[row["kind"]][text(row)] += 1
                worded[row["kind"], row["meta"]["wording"]][text(row)] += 1
        for kind, counts in answers.items():
            assert set(counts) == set(questions.CHOICES[kind])
            assert max(counts.values()) - min(counts.values()) <= 0.02 * sum(counts.values()), (
                split,
                kind,
                counts,
            )
            for wording in range(3):
                of_wording = worded[kind, wording]
                assert set(of_wording) == set(counts)
                spread = max(of_wording.values()) - min(of_wording.values())
                assert spread <= max(6, 0.02 * sum(of_wording.values())), (split, kind, wording)


def test_refusals_use_the_same_words_in_the_same_share(rows, scripts):
    forms = {c["id"]: c["form"] for c in scripts["train"]}
    asked, refused = Counter(), Counter()
    for row in rows["train"]:
        key = (row["meta"]["asked"], row["meta"]["wording"])
        asked[key] += 1
        if row["kind"] == "unanswerable":
            refused[key] += 1
            assert forms[row["meta"]["clip"]] in ("wav", "jpg", "mute")
            assert text(row) == questions.REFUSAL
    share = {key: refused[key] / asked[key] for key in asked}
    assert len(share) == 45
    assert max(share.values()) - min(share.values()) < 0.02


def test_nothing_can_be_guessed_and_every_kind_is_there(rows, scripts):
    report = balance.balance_report(scripts, rows)
    assert balance.over_limits(report) == []
    assert set(report) == {*questions.WORDINGS, "unanswerable"}
    assert min(line["n_test"] for line in report.values()) >= 100
    assert len(rows["train"]) >= 15000
    assert set(report) <= {row["kind"] for row in rows["unseen"]}


def test_the_check_finds_a_shortcut(rows, scripts):
    """A world whose wording gives the size away does not pass."""
    spoiled = {}
    for split in ("train", "test"):
        spoiled[split] = copy.deepcopy([r for r in rows[split] if r["kind"] == "seen.size"])
        for row in spoiled[split]:
            row["meta"]["wording"] = int(text(row) == "big")
    problems = balance.over_limits(balance.balance_report(scripts, spoiled))
    assert ("seen.size", "guessed", "blind") in [(p.kind, p.reason, p.view) for p in problems]
    (missing,) = [p for p in problems if p.reason == "missing_pairs"]
    assert missing.kind == "seen.size"
    assert "2 pairs" in missing.text


def test_the_check_finds_a_frequent_answer_and_a_time_that_the_other_stream_shows(rows, scripts):
    """A world that asks mostly about big things fails; so does one whose sounds start by place."""
    mostly_big = {}
    for split in ("train", "test"):
        sizes = [row for row in rows[split] if row["kind"] == "seen.size"]
        small = [row for row in sizes if text(row) == "small"]
        mostly_big[split] = [row for row in sizes if text(row) == "big"] + small[::4]
    problems = balance.over_limits(balance.balance_report(scripts, mostly_big))
    assert ("seen.size", "frequent_answer") in [(p.kind, p.reason) for p in problems]
    clips = {c["id"]: c for split in scripts.values() for c in split}
    times = {}
    for split in ("train", "test"):
        times[split] = copy.deepcopy([r for r in rows[split] if r["kind"] == "when.sound"])
        for row in times[split]:
            things = clips[row["meta"]["clip"]]["objects"]
            if things:
                row["seconds"] = things[0]["x"][0] / 20
    problems = balance.over_limits(balance.balance_report(scripts, times))
    assert ("when.sound", "time_guessed", "video") in [(p.kind, p.reason, p.view) for p in problems]
