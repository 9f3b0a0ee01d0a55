"""How much can be guessed without looking, without listening, or without both? Measured on the test split.

Guessers are fitted on the training rows: the majority answer of each cell (wording, wording and slot, number of events,
...), and a decision tree and a forest on all that the stream's true script says, a perfect eye or ear. Of times they
guess seconds. It also looks whether the answers of a kind are equally frequent, and each wording has every answer.
"""

from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
from questions import CHOICES, WORDINGS
from rich.table import Table
from scripting import COLOURS, DIRECTIONS, KINDS, PITCHES, SHAPES, SIZES
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

BLIND_LIMIT, STREAM_LIMIT = 0.05, 0.08  # points above chance
UNEVEN_LIMIT = 0.05  # share of the most frequent answer above an equal one
TIME_LIMIT = 0.85  # mean absolute error of a time guessed from the other stream, of that of a blind guess
ROWS_A_PAIR = 20  # training rows for each wording and answer from which on every pair has to be there


def blind_features(row: dict, clip: dict) -> list[float]:
    """The wording, the slot and the length of the clip."""
    slot = row["meta"].get("slot")
    return [row["meta"]["wording"], SHAPES.index(slot) if slot else -1, clip["duration"]]


def padded(values: list[float], size: int) -> list[float]:
    """The first `size` values, -1 where there are fewer."""
    return [*values[:size], *[-1.0] * (size - len(values))]


def video_features(row: dict, clip: dict) -> list[float]:
    """All that a perfect eye tells of the clip, besides the blind features."""
    events, things = clip["events"], clip["objects"]
    first = things[0]
    direction = list(DIRECTIONS).index(clip["direction"]) if clip["direction"] else -1
    kinds = [
        SHAPES.index(first["shape"]) if first["shape"] else -1,
        list(COLOURS).index(first["colour"]) if first["colour"] else -1,
        list(SIZES).index(first["size"]),
    ]
    bounces, gone = events["bounces"], events["vanishes"]
    gaps = np.diff(bounces).tolist()
    times = [events["appears"], -1.0 if gone is None else gone, *padded(bounces, 3), *padded(gaps, 2)]
    return [
        *blind_features(row, clip),
        len(things),
        direction,
        *kinds,
        len(bounces),
        *times,
        first["x"][0],
        first["y"][0],
    ]


def audio_features(row: dict, clip: dict) -> list[float]:
    """All that a perfect ear tells of the clip, besides the blind features."""
    clicks = clip["clicks"]
    values = [len(clicks), *padded(clicks, 3), *padded(np.diff(clicks).tolist(), 2)]
    for s in clip["sounds"][:1]:
        values += [
            list(KINDS).index(s["kind"]),
            list(PITCHES).index(s["pitch"]) if s["pitch"] else -1,
            s["start"],
            s["end"],
            len(s["pulses"]),
        ]
    return [*blind_features(row, clip), *values]


FEATURES: dict[str, Callable[[dict, dict], list[float]]] = {
    "blind": blind_features,
    "video": video_features,
    "audio": audio_features,
}


def majority_guess(keys: list, answers: list[str], new_keys: list) -> list[str]:
    """The most frequent training answer of each key, of all answers where the key is new."""
    cells: dict = defaultdict(Counter)
    for key, answer in zip(keys, answers, strict=True):
        cells[key][answer] += 1
    usual = Counter(answers).most_common(1)[0][0]
    return [cells[k].most_common(1)[0][0] if k in cells else usual for k in new_keys]


