"""The training loop on Lightning Fabric. Losses do not depend on the number of processes or on resuming."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

import deco_kernels
from deco_kernels.training import checkpoints, checks, paths, setup
from deco_kernels.training.config import TrainConfig, to_dict, to_yaml
from deco_kernels.training.images import to_signed
from deco_kernels.training.loading import Batch, Item, loader, without_worker_traceback
from deco_kernels.training.module import draw_per_image
from deco_kernels.training.report import Report

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def train(
    config: TrainConfig,
    resume: str = "never",
    teacher: setup.Teacher | None = None,
    encoder: setup.Encoder | None = None,
) -> None:
    """Train as configured, up to config.steps.

    Args:
        config: the configuration.
        resume: "never" (the run's folder must hold no checkpoint), "auto" (continue from the newest readable checkpoint
            in the run's folder, or start a new run if there is none) or the path of a checkpoint.
        teacher: teacher of the alignment loss, instead of the configured one; see `flow.Alignment`.
        encoder: caption encoder of text models, instead of the configured one.

    Raises:
        ValueError, TypeError, OSError: configuration, data or teacher cannot be used.
        checkpoints.CheckpointError: a checkpoint cannot be read or written, or belongs to another model.
        FloatingPointError: the loss or the gradient norm is not finite; earlier checkpoints are kept.
    """
    with deco_kernels.use_backend(config.backend) if config.backend else contextlib.nullcontext():
        try:
            _train(config, resume, teacher, encoder)
        finally:
            if dist.is_initialized():
                # The reducer of DDP also owns the process group. If it is freed last, it waits for the group's threads
                # while it holds the GIL that they need, so the wrapped model must be gone before the group is.
                gc.collect()
                dist.destroy_process_group()


def _train(config: TrainConfig, resume: str, teacher: setup.Teacher | None, encoder: setup.Encoder | None) -> None:
    paths.check(config, resume, pretrained=teacher is None)
    content = setup.find_checkpoint(config, resume)
    checks.check(config, pretrained=encoder is None)
    fabric = setup.launch(config)
    parts = setup.prepare(config, fabric, teacher, encoder, resumed=content is not None)
    if content is not None:
        checkpoints.restore(content, parts.progress)
        if fabric.is_global_zero:
            setup.warn_of_changes(content, config)
    _Run(config, fabric, parts).loop()


class _Run:
    """A prepared run, from its current step to the last."""

    def __init__(self, config: TrainConfig, fabric: Fabric, parts: setup.Parts):
        self.config, self.fabric, self.parts, self.progress = config, fabric, parts, parts.progress
        self.names = ["total", "pixel", "frequency"] + (["repa"] if parts.objective.repa else [])
        self.folder = paths.checkpoint_folder(config).parent
        self.generator = torch.Generator(fabric.device)
        self.unreported = dict(parts.source.left_out)
        self.report: Report | None = None
        if fabric.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            self.report = Report(self.folder, self.progress.step, config.steps)

    def loop(self) -> None:
        """Train up to the last step."""
        config, progress = self.config, self.progress
        if self.report:
            self.report.line(self._described())
        batches, clock = iter(self._loader()), _Clock()
        while progress.step < config.steps:
            with clock.waiting(), without_worker_traceback():
                batch = [next(batches) for _ in range(config.accumulate)]
            losses, norm = self._step(batch)
            progress.step += 1
            if self.report:
                self.report.step()
            if self._due(config.log_every) or self._due(config.save_every):
                self._log(losses, norm, clock)
            if self._due(config.save_every):
                self._save()
            if config.sample.every and self._due(config.sample.every):
                self._sample()
        if self.report:
            self.report.line(f"finished {config.steps} steps; the model is in {paths.checkpoint_folder(config)}")
            self.report.close()

    def _described(self) -> str:
        """One-line summary of the run: device, data, steps, folder."""
        config, fabric, first = self.config, self.fabric, self.progress.step
        on = f"{fabric.world_size} x {fabric.device.type}" if fabric.world_size > 1 else str(fabric.device)
        data = f"{len(self.parts.source):,} images of {config.data.path} at {config.image_size} pixels"
        steps = f"steps {first + 1} to {config.steps} of {config.batch_size} images"
        return f"training {config.model.name} on {on} with {data}, {steps}, into {self.folder}"

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def _loader(self) -> DataLoader[Item]:
        fabric, parts = self.fabric, self.parts
        ranks = dict(rank=fabric.global_rank, world_size=fabric.world_size)
        pin = fabric.device.type == "cuda"
        return loader(self.config, parts.source, parts.plan, self.progress.step, **ranks, pin=pin)

    def _step(self, batch: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Update the weights once. Returns this process's losses, ordered as `names`, and the global gradient norm."""
        fabric, parts, optimizer = self.fabric, self.parts, self.parts.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self._rate()
        found = torch.zeros(len(self.names), device=fabric.device)
        for number, part in enumerate(batch, start=1):
            self.unreported |= part.skipped
            moved = part.to(fabric.device)
            x, y = to_signed(moved.images), self._conditions(moved.targets)
            y, t, noise = draw_per_image(parts.objective, x, y, part.samples.tolist(), self.config.seed, self.generator)
            with self._synchronized(number == len(batch)):
                losses = parts.forward(x, y, t, noise)
                fabric.backward(losses["total"] / len(batch))
            found += torch.stack([losses[name].detach() for name in self.names])
        norm = clip_grad_norm_(self.progress.module.parameters(), self.config.optimizer.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.progress.average.update()
        return found / len(batch), norm

    def _conditions(self, targets: torch.Tensor | list[str]) -> torch.Tensor:
        """Labels on the device, or the text features of captions."""
        if isinstance(targets, torch.Tensor):
            return targets.to(self.fabric.device)
        assert self.parts.encoder is not None
        return self.parts.encoder(targets)

    def _rate(self) -> float:
        given = self.config.optimizer
        return given.lr * min(1.0, (self.progress.step + 1) / max(1, given.warmup_steps))

    def _synchronized(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Context that synchronizes gradients across processes only in the last part of a step."""
        if self.fabric.world_size == 1:
            return contextlib.nullcontext()
        return self.fabric.no_backward_sync(self.parts.forward, enabled=not last)

    def _log(self, losses: torch.Tensor, norm: torch.Tensor, clock: _Clock) -> None:
        """Record mean losses, speed, and images skipped since the last call. Collective."""
        losses = self.fabric.all_reduce(losses, reduce_op="mean").tolist()
        size = checkpoints.whole(norm).item()
        seconds, waiting = clock.read()
        self._report_skipped()
        progress, step = self.progress, self.progress.step
        if not (math.isfinite(losses[0]) and math.isfinite(size)):  # the weights are or will become non-finite
            raise FloatingPointError(
                f"the loss of step {step} is {losses[0]} and its gradient norm is {size}; nothing is saved from "
                "here on. Lower optimizer.lr or set optimizer.clip_norm, and resume"
            )
        if self.report:
            steps = step - self.report.last_logged
            values = dict(zip(self.names, losses, strict=True))
            lr = self.parts.optimizer.param_groups[0]["lr"]
            speed = {
                "seconds_per_step": seconds / steps,
                "images_per_second": steps * self.config.batch_size / seconds,
                "waiting": waiting / seconds,
            }
            self.report.metrics(progress.step, {**values, "gradient_norm": size, "lr": lr, **speed})

    def _report_skipped(self) -> None:
        """Report every skipped image of all processes, once per run. Collective."""
        met = [self.unreported]
        if self.fabric.world_size > 1:
            met = [{}] * self.fabric.world_size
            dist.all_gather_object(met, self.unreported)
        self.unreported = {}
        for name, reason in (item for each in met for item in each.items()):
            if name not in self.progress.skipped and self.report:
                self.report.message(f"skipped {name}: {reason}")
            self.progress.skipped[name] = reason

    def _save(self) -> None:
        failure = None
        try:
            checkpoints.save(
                self.progress,
                to_dict(self.config),
                paths.checkpoint_folder(self.config),
                self.config.keep,
                writer=self.fabric.is_global_zero,
            )
        except checkpoints.CheckpointError as error:
            failure = str(error)
        failure = self.fabric.broadcast(failure)
        if failure is not None:
            raise checkpoints.CheckpointError(failure)

    def _sample(self) -> None:
        """Record a grid of samples from the EMA weights. Every process computes it, as sharded weights require."""
        given, size, encoder = self.config.sample, self.config.image_size, self.parts.encoder
        if encoder is None:
            cond, null_label = self._conditions(torch.tensor(self.parts.shown)), self.parts.objective.null_label
            assert isinstance(null_label, int)
            uncond = torch.full_like(cond, null_label)
        else:
            cond = self._conditions([str(prompt) for prompt in self.parts.shown])
            uncond = encoder.empty_prompt.expand_as(cond)
        noise = torch.randn(given.count, 3, size, size, generator=torch.Generator().manual_seed(self.config.seed))
        with self.progress.average.swapped():
            sampler = setup.make_sampler(given, lambda x, t, y: self.parts.forward(x, y, t))
            images = sampler(noise.to(cond.device), cond, uncond)
        assert isinstance(images, torch.Tensor)
        if self.report:
            self.report.samples(self.progress.step, images)


class _Clock:
    """Measures elapsed seconds, and seconds spent waiting for data, between readings."""

    def __init__(self) -> None:
        self._started, self._waited = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def read(self) -> tuple[float, float]:
        now = time.perf_counter()
        passed = now - self._started, self._waited
        self._started, self._waited = now, 0.0
        return passed
