"""Run all on two cores: world, backbones, three stages, evaluation, report; see quickstart.sh.

    python scripts/toy_world/quickstart.py [--clips 3000] [--seed 0]

Everything is under runs/quickstart. A phase that is done is not done again unless the files that
it is made from, or a phase before it, have changed; a phase that was killed goes on where it was
(stages) or starts over (the others).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = Path("runs/quickstart")  # relative to ROOT, as in the presets
WORLD = RUN / "world"
STAGE_SECONDS = RUN / "stage_seconds.json"
WORLD_FILES = [
    f"scripts/toy_world/{name}.py"
    for name in (
        "make",
        "balance",
        "chat_balance",
        "chats",
        "questions",
        "rendering",
        "scripting",
    )
]
STAGES = {"stage1": "stage1_align", "stage2": "stage2_caption", "stage3": "stage3_instruct"}


@dataclass
class Phase:
    """A part of the run.

    Attributes:
        name: as summary.json has it.
        about: one line for people.
        lanes: commands that run side by side, each lane a list of commands one after the other.
        made_from: files and folders (relative to the project) that decide the result.
        options: what else decides it.
        makes: files and folders that are deleted when the phase has to start over.
    """

    name: str
    about: str
    lanes: list[list[list[str]]]
    made_from: list[str]
    makes: list[Path] = field(default_factory=list)
    options: dict[str, int] = field(default_factory=dict)


def phases(clips: int, seed: int, cores: int) -> list[Phase]:
    """Return the phases, in order."""
    python = sys.executable
    world = [
        python,
        "scripts/toy_world/make.py",
        str(WORLD),
        "--clips",
        str(clips),
        "--seed",
        str(seed),
    ]
    pretrain = {
        name: [python, f"scripts/toy_world/backbones/{name}.py", str(WORLD), str(RUN / name)]
        for name in ("llm", "vision", "audio")
    }
    ask = [python, "scripts/toy_world/asking.py", str(RUN), "--cores", str(cores)]
    return [
        Phase(
            name="world",
            about="real files: clips, sounds, pictures, questions",
            lanes=[[[*world, "--workers", str(cores)]]],
            made_from=WORLD_FILES,
            makes=[WORLD],
            options={"clips": clips, "seed": seed},
        ),
        Phase(
            name="backbones",
            about="an eye, an ear and a language model, from scratch",
            lanes=[[command] for command in pretrain.values()],
            made_from=[
                "scripts/toy_world/backbones",
                "avllm/training/muon.py",
                "avllm/precision.py",
            ],
            makes=[RUN / name for name in pretrain],
        ),
        training_phase(cores),
        Phase(
            name="evaluation",
            about="all streams, a stream removed or exchanged, combinations never seen",
            lanes=[[ask]],
            made_from=["scripts/toy_world/asking.py", "avllm"],
            makes=[RUN / "evaluation"],
        ),
    ]


def training_phase(cores: int) -> Phase:
    """Return the three stages; on several cores two processes share each step's batch."""
    files = [f"train/presets/toy/{preset}.yaml" for preset in STAGES.values()]
    if cores > 1:
        start = [
            str(Path(sys.executable).with_name("torchrun")),
            "--standalone",
            "--nproc_per_node",
            "2",
        ]
    else:
        start = [sys.executable]
    command = [*start, "scripts/toy_world/train.py", str(STAGE_SECONDS), *files]
    return Phase(
        name="training",
        about="alignment, captions, questions: " + ", ".join(files),
        lanes=[[command]],
        made_from=[*files, "scripts/toy_world/train.py", "avllm"],
        makes=[*(RUN / name for name in STAGES), STAGE_SECONDS],
    )


# ---- what is done already


def fingerprint(phase: Phase, before: str) -> str:
    """Return a digest of the phase's options and files, chained to that of the phase before.

    Which Python runs it, and on how many cores, decides nothing.
    """
    digest = hashlib.sha256(json.dumps([before, phase.name, phase.options]).encode())
    for name in phase.made_from:
        path = ROOT / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            digest.update(file.read_bytes())
    return digest.hexdigest()


class Journal:
    """The file journal.json: phases that were begun and finished, from what, and their seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.phases: dict[str, dict[str, object]] = (
            json.loads(path.read_text()) if path.is_file() else {}
        )

    def done(self, name: str, stamp: str) -> bool:
        """Return whether the phase was finished from the very same files."""
        phase = self.phases.get(name, {})
        return phase.get("stamp") == stamp and bool(phase.get("done"))

    def begin(self, phase: Phase, stamp: str) -> float:
        """Delete what was made from other files; return the seconds that killed runs spent."""
        entry = self.phases.get(phase.name, {})
        if entry.get("stamp") != stamp:
            for path in phase.makes:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            entry = {"stamp": stamp, "seconds": 0.0, "done": False}
        self.phases[phase.name] = entry
        self.write()
        return float(str(entry["seconds"]))

    def write(self) -> None:
        """Write the file, whole or not at all."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.phases, indent=1))
        part.replace(self.path)


# ---- running