def guesses(train: np.ndarray, answers: list[str], test: np.ndarray) -> dict[str, list[str]]:
    """The answers of every guesser to the test rows. Features (rows, columns)."""
    found = {}
    for name, columns in {"wording": [0], "slot": [1], "wording and slot": [0, 1], "length": [2]}.items():
        keys, new_keys = ([tuple(r) for r in x[:, columns].round(1).tolist()] for x in (train, test))
        found[f"majority by {name}"] = majority_guess(keys, answers, new_keys)
    leaf = max(5, min(20, len(answers) // 50))
    tree = DecisionTreeClassifier(min_samples_leaf=leaf, max_leaf_nodes=24, random_state=0)
    forest = RandomForestClassifier(30, min_samples_leaf=leaf, random_state=0, n_jobs=1)
    found["tree"] = tree.fit(train, answers).predict(test).tolist()
    found["forest"] = forest.fit(train, answers).predict(test).tolist()
    return found


def best_guess(kind: str, view: str, rows: dict[str, list[dict]], clips: dict[str, dict]) -> tuple[str, float]:
    """The best guesser of this view and its accuracy on the test split."""
    features = {
        s: np.asarray([FEATURES[view](row, clips[row["meta"]["clip"]]) for row in rows[s]], np.float64) for s in rows
    }
    answers = {s: [answer_of(row) for row in rows[s]] for s in rows}
    found = guesses(features["train"], answers["train"], features["test"])
    right = {
        name: float(np.mean([g == a for g, a in zip(v, answers["test"], strict=True)])) for name, v in found.items()
    }
    name = max(right, key=right.__getitem__)
    return name, right[name]


def answer_of(row: dict) -> str:
    """The answer's text."""
    return row["messages"][1]["content"][0]["text"]


def best_time(view: str, rows: dict[str, list[dict]], clips: dict[str, dict]) -> tuple[str, float]:
    """The best guesser of seconds from this view and its mean absolute error on the test split."""
    x = {s: np.asarray([FEATURES[view](row, clips[row["meta"]["clip"]]) for row in rows[s]], np.float64) for s in rows}
    y = {s: np.asarray([row["seconds"] for row in rows[s]]) for s in rows}
    leaf = max(5, min(20, len(y["train"]) // 50))
    tree = DecisionTreeRegressor(min_samples_leaf=leaf, max_leaf_nodes=24, random_state=0)
    forest = RandomForestRegressor(30, min_samples_leaf=leaf, random_state=0, n_jobs=1)
    guessed = {
        name: g.fit(x["train"], y["train"]).predict(x["test"]) for name, g in (("tree", tree), ("forest", forest))
    }
    guessed["median"] = np.full(len(y["test"]), np.median(y["train"]))
    errors = {name: float(np.abs(guess - y["test"]).mean()) for name, guess in guessed.items()}
    name = min(errors, key=errors.__getitem__)
    return name, errors[name]


def views_of(kind: str) -> list[str]:
    """What must not tell the answer: nothing at all, and the stream (or each of the two) that is not asked about."""
    about, what = kind.split(".")
    if about == "when":
        about = {"sound": "heard", "thing": "seen"}[what]
    return ["blind", *{"seen": ["audio"], "heard": ["video"], "both": ["video", "audio"]}[about]]


def both_streams(row: dict, clips: dict[str, dict]) -> bool:
    """Is the row's clip one with picture and sound?"""
    return clips[row["meta"]["clip"]]["form"] == "av"


def kind_report(kind: str, rows: dict[str, list[dict]], clips: dict[str, dict]) -> dict:
    """One line of the report."""
    report: dict = {"n_train": len(rows["train"]), "n_test": len(rows["test"])}
    timed = kind not in CHOICES
    if not timed:
        frequent = Counter(answer_of(r) for r in rows["test"])
        pairs = {(r["meta"]["wording"], answer_of(r)) for r in rows["train"]}
        report |= {"answers": len(frequent), "chance": round(max(frequent.values()) / len(rows["test"]), 4)}
        report["missing_pairs"] = len({w for w, _ in pairs}) * len({a for _, a in pairs}) - len(pairs)
        report["pairs"] = len(pairs)
    for view in views_of(kind):
        seen = rows if view == "blind" else {s: [r for r in v if both_streams(r, clips)] for s, v in rows.items()}
        name, figure = best_time(view, seen, clips) if timed else best_guess(kind, view, seen, clips)
        report[view] = {"guesser": name, "mae_s" if timed else "accuracy": round(figure, 4), "n": len(seen["test"])}
    if timed:
        report["blind_mae_s"] = report["blind"]["mae_s"]
    return report


def balance_report(scripts: dict[str, list[dict]], questions: dict[str, list[dict]]) -> dict[str, dict]:
    """For each kind: n, number of answers, chance (the most frequent answer), the best guesses."""
    clips = {c["id"]: c for split in scripts.values() for c in split}
    rows: dict = {kind: {"train": [], "test": []} for kind in WORDINGS}
    for split in ("train", "test"):
        for row in questions[split]:
            if row["kind"] in rows:
                rows[row["kind"]][split].append(row)
    report = {kind: kind_report(kind, rows[kind], clips) for kind in WORDINGS if all(rows[kind].values())}
    return report | {"unanswerable": refusal_report(questions)}


def refusal_report(questions: dict[str, list[dict]]) -> dict:
    """Do the words tell that a question cannot be answered? Chance is never to refuse."""
    keys, refused = {}, {}
    for split in ("train", "test"):
        metas = [row["meta"] for row in questions[split]]
        keys[split] = [(m["asked"], m["wording"], m.get("slot")) for m in metas]
        refused[split] = [str(row["kind"] == "unanswerable") for row in questions[split]]
    found = majority_guess(keys["train"], refused["train"], keys["test"])
    frequent = Counter(refused["test"])
    n = len(found)
    accuracy = sum(g == a for g, a in zip(found, refused["test"], strict=True)) / n
    return {
        "n_train": refused["train"].count("True"), "n_test": refused["test"].count("True"), "answers": 2,
        "chance": round(max(frequent.values()) / n, 4),
        "blind": {"guesser": "majority by kind, wording and slot", "accuracy": round(accuracy, 4), "n": n},
    }  # fmt: skip


def over_limits(report: dict[str, dict]) -> list[str]:
    """What can be guessed too well, by more than three standard errors over the limit: some 150 guesses are made."""
    problems = []
    for kind, line in report.items():
        if "missing_pairs" in line:
            problems += uneven(kind, line)
        for view in ("blind", "video", "audio"):
            if view not in line:
                continue
            guess = line[view]
            told = f"{kind} by {guess['guesser']} from {view}, {guess['n']} test rows:"
            if "mae_s" in guess:
                limit = line["blind_mae_s"] * (TIME_LIMIT - guess["n"] ** -0.5)
                if view != "blind" and guess["mae_s"] < limit:
                    problems.append(f"{told} {guess['mae_s']:.2f} s off in the mean; limit {limit:.2f} s")
                continue
            limit = line["chance"] + (BLIND_LIMIT if view == "blind" else STREAM_LIMIT)
            limit += 3 * (limit * (1 - min(limit, 1.0)) / guess["n"]) ** 0.5
            if guess["accuracy"] > limit:
                right = f"{guess['accuracy']:.1%} right; chance {line['chance']:.1%}, limit {limit:.1%}"
                problems.append(f"{told} {right}")
    return problems


def uneven(kind: str, line: dict) -> list[str]:
    """Whether an answer is too frequent, or never stands behind one of the wordings."""
    equal, problems = 1 / line["answers"], []
    limit = equal + UNEVEN_LIMIT + 3 * (equal * (1 - equal) / line["n_test"]) ** 0.5
    if line["chance"] > limit:
        problems.append(
            f"{kind}: the most frequent answer is {line['chance']:.1%} of {line['n_test']}; limit {limit:.1%}"
        )
    if line["missing_pairs"] and line["n_train"] >= ROWS_A_PAIR * (line["pairs"] + line["missing_pairs"]):
        problems.append(f"{kind}: {line['missing_pairs']} pairs of a wording and an answer never occur in training")
    return problems


def cell(guess: dict) -> str:
    """A guess for people."""
    return f"{guess['mae_s']:.2f} s off" if "mae_s" in guess else f"{guess['accuracy']:.1%}"


def balance_table(report: dict[str, dict]) -> Table:
    """The report for the terminal."""
    table = Table(title="Toy world: what can be guessed on the test split")
    for name in ("kind", "train", "test", "answers", "chance", "blind", "video", "audio"):
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for kind, line in report.items():
        cells = [cell(line[v]) if v in line else "" for v in ("blind", "video", "audio")]
        chance = f"{line['chance']:.1%}" if "chance" in line else ""
        table.add_row(kind, str(line["n_train"]), str(line["n_test"]), str(line.get("answers", "")), chance, *cells)
    return table
