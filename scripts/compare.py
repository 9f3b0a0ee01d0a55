"""Train the systems of the literature on the same data, and show side by side what each learned.

    python scripts/compare.py --presets all --seeds 3 [--steps 220] [--output runs/compare]

Every folder `train/presets/<system>/toy` holds the stages of a system at toy size: the same world,
backbones, LLM and rows, another way from the encoders to the LLM. Each is trained with each seed,
asked the same questions of the test split, and kept as one file of figures; what is finished with
the same settings is not done again. The encoders' features are shared by all. `compare.md`,
`compare.json` and `compare.png` in the output folder are written again after each run.

It uses the world and the backbones of `scripts/quickstart.sh`, and makes them where they are
missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
PRESETS = Path("train/presets")  # relative to ROOT, as the paths in presets
SOURCE = Path("runs/quickstart")


def systems() -> list[str]:
    """Return the systems that have a toy preset, by name."""
    return sorted(path.parent.name for path in (ROOT / PRESETS).glob("*/toy") if path.is_dir())


def chosen_systems(names: list[str]) -> list[str]:
    """Return the systems that are named; `all` names every one.

    Raises:
        SystemExit: an unknown name.
    """
    known = systems()
    unknown = sorted(set(names) - {*known, "all"})
    if unknown:
        raise SystemExit(f"compare: no toy preset of {', '.join(unknown)}; there are {known}")
    return known if "all" in names else names


def digest(system: str, seed: int, steps: int | None, rows: int) -> str:
    """Return what decides a result: settings, presets, the package and the world."""
    parts = hashlib.sha256(json.dumps([system, seed, steps, rows]).encode())
    for path in sorted((ROOT / PRESETS / system / "toy").glob("*.yaml")):
        parts.update(path.read_bytes())
    journal = json.loads((ROOT / SOURCE / "journal.json").read_text())
    parts.update(journal["backbones"]["stamp"].encode())
    return parts.hexdigest()


def prepare(cores: int) -> None:
    """Make the world and its backbones; nothing is done where they are there."""
    command = [sys.executable, "scripts/toy_world/quickstart.py", "--until", "backbones"]
    subprocess.run([*command, "--cores", str(cores)], cwd=ROOT, check=True)


def run_one(system: str, seed: int, args: argparse.Namespace) -> dict[str, object] | None:
    """Train and ask one system with one seed, in another process; None where it failed."""
    folder = args.output / system / f"seed{seed}"
    result = folder / "result.json"
    wanted = digest(system, seed, args.steps, args.rows)
    if result.is_file():
        found: dict[str, object] = json.loads(result.read_text())
        if found["digest"] == wanted:
            return found
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "scripts/comparison/one.py", system, str(folder)]
    command += ["--seed", str(seed), "--rows", str(args.rows), "--digest", wanted]
    if args.steps is not None:
        command += ["--steps", str(args.steps)]
    log = folder / "log.txt"
    began = time.monotonic()
    with log.open("w") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, env=environment)
    seconds = time.monotonic() - began
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        print(f"{system}, seed {seed}: failed after {seconds:.0f} s: {last}; see {log}", flush=True)
        return None
    print(f"{system}, seed {seed}: {seconds:.0f} s", flush=True)
    made: dict[str, object] = json.loads(result.read_text())
    return made


def main() -> None:
    """Compare, with the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["all"], help="systems, or all")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of all stages together; default: the presets'"
    )
    parser.add_argument("--rows", type=int, default=800, help="questions of the test split")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="runs side by side")
    args = parser.parse_args()
    args.output = args.output.absolute()
    names = chosen_systems(args.presets)
    prepare(args.cores)
    from comparison.table import write

    results: list[dict[str, object]] = []
    failed = 0
    with ThreadPoolExecutor(args.cores) as pool:
        runs = [
            pool.submit(run_one, system, seed, args)
            for seed in range(args.seeds)
            for system in names
        ]
        for run in as_completed(runs):
            made = run.result()
            failed += made is None
            if made is not None:
                results.append(made)
                write(results, args.output)
    print(f"{len(results)} runs in {args.output / 'compare.md'}; {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
