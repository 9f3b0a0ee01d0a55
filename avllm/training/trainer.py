"""Run the training loop. It reads objectives by their sums and weights, never by name."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor

from avllm import distributed
from avllm.config import RunConfig
from avllm.data.collate import Batch
from avllm.data.items import Bad
from avllm.data.loader import Collate, Cut, MicroBatch, MicroBatches, build_loader, end_workers
from avllm.data.mixture import order_of, steps_of
from avllm.data.store.append_only import write_whole
from avllm.errors import Stopped, UserError, about_setting
from avllm.log import logger, set_up
from avllm.models.checkpoint import mark_trained
from avllm.training import optim
from avllm.training.accelerator import make_accelerator, precision_of, tracked_run
from avllm.training.accounting import (
    StepCounts,
    add_to_sums,
    check_best_by,
    chosen_figure,
    count_step,
    even_out,
    is_better,
    step_means,
    weighted_loss,
)
from avllm.training.engine import Engine
from avllm.training.export import export, stage_record
from avllm.training.features import use_cache
from avllm.training.points.begin import FINISHED, RunStart, begin
from avllm.training.points.lock import RunLock
from avllm.training.points.position import RunPosition
from avllm.training.points.record import with_weights
from avllm.training.points.store import ResumePoints
from avllm.training.points.whole import latest
from avllm.training.progress import Clock, Report, StopRequest, warn_of_stop
from avllm.training.schedule import Schedule, say_longer
from avllm.training.seeds import AFTER_STEP, BEFORE_STEP, VALIDATION, place_seed
from avllm.training.skipped import Skipped, in_quarantine
from avllm.training.start import (
    Parts,
    build_datasets,
    build_parts,
    check_comparisons,
    check_rows,
    name_unclear,
    padding,
    validation_loader,
)
from avllm.training.task import Task

LOG = logger(__name__)


class TrainingError(UserError):
    """A run that does not train: its gradient is not finite, or no step has a target."""


def run_stage(config: RunConfig) -> Path:
    """Train one stage and write its checkpoint into the run's folder.

    A finished run is left unchanged, unless its length has grown; any other goes on at its newest
    whole resume point, bit-identically.

    Returns:
        The run's folder, which ``AVLLM.from_pretrained`` and the next stage's ``init`` read.

    Raises:
        RunInUseError: another run is writing into the folder.
        ResumeError: the folder holds a run with other settings or data, or damaged resume points.
        LineageError: the stage before is missing.
        SkipRateError: too many rows are bad.
        RuleError: the rules of ``trainable`` do not fit the parameters.
        TrainingError: the gradient is not finite, or no step had a target.
        WriteError: the folder cannot be written to.
    """
    run = Path(config.output)
    group_is_the_callers = distributed.active()  # such a group outlives the stage
    accelerator = make_accelerator(config, run)
    set_up()
    with RunLock(run):
        start = begin(config, run, precision_of(accelerator))
        if not start.is_finished:
            with tracked_run(accelerator, start.config):
                set_seed(config.seed)
                _train(Trainer(build_parts(start.config), accelerator, start))
            if not group_is_the_callers:
                accelerator.end_training()
    return run


def _train(trainer: Trainer) -> None:
    try:
        with StopRequest() as stop:
            trainer.train(stop)
    except KeyboardInterrupt:
        warn_of_stop(trainer.position.step, latest(trainer.run))
        raise
    finally:
        trainer.report.stop()


class Trainer:
    """Train one stage from its first step (or its newest resume point) to its checkpoint.

    Args:
        parts: model, processor and the stages before.
        accelerator: see :func:`make_accelerator`.
        start: the stage, and where it begins.
    """

    def __init__(self, parts: Parts, accelerator: Accelerator, start: RunStart) -> None:
        self.config = start.config
        self.parts = parts
        self.accelerator = accelerator
        self.run = Path(self.config.output)
        self.device = accelerator.device
        self._build_data()
        self._build_task()
        self._go_on(start)

    def _build_data(self) -> None:
        data = self.config.data
        train = self.config.train
        processes = distributed.world_size()
        with about_setting("data"):
            self.dataset, self.validation = build_datasets(self.config, self.parts)
        self.cut = Cut(train.batch_size, train.accumulate, processes, distributed.rank())
        self.order = order_of(self.config, self.dataset.items, processes)
        self.steps = steps_of(self.config, self.order, processes)
        self.schedule = Schedule.of(self.config, self.steps)
        by_deepspeed = self.accelerator.state.deepspeed_plugin is not None
        self.collate: Collate = padding(
            self.parts,
            blanks=processes > 1 or by_deepspeed,
            filled=data.filled_length,
            max_tokens=train.max_tokens,
        )
        datasets = [d for d in (self.dataset, self.validation) if d]
        name_unclear(self.config, datasets)
        self.quarantined = in_quarantine([d.items for d in datasets], data.max_skip_rate)

    def _build_task(self) -> None:
        config = self.config
        train = config.train
        task = Task(self.parts.model, config.objectives)
        check_rows(config, task, self.dataset.maker)
        check_comparisons(config, task, self.dataset.items.sizes, distributed.world_size())
        check_best_by(train.best_by, dict(task.objectives.items()), self.validation is not None)
        self.shares = optim.apply_rules(task, config.trainable)
        optim.check_objectives_train(self.shares, task.objectives)
        # Before training costs anything: the parameters that train have to fit into a checkpoint.
        mark_trained(self.parts.model)
        added = [settings.name for settings in config.sets]
        optim.check_lora_trains(self.shares, added, self.parts.model.config.active_lora)
        if train.gradient_checkpointing:
            self.parts.model.gradient_checkpointing_enable({"use_reentrant": False})
        if distributed.is_main():
            Console(stderr=True).print(optim.rule_table(task, self.shares))
        optim.check_whole_matrices(train.optimizer, self.accelerator.distributed_type)
        use_cache(config, self.parts, self.dataset, self.validation, self.accelerator)
        optimizer = optim.build_optimizer(
            task,
            self.shares,
            weight_decay=train.weight_decay,
            betas=train.betas,
            kind=train.optimizer,
        )
        self.bare = task
        self.task, self.optimizer = self.accelerator.prepare(task, optimizer)
        self.engine = Engine(
            self.accelerator, self.task, self.optimizer, train.accumulate, train.clip
        )

    def _go_on(self, start: RunStart) -> None:
        self.points = ResumePoints(
            self.run,
            self.accelerator,
            self.task,
            self.bare,
            self.optimizer,
            self.config.train.keep,
            distributed.from_main(lambda: with_weights(start.record, self.config)),
        )
        self.position = RunPosition(warmup=self.schedule.warmup)
        if start.point:
            self.position = self.points.load(start.point)
            self.schedule = replace(self.schedule, warmup=self.position.warmup)
            where = (self.position.step, self.steps, start.point.folder)
            LOG.info("going on at step %d of %d, from %s", *where)
        if start.longer:
            peak = optim.peak_lr(self.optimizer)
            say_longer(
                start.longer, self.config, self.order, self.schedule, self.position.step, peak
            )
        self.skipped = Skipped(
            self.run,
            self.config.data.max_skip_rate,
            len(self.dataset.items.rows),
            self.position.skipped,
            self.position.seen,
            self.position.step,
        )
        self.skipped.set_aside(self.quarantined)
        self.report = Report(self.run, self.accelerator, self.steps, self.position.step)
        self.clock = Clock()

    def train(self, stop: StopRequest) -> None:
        """Run the steps that are left, or until a stop; validate, save and export."""
        batches = MicroBatches(self.order, self.cut, self.position.step, self.steps)
        num_workers = self.config.data.num_workers
        micros = iter(build_loader(self.dataset, batches, self.collate, num_workers))
        try:
            self._run_steps(micros, stop)
        finally:
            end_workers(micros)
        self.finish()

    def _run_steps(self, micros: Iterator[list[MicroBatch]], stop: StopRequest) -> None:
        train = self.config.train
        self.task.train()
        for step in range(self.position.step, self.steps):
            figures = self.step(step, self.fetch(micros))
            done = step + 1
            self.position.step = done
            self.report.advance(done)
            if figures and self.is_due(train.log_every):
                self.report.write(done, figures | self.clock.read())
            with self.clock.paused():
                if self.validation and self.is_due(train.validate_every):
                    self.validate(done)
                stopping = done < self.steps and stop.was_made(self.device)
                if stopping or self.is_due(train.save_every):
                    self.points.save(self.position)
            if stopping:
                raise Stopped(stop.number)

    def is_due(self, every: int | None) -> bool:
        """Return whether the run has done a multiple of ``every`` steps, or all of them."""
        done = self.position.step
        return done == self.steps or bool(every and done % every == 0)

    def fetch(self, micros: Iterator[list[MicroBatch]]) -> list[MicroBatch]:
        """Return all micro batches of one optimizer step: their targets are counted before it."""
        began = time.perf_counter()
        fetched = [micro for _ in range(self.cut.accumulate) for micro in next(micros)]
        self.clock.waiting(time.perf_counter() - began)
        return self.evened(fetched)

    def evened(self, micros: list[MicroBatch]) -> list[MicroBatch]:
        """Give every process the same number: it may differ with max_tokens and with variants."""
        if self.config.train.max_tokens is None and not self.dataset.maker.has_variants:
            return micros
        return even_out(micros, self.collate)

    def step(self, step: int, micros: list[MicroBatch]) -> dict[str, float]:
        """Take one optimizer step and return its figures.

        An empty dict means that no row of the step, on any process, has a target: no step is taken.
        """
        counts = self.count(step, micros)
        if sum(counts.targets) == 0:
            LOG.warning("step %d: no row with a target is left in it; passed over", step + 1)
            return {}
        factor = self.schedule.factor(step)
        optim.set_lr(self.optimizer, factor)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(self.on_device(step, micros)):
            # Random numbers (dropout, sampled negatives) follow from the place, not from a state.
            set_seed(place_seed(self.config.seed, step, number, distributed.rank()))
            last = number == len(micros) - 1
            with self.engine.gradients_stay_here(last):
                losses, figures = self.task(batch)
                loss = weighted_loss(losses, counts.targets, self.bare.shares)
                self.engine.backward(loss * distributed.world_size(), last)
            add_to_sums(sums, losses)
            add_to_sums(sums, figures)
        norm = self.update(step, micros)
        if self.bare.has_hook("after_step"):
            set_seed(place_seed(self.config.seed, step, AFTER_STEP, distributed.rank()))
            self.bare.after_step()
        self.position.trained += 1
        means = step_means(sums, counts.targets, self.bare.shares)
        lr = factor * optim.peak_lr(self.optimizer)
        return means | {"lr": lr, "grad_norm": norm, "padding": counts.padding}

    def on_device(self, step: int, micros: list[MicroBatch]) -> Iterable[Batch]:
        """Move batches to the device, one by one.

        Objectives with a ``before_step`` read the whole step first, so all its batches are moved.
        """
        batches = (micro.batch.to(self.device) for micro in micros)
        if not self.bare.has_hook("before_step"):
            return batches
        whole_step = list(batches)
        set_seed(place_seed(self.config.seed, step, BEFORE_STEP, distributed.rank()))
        with torch.no_grad():
            self.task(whole_step)
        return whole_step

    def count(self, step: int, micros: list[MicroBatch]) -> StepCounts:
        """Count the step over all processes; record its tokens, seen rows and bad rows.

        Raises:
            SkipRateError: too many rows are bad.
        """
        counts = count_step(self.bare, micros, self.device)
        self.clock.tokens += counts.tokens
        self.skipped.add(counts.bad, counts.seen, step + 1)
        self.position.seen = self.skipped.seen
        self.position.skipped = dict(self.skipped.counts)
        return counts

    def update(self, step: int, micros: list[MicroBatch]) -> float:
        """Clip the gradients, take the optimizer's step, and return the norm before clipping.

        Raises:
            TrainingError: the norm is not finite, which would make every weight so.
        """
        norm = self.engine.clip_gradients()
        if not math.isfinite(norm):
            rows = [row for micro in micros for row in micro.batch.ids]
            raise TrainingError(
                f"step {step + 1}: the gradient's norm is {norm}; expected a finite number. Rows "
                f"of this process: {', '.join(rows[:8])}. Lower the learning rate or warm up "
                "longer; the last resume point was written before this step"
            )
        self.engine.step()
        return norm

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Write the figures of the validation rows; keep the best model so far in ``best/``."""
        self.task.eval()
        assert self.validation is not None
        loader = validation_loader(self.config, self.validation, self.cut, self.collate)
        sums: dict[str, Tensor] = {}
        targets = torch.zeros(len(self.bare.shares), dtype=torch.float64, device=self.device)
        bad: list[Bad] = []
        for number, micros in enumerate(loader):
            set_seed(place_seed(self.config.seed, VALIDATION, number, distributed.rank()))
            for micro in self.evened(micros):
                bad += micro.bad
                weights = self.bare.weights(micro.batch)
                targets += torch.tensor(weights, dtype=torch.float64, device=self.device)
                losses, further = self.task(micro.batch.to(self.device))
                add_to_sums(sums, losses)
                add_to_sums(sums, further)
        total_targets = distributed.sum_over_processes(targets).tolist()
        figures = step_means(sums, total_targets, self.bare.shares)
        self.task.train()
        figures["left_out"] = self.skipped.in_validation(bad)
        if not sum(total_targets):  # a loss of 0 would be the best for ever
            LOG.warning("step %d: no validation row has a target, so there is no figure", step)
            return
        self.report.write(step, {f"validation/{name}": value for name, value in figures.items()})
        best = chosen_figure(figures, self.config.train.best_by)
        if is_better(best, self.position.best, self.config.train.best_by):
            self.position.best = best
            self.export(self.run / "best")

    def export(self, folder: Path) -> None:
        """Write a checkpoint of the model's present state."""
        mark_trained(self.parts.model)
        record = stage_record(self.config, self.position, precision_of(self.accelerator))
        export(folder, self.parts, self.bare, record, self.engine.sharding())

    def finish(self) -> None:
        """Write the checkpoint, the loss curve, and the mark that the run is done."""
        self.skipped.check()
        if not self.position.trained:
            raise TrainingError(
                f"none of the {self.steps} steps of {self.run} had a row with a target, so nothing "
                f"was trained. Left out: {self.skipped.summary()}. Look at the manifests, and at "
                "what the objectives ask for"
            )
        self.export(self.run)
        self.report.close()
        if distributed.is_main():
            LOG.info("left out: %s", self.skipped.summary())
            outcome = {"steps": self.steps, "best_validation": self.position.best}
            write_whole(self.run / FINISHED, json.dumps(outcome))
        distributed.barrier()
