"""The loop. It knows batches, objectives by their sums and weights, and steps; it knows no objective by name."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from rich.console import Console
from torch import Tensor

from avllm import distributed
from avllm.config import ConfigError, RunConfig, dump_config
from avllm.data.collate import Batch
from avllm.data.items import Bad
from avllm.data.loader import Collate, Cut, MicroBatch, MicroBatches, OncePerItem, build_loader
from avllm.data.manifest import digest
from avllm.data.mixture import order_of, steps_of
from avllm.errors import UserError
from avllm.log import logger, set_up
from avllm.models.checkpoint import mark_trained
from avllm.training import optim
from avllm.training.accelerator import make_accelerator, precision_of
from avllm.training.export import Sharding, export
from avllm.training.features import use_cache
from avllm.training.progress import Clock, Report
from avllm.training.resume import FINISHED, Position, ResumePoints, check_same_run, inputs, latest, write_atomic
from avllm.training.skipped import Skipped, in_quarantine
from avllm.training.start import Parts, build_datasets, build_parts, check_rows, name_unclear, padding
from avllm.training.task import Task

LOG = logger(__name__)


BEFORE, AFTER = -1, -2  # the places of the hooks among the micro-steps, for their random numbers


class TrainingError(UserError):
    """A run that goes on but does not train: numbers that are none, or no step with a target."""


def run_stage(config: RunConfig) -> Path:
    """Train one stage and write its checkpoint into the run's folder; a finished run is left as it is.

    Started again after any interruption, the run goes on at its newest resume point and ends bit-identically (on CPU).

    Returns:
        the run's folder, which ``AVLLM.from_pretrained`` and the next stage's ``init`` read.

    Raises:
        ResumeError: the folder holds a run with other settings or data. LineageError: the stage before is missing.
        SkipRateError: too many rows are bad. RuleError: the rules of ``trainable`` do not fit the parameters.
        TrainingError: the gradient is not finite, or no step had a target.
    """
    run = Path(config.output)
    joined = distributed.active()  # a group that the caller has made outlives the stage
    accelerator = make_accelerator(config, run)
    set_up()
    here = {
        "processes": distributed.world_size(),
        "inputs": inputs(config),
        "computed_in": precision_of(accelerator),
    }
    check_same_run(run, config.model_dump(mode="json") | here)
    if (run / FINISHED).is_file():
        LOG.info("%s is a finished run; nothing to do. Delete the folder to train it again", run)
        return run
    if distributed.is_main():
        dump_config(config, run / "config.yaml")
    set_seed(config.seed)
    parts = build_parts(config)
    trainer = Trainer(config, parts, accelerator)
    try:
        trainer.train()
    except KeyboardInterrupt:
        point = latest(run)
        kept = "the beginning: train.save_every is larger" if point is None else point.name.replace("_", " ")
        LOG.warning("stopped at step %d; the same command goes on from %s", trainer.position.step, kept)
        raise
    finally:
        trainer.report.stop()
    for tracker in accelerator.trackers:
        tracker.finish()
    if not joined:
        accelerator.end_training()
    return run


class Trainer:
    """One stage, from its first step (or its newest resume point) to its checkpoint.

    Args:
        config: the stage.
        parts: model, processor and the stages before.
        accelerator: see :func:`make_accelerator`.
    """

    def __init__(self, config: RunConfig, parts: Parts, accelerator: Accelerator) -> None:
        self.config, self.parts, self.accelerator = config, parts, accelerator
        self.run, self.device = Path(config.output), accelerator.device
        self._build_data()
        self._build_task()
        self._go_on()

    def _build_data(self) -> None:
        data, train = self.config.data, self.config.train
        self.dataset, self.validation = build_datasets(self.config, self.parts)
        self.cut = Cut(train.batch_size, train.accumulate, distributed.world_size(), distributed.rank())
        self.order = order_of(self.config, self.dataset.items, distributed.world_size())
        self.steps = steps_of(self.config, self.order, distributed.world_size())
        self.warmup = round(train.warmup * self.steps) if train.warmup < 1 else round(train.warmup)
        by_deepspeed = self.accelerator.state.deepspeed_plugin is not None
        blanks = distributed.world_size() > 1 or by_deepspeed
        self.collate: Collate = padding(
            self.parts, blanks=blanks, filled=data.filled_length, max_tokens=train.max_tokens
        )
        datasets = [d for d in (self.dataset, self.validation) if d]
        name_unclear(self.config, datasets)
        self.quarantined = in_quarantine([d.items for d in datasets], data.max_skip_rate)

    def _build_task(self) -> None:
        config, train = self.config, self.config.train
        task = Task(self.parts.model, config.objectives)
        check_rows(config, task, self.dataset.maker)
        self.shares = optim.apply_rules(task, config.trainable)
        mark_trained(self.parts.model)  # before it costs anything: what trains has to fit into a checkpoint
        optim.check_lora_trains(self.shares, [settings.name for settings in config.lora])
        if train.gradient_checkpointing:
            self.parts.model.gradient_checkpointing_enable({"use_reentrant": False})
        if distributed.is_main():
            Console(stderr=True).print(optim.rule_table(task, self.shares))
        kind = self.accelerator.distributed_type
        if train.optimizer == "muon" and kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ConfigError(
                f"train.optimizer is muon under {kind.value}, which cuts matrices up; expected whole ones: take adamw, "
                "or launch without it (train/launch/ddp.yaml)"
            )
        use_cache(config, self.parts, self.dataset, self.validation, self.accelerator)
        optimizer = optim.build_optimizer(
            task, self.shares, weight_decay=train.weight_decay, betas=train.betas, kind=train.optimizer
        )
        self.bare = task
        self.task, self.optimizer = self.accelerator.prepare(task, optimizer)
        self.is_deepspeed = self.accelerator.state.deepspeed_plugin is not None

    def _go_on(self) -> None:
        self.points = ResumePoints(
            self.run, self.accelerator, self.task, self.bare, self.optimizer, self.config.train.keep
        )
        point = latest(self.run)
        self.position = self.points.load(point) if point else Position()
        if point:
            LOG.info("going on at step %d of %d, from %s", self.position.step, self.steps, point)
        here, data, items = self.position, self.config.data, self.dataset.items
        self.skipped = Skipped(self.run, data.max_skip_rate, len(items.rows), here.skipped, here.seen, here.step)
        self.skipped.set_aside(self.quarantined)
        self.report = Report(self.run, self.accelerator, self.steps, here.step)
        self.clock, self.padding = Clock(), 0.0
        if self.config.train.trackers:
            self.accelerator.init_trackers("avllm")

    # ---- the loop -------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """All steps that are left, validation and resume points between them, and the checkpoint at the end."""
        train = self.config.train
        start = self.position.step
        batches = MicroBatches(self.order, self.cut, start, self.steps)
        micros = iter(build_loader(self.dataset, batches, self.collate, self.config.data.num_workers))
        self.task.train()
        for step in range(start, self.steps):
            figures = self.step(step, self.fetch(micros))
            done = self.position.step = step + 1
            self.report.advance(done)
            if figures and (done % train.log_every == 0 or done == self.steps):
                self.report.write(done, figures | self.clock.read())
            with self.clock.paused():
                if self.validation and (done == self.steps or done % (train.validate_every or self.steps) == 0):
                    self.validate(done)
                if done == self.steps or (train.save_every and done % train.save_every == 0):
                    self.points.save(self.position)
        self.finish()

    def fetch(self, micros: Iterator[list[MicroBatch]]) -> list[MicroBatch]:
        """The micro batches of one optimizer step: all of them first, since their targets have to be counted."""
        began = time.perf_counter()
        fetched = [micro for _ in range(self.cut.accumulate) for micro in next(micros)]
        self.clock.waiting(time.perf_counter() - began)
        return self.evened(fetched)

    def evened(self, micros: list[MicroBatch]) -> list[MicroBatch]:
        """Return as many micro batches as every other process has: a limit on tokens, or variants, may differ."""
        may_differ = self.config.train.max_tokens is not None or self.dataset.maker.has_variants
        if not may_differ or distributed.world_size() == 1:
            return micros
        most = max(distributed.gather_objects(len(micros)))
        return micros + [self.collate([])[0] for _ in range(most - len(micros))]

    def step(self, step: int, micros: list[MicroBatch]) -> dict[str, float]:
        """One optimizer step; nothing (an empty dict) when no row of it, on any process, has a target."""
        totals = self.count(step, micros)
        if sum(totals) == 0:
            LOG.warning("step %d: no row with a target is left in it; passed over", step + 1)
            return {}
        factor = optim.lr_factor(
            step,
            total=self.steps,
            warmup=self.warmup,
            schedule=self.config.train.schedule,
            floor=self.config.train.min_lr_ratio,
        )
        optim.set_lr(self.optimizer, factor)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(self.on_device(step, micros)):
            # Every random number (dropout, sampled negatives) follows from the place: there is no state to resume.
            set_seed(place_seed(self.config.seed, step, number, distributed.rank()))
            last = number == len(micros) - 1
            with self.gradients_stay_here(last):
                losses, figures = self.task(batch)
                self.backward(self.combine(losses, totals) * distributed.world_size(), last)
            _add(sums, losses, figures)
        norm = self.update(step, micros)
        if self.bare.has_hook("after_step"):
            set_seed(place_seed(self.config.seed, step, AFTER, distributed.rank()))
            self.bare.after_step()
        self.position.trained += 1
        figures = {"lr": factor * _peak(self.optimizer), "grad_norm": norm, "padding": self.padding}
        return self.figures(sums, totals) | figures

    def on_device(self, step: int, micros: list[MicroBatch]) -> Iterable[Batch]:
        """Batches on the device: one after the other, or all at once after the objectives' ``before_step``."""
        batches = (micro.batch.to(self.device) for micro in micros)
        if not self.bare.has_hook("before_step"):
            return batches
        whole_step = list(batches)
        set_seed(place_seed(self.config.seed, step, BEFORE, distributed.rank()))
        with torch.no_grad():
            self.task(whole_step)
        return whole_step

    def count(self, step: int, micros: list[MicroBatch]) -> list[float]:
        """Each objective's targets in this step over all processes; bad rows are accounted for on the way."""
        weights = [sum(w) for w in zip(*(self.bare.weights(m.batch) for m in micros), strict=True)]
        bad = [b for m in micros for b in m.bad]
        masks = [m.batch.attention_mask for m in micros]
        filled, places = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
        own = [*weights, filled, places, len(bad), sum(m.seen for m in micros), sum(m.tokens for m in micros)]
        sums = distributed.sum_over_processes(torch.tensor(own, dtype=torch.float64, device=self.device)).tolist()
        *totals, filled, places, num_bad, seen, tokens = sums
        self.clock.tokens += tokens
        self.padding = 1 - filled / places
        everyones = [b for part in distributed.gather_objects(bad) for b in part] if num_bad else []
        self.skipped.add(everyones, int(seen), step + 1)
        self.position.seen, self.position.skipped = self.skipped.seen, dict(self.skipped.counts)
        return totals

    def combine(self, losses: dict[str, Tensor], totals: list[float]) -> Tensor:
        """Sums by objective -> the loss: each over its total, added up by share."""
        terms = [
            self.bare.shares[key] * loss / max(total, 1.0)
            for (key, loss), total in zip(losses.items(), totals, strict=True)
        ]
        return torch.stack([t.float() for t in terms]).sum()

    def gradients_stay_here(self, last: bool) -> AbstractContextManager[Any]:
        """Until the last micro-step, processes add up gradients without talking."""
        return nullcontext() if last or self.is_deepspeed else self.accelerator.no_sync(self.task)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Gradients of a micro-step. DeepSpeed divides by its accumulation and steps by itself at the last one."""
        if self.is_deepspeed:
            wrapped = self.accelerator.deepspeed_engine_wrapped
            wrapped.backward(loss * self.cut.accumulate, sync_gradients=last)
        elif loss.requires_grad:  # not so for rows of text alone, or of bad rows alone, before a frozen LLM
            loss.backward()

    def update(self, step: int, micros: list[MicroBatch]) -> float:
        """Clip, step, forget the gradients; returns the norm before clipping.

        Raises:
            TrainingError: the norm is not finite, which would make every weight so.
        """
        if self.is_deepspeed:
            norm = float(self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm() or 0.0)
        else:
            parameters = [p for p in self.task.parameters() if p.requires_grad]
            for p in parameters:  # a stream that no row has: zero, as with several processes, and not left out
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            norm = float(self.accelerator.clip_grad_norm_(parameters, self.config.train.clip or math.inf))
        if not math.isfinite(norm):
            rows = [row for micro in micros for row in micro.batch.ids]
            raise TrainingError(
                f"step {step + 1}: the gradient's norm is {norm}; rows of this process: {', '.join(rows[:8])}. "
                "Lower the learning rate or warm up longer; the last resume point is from before"
            )
        if not self.is_deepspeed:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return norm

    def figures(self, sums: dict[str, Tensor], totals: list[float]) -> dict[str, float]:
        """Loss and further means over all processes."""
        values = distributed.sum_over_processes(torch.stack([v.detach().double() for v in sums.values()])).tolist()
        by_name = dict(zip(sums, values, strict=True))
        total_of = dict(zip(self.bare.shares, totals, strict=True))
        loss = sum(self.bare.shares[k] * by_name[k] / max(t, 1.0) for k, t in total_of.items())
        means = {name: value / max(total_of[name.partition("/")[0]], 1.0) for name, value in by_name.items()}
        return {"loss": loss, **means}

    # ---- between and after the steps ------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """The same figures on the validation rows, in eval mode; the best model so far is kept in ``best/``."""
        self.task.eval()
        dataset = self.validation
        assert dataset is not None
        count = min(len(dataset), self.config.train.validate_rows or len(dataset))
        loader = build_loader(dataset, OncePerItem(count, self.cut), self.collate, self.config.data.num_workers)
        sums: dict[str, Tensor] = {}
        weights = torch.zeros(len(self.bare.shares), dtype=torch.float64, device=self.device)
        bad: list[Bad] = []
        for micro in (micro for found in loader for micro in self.evened(found)):
            bad += micro.bad
            weights += torch.tensor(self.bare.weights(micro.batch), dtype=torch.float64, device=self.device)
            _add(sums, *self.task(micro.batch.to(self.device)))
        totals = distributed.sum_over_processes(weights).tolist()
        figures = self.figures(sums, totals)
        self.task.train()
        left_out = self.skipped.in_validation(bad)
        if not sum(totals):  # a loss of 0 would be the best for ever
            LOG.warning("step %d: no validation row has a target, so there is no figure", step)
            return
        self.report.write(step, {f"validation/{k}": v for k, v in {**figures, "left_out": left_out}.items()})
        if self.position.best is None or figures["loss"] < self.position.best:
            self.position.best = figures["loss"]
            self.export(self.run / "best")

    def export(self, folder: Path) -> None:
        """Write a checkpoint of the model as it is now."""
        mark_trained(self.parts.model)
        record = {
            "stage": self.config.stage,
            "init": self.config.init,
            "steps": self.position.step,
            "processes": distributed.world_size(),
            "precision": precision_of(self.accelerator),
            "settings": self.config.model_dump(mode="json"),
            "data": {s.manifest: digest(s.manifest) for s in self.config.data.train},
            "skipped": self.position.skipped,
        }
        export(folder, self.parts, self.bare, record, self._sharding())

    def _sharding(self) -> Sharding:
        if self.points.kind == "FSDP":
            return "fsdp"
        by_zero3 = self.is_deepspeed and self.task.zero_optimization_stage() == 3
        return "zero3" if by_zero3 else "whole"

    def finish(self) -> None:
        """Write the checkpoint into the run's folder, the loss curve, and the mark that the run is done."""
        self.skipped.check()
        if not self.position.trained:
            raise TrainingError(
                f"none of the {self.steps} steps of {self.run} had a row with a target, so nothing was trained. "
                f"Left out: {self.skipped.summary()}. Look at the manifests, and at what the objectives ask for"
            )
        self.export(self.run)
        self.report.close()
        if distributed.is_main():
            LOG.info("left out: %s", self.skipped.summary())
            write_atomic(self.run / FINISHED, json.dumps({"steps": self.steps, "best_validation": self.position.best}))
        distributed.barrier()


def place_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """A 31-bit seed for one micro-step of one process (mixed as in SplitMix64: neighbours share nothing)."""
    value = (((seed * 1_000_003 + step) * 1_000_003 + micro) * 1_000_003 + rank) & (2**64 - 1)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        value = ((value ^ (value >> 30)) * factor) & (2**64 - 1)
    return (value ^ (value >> 31)) & 0x7FFFFFFF


def _add(sums: dict[str, Tensor], *parts: dict[str, Tensor]) -> None:
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()


def _peak(optimizer: Any) -> float:
    return max(group["peak_lr"] for group in optimizer.param_groups)