def run_lane(commands: list[list[str]], failed: list[str], log: Path | None) -> None:
    """Run commands one after the other until one fails.

    Their output goes to `log` where several lanes would mix.
    """
    for command in commands:
        if failed:
            return
        if log is None:
            code = subprocess.run(command, cwd=ROOT, check=False).returncode
        else:
            with log.open("a", encoding="utf-8") as out:
                code = subprocess.run(
                    command, cwd=ROOT, stdout=out, stderr=out, check=False
                ).returncode
        if code:
            where = f"; see {log}" if log else ""
            failed.append(f"{' '.join(command)} ended with code {code}{where}")


def run_phase(phase: Phase, cores: int) -> None:
    """Run all lanes, side by side where there are cores for it.

    Raises:
        SystemExit: a command failed.
    """
    failed: list[str] = []
    if len(phase.lanes) == 1 or cores == 1:
        for lane in phase.lanes:
            run_lane(lane, failed, None)
    else:
        logs = [RUN / "logs" / f"{phase.name}{i}.log" for i in range(len(phase.lanes))]
        for log in logs:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.unlink(missing_ok=True)
        pairs = zip(phase.lanes, logs, strict=True)
        lanes = [threading.Thread(target=run_lane, args=(lane, failed, log)) for lane, log in pairs]
        for lane in lanes:
            lane.start()
        wait_for(lanes, logs)
    if failed:
        raise SystemExit("quickstart: " + "; ".join(failed))


def wait_for(lanes: Sequence[threading.Thread], logs: Sequence[Path]) -> None:
    """Wait until all lanes have ended; print the last line of each log every ten seconds."""
    began = time.perf_counter()
    while any(lane.is_alive() for lane in lanes):
        next((lane for lane in lanes if lane.is_alive()), lanes[0]).join(10)
        texts = [
            log.read_text(errors="replace").replace("\r", "\n") for log in logs if log.is_file()
        ]
        last = [text.strip().rsplit("\n", 1)[-1] for text in texts]
        print(
            f"  {time.perf_counter() - began:4.0f} s  " + "  |  ".join(line[-60:] for line in last),
            flush=True,
        )


class MemoryWatch(threading.Thread):
    """Watches the largest memory of this process and all below it, in MB.

    Memory is the proportional set size: what processes share counts once.
    """

    def __init__(self, peak: float) -> None:
        super().__init__(daemon=True)
        self.peak = peak

    def run(self) -> None:
        """Measure twice a second, or less often: it takes at most a fiftieth of a core's time."""
        while True:
            began = time.thread_time()
            self.peak = max(self.peak, sum(pss_mb(pid) for pid in family(os.getpid())))
            time.sleep(max(0.5, 50 * (time.thread_time() - began)))


def family(root: int) -> list[int]:
    """Return a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            children.setdefault(parent, []).append(int(entry))
    processes = [root]
    for pid in processes:  # grows while it is gone through
        processes += children.get(pid, [])
    return processes


def pss_mb(pid: int) -> float:
    """Return the memory of one process, with its share of shared pages; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def main() -> None:
    """Run what is not done, then print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=3000, help="clips of the toy world")
    parser.add_argument("--seed", type=int, default=0, help="of the toy world")
    parser.add_argument("--cores", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--until", help="the last phase to run: world, backbones, training")
    parser.add_argument("--install-seconds", type=float, default=0.0, help="noted in the summary")
    args = parser.parse_args()
    os.chdir(ROOT)
    # One thread a process: the phases use the cores with processes. Nothing has to be looked up on
    # a hub. Nothing is compiled; with this variable, PEFT's imports do not load the compiler.
    os.environ.update(
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TORCHDYNAMO_DISABLE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    RUN.mkdir(parents=True, exist_ok=True)
    journal = Journal(RUN / "journal.json")
    install = journal.phases.setdefault("install", {"seconds": 0.0})
    install["seconds"] = max(float(str(install["seconds"])), args.install_seconds)
    memory = MemoryWatch(
        float(str(journal.phases.setdefault("memory", {"peak_mb": 0.0})["peak_mb"]))
    )
    memory.start()
    todo = phases(args.clips, args.seed, args.cores)
    stamp = ""
    for number, phase in enumerate(todo, start=1):
        stamp = fingerprint(phase, stamp)
        if journal.done(phase.name, stamp):
            print(f"[{number}/{len(todo)}] {phase.name}: done before", flush=True)
            if phase.name == args.until:
                return
            continue
        print(f"[{number}/{len(todo)}] {phase.name}: {phase.about}", flush=True)
        spent = journal.begin(phase, stamp)
        began = time.perf_counter()
        try:
            run_phase(phase, args.cores)
            journal.phases[phase.name]["done"] = True
        finally:
            journal.phases[phase.name]["seconds"] = round(spent + time.perf_counter() - began, 1)
            journal.phases["memory"] = {"peak_mb": round(memory.peak)}
            journal.write()
        if phase.name == args.until:
            return
    subprocess.run([sys.executable, "scripts/toy_world/report.py", str(RUN)], check=True)


if __name__ == "__main__":
    main()
