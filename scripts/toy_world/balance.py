"""Measure on the test split how much can be guessed without looking, listening, or both.

Guessers are fitted on the training rows: the majority answer of each cell (wording, wording and
slot, number of events, ...), and a decision tree and a forest on all that the stream's true script
says, a perfect eye or ear. Of times they guess seconds. It also looks whether the answers of a kind
are equally frequent, and each wording has every answer.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from questions import CHOICES, WORDINGS
from rich.table import Table
from scripting import COLOURS, DIRECTIONS, KINDS, PITCHES, SHAPES, SIZES
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

BLIND_LIMIT = 0.05  # points above chance
STREAM_LIMIT = 0.08  # points above chance
UNEVEN_LIMIT = 0.05  # share of the most frequent answer above an equal one
TIME_LIMIT = 0.85
"""Mean absolute error of a time guessed from the other stream, as a share of a blind guess's."""
ROWS_A_PAIR = 20
"""Training rows a pair of wording and answer from which on every pair has to occur."""


def blind_features(row: dict, clip: dict) -> list[float]:
    """Return the wording, the slot and the length of the clip."""
    slot = row["meta"].get("slot")
    return [row["meta"]["wording"], SHAPES.index(slot) if slot else -1, clip["duration"]]


def padded(values: list[float], size: int) -> list[float]:
    """Return the first `size` values, -1 where there are fewer."""
    return [*values[:size], *[-1.0] * (size - len(values))]


def video_features(row: dict, clip: dict) -> list[float]:
    """Return all that a perfect eye sees of the clip, after the blind features."""
    events = clip["events"]
    things = clip["objects"]
    first = things[0]
    direction = list(DIRECTIONS).index(clip["direction"]) if clip["direction"] else -1
    kinds = [
        SHAPES.index(first["shape"]) if first["shape"] else -1,
        list(COLOURS).index(first["colour"]) if first["colour"] else -1,
        list(SIZES).index(first["size"]),
    ]
    bounces = events["bounces"]
    gone = events["vanishes"]
    gaps = np.diff(bounces).tolist()
    times = [
        events["appears"],
        -1.0 if gone is None else gone,
        *padded(bounces, 3),
        *padded(gaps, 2),
    ]
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
    """Return all that a perfect ear hears of the clip, after the blind features."""
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
VIEWS = ("blind", "video", "audio", "earlier")
"""The views that a report shows."""


def majority_guess(keys: list, answers: list[str], new_keys: list) -> list[str]:
    """Return the most frequent training answer of each key, of all answers where the key is new."""
    cells: dict = defaultdict(Counter)
    for key, answer in zip(keys, answers, strict=True):
        cells[key][answer] += 1
    usual = Counter(answers).most_common(1)[0][0]
    return [cells[k].most_common(1)[0][0] if k in cells else usual for k in new_keys]


KEY_COLUMNS = {"wording": [0], "slot": [1], "wording and slot": [0, 1], "length": [2]}
"""Columns of the blind features by which majorities are taken."""


def keys_of(features: np.ndarray, columns: list[int]) -> list[tuple]:
    """Return some columns of each row, as a key."""
    return [tuple(row) for row in features[:, columns].round(1).tolist()]


def features_of(view: str, rows: list[dict], clips: dict[str, dict]) -> np.ndarray:
    """Return what a view shows of each row, float64 ``(rows, columns)``."""
    values = [FEATURES[view](row, clips[row["meta"]["clip"]]) for row in rows]
    return np.asarray(values, np.float64)


