"""Train one toy preset with one seed, ask it the test questions, and keep the figures.

    python scripts/comparison/one.py SYSTEM FOLDER --seed 0 --rows 800 --digest D [--steps N]

Called by scripts/compare.py, from the project's folder.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avllm.config import RunConfig, load_config
from avllm.data.schema import RowError, Sample
from avllm.log import hush_libraries

SOURCE = Path("runs/quickstart")
CACHE = SOURCE / "features"


def stages(system: str, folder: Path, seed: int, steps: int | None) -> list[RunConfig]:
    """Return the settings of a system's stages in order, written to a folder of the comparison.

    Args:
        system: a folder of train/presets.
        folder: of this run.
        seed: of weights, order and draws.
        steps: optimizer steps of all stages together, in the presets' proportions; None: theirs.
    """
    paths = sorted(Path("train/presets", system, "toy").glob("stage*.yaml"))
    planned = [load_config(path).train.max_steps or 0 for path in paths]
    configs: list[RunConfig] = []
    for number, path in enumerate(paths):
        changes = [f"output={folder / path.stem}", f"seed={seed}", "train.save_every=null"]
        if number:
            changes.append(f"init={folder / paths[number - 1].stem}")
        if steps is not None:
            share = round(steps * planned[number] / sum(planned))
            changes.append(f"train.max_steps={max(1, share)}")
        configs.append(load_config(path, changes))
    return configs


def ask(folder: Path, rows: int) -> tuple[dict[str, Any], float]:
    """Return the figures of a checkpoint by condition, and the media tokens of a mean clip."""
    from avllm.data.manifest import read_manifest
    from avllm.evaluation.conditions import AS_IS, Condition
    from avllm.evaluation.runner import evaluate_all
    from avllm.evaluation.sampling import draw_rows
    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor

    model = AVLLM.from_pretrained(str(folder))
    processor = AVProcessor.from_pretrained(folder)
    manifest = SOURCE / "world" / "test.jsonl"
    media = [medium for medium in ("audio", "video") if processor.streams_of(medium)]
    conditions = [AS_IS, *(Condition(swap=medium) for medium in media)]  # type: ignore[arg-type]
    cache = CACHE if processor.selector is None else None
    results = evaluate_all(
        model,
        processor,
        manifest,
        conditions,
        limit=rows,
        precision="auto",
        cache=cache,
        max_skip_rate=1.0,  # a model of one sense cannot be asked about the other's files
    )
    figures = {name: result.to_dict() for name, result in results.items()}
    asked = draw_rows(read_manifest(manifest), min(rows, 32), 0)
    return figures, media_tokens(processor, asked, manifest.parent)


def media_tokens(processor: Any, samples: Sequence[Sample], root: Path) -> float:
    """Return the media tokens of a mean clip, among those that the model can see or hear."""
    placeholders = set(processor.config.media_token_ids.values())
    counts: list[int] = []
    for sample in samples:
        try:
            batch = processor([sample], root)
        except RowError:  # a sound for a model that sees, or a picture for one that hears
            continue
        counts.append(sum(int((batch.input_ids == number).sum()) for number in placeholders))
    return sum(counts) / len(counts)


def main() -> None:
    """Train and ask, with the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--digest", required=True)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    from avllm.training.trainer import run_stage

    hush_libraries()
    seconds: dict[str, float] = {}
    step_seconds: dict[str, float] = {}
    configs = stages(args.system, args.folder, args.seed, args.steps)
    for config in configs:
        began = time.perf_counter()
        run_stage(config)
        seconds[config.stage] = round(time.perf_counter() - began, 1)
        step_seconds[config.stage] = seconds_per_step(Path(config.output))
    began = time.perf_counter()
    last = Path(configs[-1].output)
    figures, tokens = ask(last, args.rows)
    seconds["questions"] = round(time.perf_counter() - began, 1)
    result = {
        "digest": args.digest,
        "system": args.system,
        "seed": args.seed,
        "steps": {config.stage: config.train.max_steps for config in configs},
        "seconds": seconds,
        "step_seconds": step_seconds,
        "media_tokens": tokens,
        "trained_parameters": trained_parameters(last),
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "figures": figures,
    }
    path = args.folder / "result.json"
    half = path.with_suffix(".half")
    half.write_text(json.dumps(result, indent=1))
    half.replace(path)


def seconds_per_step(run: Path) -> float:
    """Return the median seconds of an optimizer step, from the run's log."""
    times: list[float] = []
    before = 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "seconds" in entry:
            times.append(entry["seconds"] / max(1, entry["step"] - before))
            before = entry["step"]
    return round(sorted(times)[len(times) // 2], 4) if times else 0.0


def trained_parameters(folder: Path) -> int:
    """Return the numbers in a checkpoint's trained weights and LoRA."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("**/*.safetensors"):
        if "checkpoints" in path.parts or "best" in path.parts or path.stem == "objectives":
            continue
        with safe_open(path, "pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
            count += sum(math.prod(shape) for shape in shapes)
    return count


if __name__ == "__main__":
    main()