def guesses(train: np.ndarray, answers: list[str], test: np.ndarray) -> dict[str, list[str]]:
    """Return the answers of every guesser to the test rows. Features ``(rows, columns)``."""
    answers_by_guesser = {}
    for name, columns in KEY_COLUMNS.items():
        keys = keys_of(train, columns)
        guessed = majority_guess(keys, answers, keys_of(test, columns))
        answers_by_guesser[f"majority by {name}"] = guessed
    leaf = max(5, min(20, len(answers) // 50))
    tree = DecisionTreeClassifier(min_samples_leaf=leaf, max_leaf_nodes=24, random_state=0)
    forest = RandomForestClassifier(30, min_samples_leaf=leaf, random_state=0, n_jobs=1)
    answers_by_guesser["tree"] = tree.fit(train, answers).predict(test).tolist()
    answers_by_guesser["forest"] = forest.fit(train, answers).predict(test).tolist()
    return answers_by_guesser


def best_guess(view: str, rows: dict[str, list[dict]], clips: dict[str, dict]) -> tuple[str, float]:
    """Return the best guesser of this view and its accuracy on the test split."""
    train_answers = [answer_of(row) for row in rows["train"]]
    test_answers = [answer_of(row) for row in rows["test"]]
    test_features = features_of(view, rows["test"], clips)
    guessed = guesses(features_of(view, rows["train"], clips), train_answers, test_features)
    accuracy = {name: share_right(answers, test_answers) for name, answers in guessed.items()}
    name = max(accuracy, key=accuracy.__getitem__)
    return name, accuracy[name]


def share_right(guessed: list[str], answers: list[str]) -> float:
    """Return the share of guesses that are the answers."""
    return float(np.mean([g == a for g, a in zip(guessed, answers, strict=True)]))


def answer_of(row: dict) -> str:
    """Return the answer's text."""
    return row["messages"][1]["content"][0]["text"]


def best_time(view: str, rows: dict[str, list[dict]], clips: dict[str, dict]) -> tuple[str, float]:
    """Return the best guesser of seconds from this view and its mean absolute error in tests."""
    x = {split: features_of(view, rows[split], clips) for split in rows}
    y = {split: seconds_of(rows[split]) for split in rows}
    leaf = max(5, min(20, len(y["train"]) // 50))
    tree = DecisionTreeRegressor(min_samples_leaf=leaf, max_leaf_nodes=24, random_state=0)
    forest = RandomForestRegressor(30, min_samples_leaf=leaf, random_state=0, n_jobs=1)
    guessed = {
        name: g.fit(x["train"], y["train"]).predict(x["test"])
        for name, g in (("tree", tree), ("forest", forest))
    }
    guessed["median"] = np.full(len(y["test"]), np.median(y["train"]))
    errors = {name: float(np.abs(guess - y["test"]).mean()) for name, guess in guessed.items()}
    name = min(errors, key=errors.__getitem__)
    return name, errors[name]


def seconds_of(rows: list[dict]) -> np.ndarray:
    """Return the true seconds of each row."""
    return np.asarray([row["seconds"] for row in rows])


def views_of(kind: str) -> list[str]:
    """Return the views from which the answer must not follow.

    These are no stream at all, and the stream (or each of the two) that is not asked about.
    """
    about, what = kind.split(".")
    if about == "when":
        about = {"sound": "heard", "thing": "seen"}[what]
    return ["blind", *{"seen": ["audio"], "heard": ["video"], "both": ["video", "audio"]}[about]]


def both_streams(row: dict, clips: dict[str, dict]) -> bool:
    """Return whether the row's clip has picture and sound."""
    return clips[row["meta"]["clip"]]["form"] == "av"


def kind_report(kind: str, rows: dict[str, list[dict]], clips: dict[str, dict]) -> dict:
    """Return one line of the report."""
    report: dict = {"n_train": len(rows["train"]), "n_test": len(rows["test"])}
    timed = kind not in CHOICES
    if not timed:
        report |= answer_counts(rows)
    for view in views_of(kind):
        used = rows if view == "blind" else rows_of_both_streams(rows, clips)
        if timed:
            name, error = best_time(view, used, clips)
            figure = {"mae_s": round(error, 4)}
        else:
            name, accuracy = best_guess(view, used, clips)
            figure = {"accuracy": round(accuracy, 4)}
        report[view] = {"guesser": name, **figure, "n": len(used["test"])}
    if timed:
        report["blind_mae_s"] = report["blind"]["mae_s"]
    return report


def answer_counts(rows: dict[str, list[dict]]) -> dict:
    """Return how many answers occur, chance, and pairs of wording and answer that do (not)."""
    frequent = Counter(answer_of(row) for row in rows["test"])
    pairs = {(row["meta"]["wording"], answer_of(row)) for row in rows["train"]}
    wordings = {wording for wording, _ in pairs}
    answers = {answer for _, answer in pairs}
    return {
        "answers": len(frequent),
        "chance": round(max(frequent.values()) / len(rows["test"]), 4),
        "missing_pairs": len(wordings) * len(answers) - len(pairs),
        "pairs": len(pairs),
    }


def rows_of_both_streams(
    rows: dict[str, list[dict]], clips: dict[str, dict]
) -> dict[str, list[dict]]:
    """Return the rows, by split, whose clips have picture and sound."""
    chosen = {}
    for split, of_split in rows.items():
        chosen[split] = [row for row in of_split if both_streams(row, clips)]
    return chosen


def balance_report(
    scripts: dict[str, list[dict]], questions: dict[str, list[dict]]
) -> dict[str, dict]:
    """Return by kind: n, number of answers, chance (the most frequent one), the best guesses."""
    clips = {clip["id"]: clip for split in scripts.values() for clip in split}
    rows: dict = {kind: {"train": [], "test": []} for kind in WORDINGS}
    for split in ("train", "test"):
        for row in questions[split]:
            if row["kind"] in rows:
                rows[row["kind"]][split].append(row)
    report = {
        kind: kind_report(kind, rows[kind], clips) for kind in WORDINGS if all(rows[kind].values())
    }
    return report | {"unanswerable": refusal_report(questions)}


def refusal_report(questions: dict[str, list[dict]]) -> dict:
    """Return how well the words show that a question cannot be answered; chance never refuses."""
    keys = {}
    refused = {}
    for split in ("train", "test"):
        metas = [row["meta"] for row in questions[split]]
        keys[split] = [(m["asked"], m["wording"], m.get("slot")) for m in metas]
        refused[split] = [str(row["kind"] == "unanswerable") for row in questions[split]]
    guessed = majority_guess(keys["train"], refused["train"], keys["test"])
    frequent = Counter(refused["test"])
    n = len(guessed)
    accuracy = sum(g == a for g, a in zip(guessed, refused["test"], strict=True)) / n
    guess = {
        "guesser": "majority by kind, wording and slot",
        "accuracy": round(accuracy, 4),
        "n": n,
    }
    return {
        "n_train": refused["train"].count("True"),
        "n_test": refused["test"].count("True"),
        "answers": 2,
        "chance": round(max(frequent.values()) / n, 4),
        "blind": guess,
    }


@dataclass(frozen=True)
class Problem:
    """A way in which a kind of question gives its answers away.

    Attributes:
        kind: of question.
        reason: ``guessed``, ``time_guessed``, ``frequent_answer`` or ``missing_pairs``.
        text: the figures, for people.
        view: of the guesser, one of ``VIEWS``.
    """

    kind: str
    reason: str
    text: str
    view: str = ""


def over_limits(report: dict[str, dict]) -> list[Problem]:
    """Return what can be guessed too well.

    Some 150 guesses are made, so a figure counts from three standard errors over the limit on.
    """
    problems = []
    for kind, line in report.items():
        if "missing_pairs" in line:
            problems += uneven(kind, line)
        for view in VIEWS:
            if view in line:
                problems += guessed_too_well(kind, line, view)
    return problems


def most_right(chance: float, n: int, view: str) -> float:
    """Return the share of right guesses from which on a view gives answers away."""
    above = BLIND_LIMIT if view == "blind" else STREAM_LIMIT
    limit = chance + min(above, (1 - chance) / 2)  # where chance is high, half of what is left
    return limit + 3 * (limit * (1 - min(limit, 1.0)) / n) ** 0.5


def guessed_too_well(kind: str, line: dict, view: str) -> list[Problem]:
    """Return the problem that a kind is guessed too well from a view, or none."""
    guess = line[view]
    n = guess["n"]
    source = f"{kind} by {guess['guesser']} from {view}, {n} test rows:"
    if "mae_s" in guess:
        error = guess["mae_s"]
        limit = guess.get("blind_mae_s", line["blind_mae_s"]) * (TIME_LIMIT - n**-0.5)
        if view == "blind" or error >= limit:
            return []
        text = f"{source} {error:.2f} s off in the mean; limit {limit:.2f} s"
        return [Problem(kind, "time_guessed", text, view)]
    chance = guess.get("chance", line["chance"])
    limit = most_right(chance, n, view)
    accuracy = guess["accuracy"]
    if accuracy <= limit:
        return []
    text = f"{source} {accuracy:.1%} right; chance {chance:.1%}, limit {limit:.1%}"
    return [Problem(kind, "guessed", text, view)]


def uneven(kind: str, line: dict) -> list[Problem]:
    """Return the problems that an answer is too frequent, or never goes with a wording."""
    problems = []
    equal = 1 / line["answers"]
    limit = equal + UNEVEN_LIMIT + 3 * (equal * (1 - equal) / line["n_test"]) ** 0.5
    if line["chance"] > limit:
        share = f"{line['chance']:.1%} of {line['n_test']}"
        text = f"{kind}: the most frequent answer is {share}; limit {limit:.1%}"
        problems.append(Problem(kind, "frequent_answer", text))
    missing = line["missing_pairs"]
    if missing and line["n_train"] >= ROWS_A_PAIR * (line["pairs"] + missing):
        text = f"{kind}: {missing} pairs of a wording and an answer are not in training"
        problems.append(Problem(kind, "missing_pairs", text))
    return problems


def cell(guess: dict) -> str:
    """Return a guess for people."""
    return f"{guess['mae_s']:.2f} s off" if "mae_s" in guess else f"{guess['accuracy']:.1%}"


def balance_table(report: dict[str, dict]) -> Table:
    """Return the report for the terminal."""
    table = Table(title="Toy world: what can be guessed on the test split")
    for name in ("kind", "train", "test", "answers", "chance", *VIEWS):
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for kind, line in report.items():
        cells = [cell(line[view]) if view in line else "" for view in VIEWS]
        chance = f"{line['chance']:.1%}" if "chance" in line else ""
        table.add_row(
            kind,
            str(line["n_train"]),
            str(line["n_test"]),
            str(line.get("answers", "")),
            chance,
            *cells,
        )
    return table
