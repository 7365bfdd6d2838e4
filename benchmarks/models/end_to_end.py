"""A complete training step and complete sampling of DeCo vs. the published formulation and the limit.

The contenders share the parameters of one model, one optimizer and one weight average, and differ only in decoder and
loss. In training a backend computes both as one op, whose part "decoder" contains the loss and most of its backward; as
two ops it has a row of its own. The limit omits decoder and loss: its training step backpropagates a given gradient of
the tokens through the trunk, and its sampling uses the image as the velocity. A step ends after the update of the
averaged weights.
"""

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.harness.clock import Clock, Marks
from benchmarks.harness.measure import Options, statistics_of
from benchmarks.harness.timing import interleaved
from benchmarks.harness.verification import SEED, can_be_timed, flagged, refusal
from benchmarks.names import COMPILED, LIMIT, PUBLISHED, SAMPLING, TRAINING_STEP, TWO_OPS
from deco_kernels import flow, model, ops
from deco_kernels.testing import published, relative_error

GUIDANCE = 3.2
_EMA_DECAY = 0.9999
_LEARNING_RATE = 1e-4
_TOLERANCE = 1e-4  # float32 rounding, allowed in addition to 1.5 times the published formulation's relative error


@dataclasses.dataclass(frozen=True)
class Case:
    """One case to time. `steps` is the number of sampler steps; all but the first are guided."""

    preset: str
    pass_: str
    batch: int
    image_size: int = 256
    steps: int = 10


CASES = {
    "cpu": (
        Case("deco-demo", TRAINING_STEP, 8, 128),
        Case("deco-demo", SAMPLING, 1, 256, steps=4),
    ),
    "cuda": tuple(
        Case(preset, pass_, batch)
        for preset in ("deco-l/16", "deco-xl/16")
        for pass_ in (TRAINING_STEP, SAMPLING)
        for batch in (32, 1)
    ),
}


@dataclasses.dataclass
class Contender:
    """`network` is the model with this contender's decoder.

    `loss` maps (pred, target) to total; None for the limit, and for a network that is asked for its losses (`fused`).
    """

    name: str
    network: nn.Module
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    fused: bool = False


class _Marked(nn.Module):
    """A decoder with clock marks before and after its forward, and when its backward has the gradient of the tokens."""

    def __init__(self, decoder: nn.Module, clock: Clock):
        super().__init__()
        self.decoder, self.clock = decoder, clock

    def forward(self, image: torch.Tensor, tokens: torch.Tensor, **asked: model.TrainingLoss):
        self.clock.mark("trunk")
        if tokens.requires_grad:
            tokens.register_hook(lambda gradient: self.clock.mark("backward of decoder and loss"))
        result = self.decoder(image, tokens, **asked)
        self.clock.mark("decoder")
        return result


class _NoDecoder(nn.Module):
    """Returns the tokens in training and the image in sampling."""

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if torch.is_grad_enabled() else image


class Workload:
    """Model, optimizer, averaged weights and batch of one case."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str):
        self.case, self.device = case, device
        self.autocast_dtype = None if dtype is torch.float32 else dtype
        torch.manual_seed(SEED)
        with torch.device(device):
            self.model = model.build(case.preset)
            fill_zeros(self.model.decoder)
            self.images = torch.rand(case.batch, 3, case.image_size, case.image_size) * 2 - 1
            self.labels = torch.arange(case.batch) % self.model.null_label
            weight = ops.jpeg_frequency_weight().to(device)
        self.objective = flow.Objective(weight)
        self.clock = Clock(device)
        if case.pass_ == TRAINING_STEP:
            options = dict(lr=_LEARNING_RATE, weight_decay=0.0, fused=True)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)
            self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(_EMA_DECAY))

    def contenders(self, backends: tuple[str, ...], compiled: bool) -> list[Contender]:
        def network(decoder, **parts):
            return with_parts(self.model, decoder=_Marked(decoder, self.clock), **parts)

        eager = published.eager_view(self.model.decoder)
        found = [Contender(PUBLISHED, network(eager), self._published_loss)]
        if compiled:
            parts = (self.model.trunk, eager, published.losses)
            trunk, decoder, loss = (torch.compile(part, dynamic=False) for part in parts)
            loss_of = functools.partial(self._published_loss, function=loss)
            found.append(Contender(COMPILED, network(decoder, trunk=trunk), loss_of))
        for backend in backends:
            decoder = network(backend_view(self.model.decoder, backend))
            found.append(Contender(backend, decoder, None, fused=True))
            if self.case.pass_ == TRAINING_STEP:
                found.append(Contender(backend + TWO_OPS, decoder, self.fused_loss(backend)))
        found.append(Contender(LIMIT, network(_NoDecoder()), None))
        return found

    def _published_loss(self, pred, target, function=published.losses) -> torch.Tensor:
        return function(pred, target, self.objective.frequency_weight)[0]

    def fused_loss(self, backend: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        weight = self.objective.frequency_weight
        return lambda pred, target: ops.flow_matching_loss(pred, target, weight, backend=backend)[0]

    def precision(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.autocast_dtype)

    def gradients(self, contender: Contender) -> torch.Tensor:
        """Forward, loss and backward; returns the loss, or the tokens for the limit."""
        labels, times, noise = self.objective.draw(self.images, self.labels)
        x_t, target = flow.interpolate(self.images, noise, times)
        self.clock.mark("draw")
        asked = {"loss": model.TrainingLoss(target, self.objective.frequency_weight)} if contender.fused else {}
        with self.precision():
            result = contender.network(x_t, times, labels, **asked)
        if contender.name == LIMIT:
            result.backward(torch.ones_like(result))
        else:
            result = result[0] if contender.fused else contender.loss(result, target)
            self.clock.mark("loss")
            result.backward()
        self.clock.mark("backward of trunk")
        return result

    def training_step(self, contender: Contender) -> None:
        self.clock.start()
        self.optimizer.zero_grad(set_to_none=True)
        self.gradients(contender)
        self.optimizer.step()
        self.clock.mark("optimizer")
        self.averaged.update_parameters(self.model)
        self.clock.mark("average")

    def sample(self, contender: Contender) -> torch.Tensor:
        def velocity(x, t, y):
            self.clock.mark("solver")
            with self.precision():
                return contender.network(x, t, y)

        self.clock.start()
        null = torch.full_like(self.labels, self.model.null_label)
        steps = dict(steps=self.case.steps, guidance=GUIDANCE)
        samples = flow.sample(velocity, self.images, self.labels, null, **steps)
        self.clock.mark("solver")
        return samples


def backend_view(decoder: model.PixelDecoder, backend: str) -> model.PixelDecoder:
    """A shallow copy of the decoder, with shared parameters and another backend."""
    view = copy.copy(decoder)
    view.backend = backend
    return view


def with_parts(network: nn.Module, **parts: nn.Module) -> nn.Module:
    """A shallow copy of the network, with shared parameters and the given submodules replaced."""
    view = copy.copy(network)
    view._modules = {**network._modules, **parts}
    return view


@torch.no_grad()
def fill_zeros(decoder: nn.Module) -> None:
    """Replaces all-zero parameters of a new decoder by random values: otherwise its output and most gradients are 0."""
    for parameter in decoder.parameters():
        if not parameter.any():
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))


def measure_end_to_end(case: Case, dtype: torch.dtype, options: Options) -> list[dict]:
    """One row per contender: total time and time of each part."""
    try:
        workload = Workload(case, dtype, options.device)
        contenders = workload.contenders(options.backends, bool(options.compiled))
        refused = _refusals(workload, contenders, case)
        running = [contender for contender in contenders if can_be_timed(refused, contender.name)]
        rows = flagged(_timed(workload, running, options), refused)
    except torch.OutOfMemoryError as error:
        reason = f"does not fit the GPU's memory: {str(error).splitlines()[0]}"
        refused, rows = dict.fromkeys((PUBLISHED, *options.backends), ("unavailable", reason)), []
    what = {"preset": case.preset, "pass": case.pass_, "batch": case.batch, "image_size": case.image_size}
    what["dtype"] = str(dtype).removeprefix("torch.")
    if case.pass_ == SAMPLING:
        what["steps"] = case.steps
    timed = {row["contender"] for row in rows}
    rows += flagged([{"contender": name} for name in refused if name not in timed], refused)
    return [what | row for row in rows]


def _timed(workload: Workload, contenders: list[Contender], options: Options) -> list[dict]:
    run = workload.training_step if workload.case.pass_ == TRAINING_STEP else workload.sample
    marks: dict[str, list[Marks]] = {contender.name: [] for contender in contenders}

    def call(contender):
        run(contender)
        marks[contender.name].append(workload.clock.take())

    calls = [lambda count, contender=contender: call(contender) for contender in contenders]
    times = interleaved(calls, options.device, options.budget_s, options.min_rounds)
    rows = []
    for contender, ms in zip(contenders, times, strict=True):
        parts = _medians([workload.clock.parts(each) for each in marks[contender.name][2:]])
        rows.append({"contender": contender.name, "status": "ok", "reason": None, "parts": parts} | statistics_of(ms))
    return rows


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Median milliseconds of every part over the rounds."""
    return {name: torch.tensor([each[name] for each in rounds]).median().item() for name in rounds[0]}


def _refusals(workload: Workload, contenders: list[Contender], case: Case) -> dict[str, tuple[str, str]]:
    """(status, reason) of contenders that raise, or whose error of loss or gradients against the published
    formulation in float32 exceeds 1.5 times its own error at the timed precision plus _TOLERANCE."""
    autocast, workload.autocast_dtype = workload.autocast_dtype, None
    exact = _results(workload, contenders[0], case)
    workload.autocast_dtype = autocast
    refused, limits = {}, dict.fromkeys(exact, _TOLERANCE)
    for contender in contenders:
        if contender.name == LIMIT:
            continue
        try:
            found = _results(workload, contender, case)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            refused[contender.name] = refusal(error)
            continue
        errors = {name: relative_error(found[name], values) for name, values in exact.items()}
        if contender.name == PUBLISHED:
            limits = {n: _TOLERANCE + (1.5 * e if math.isfinite(e) else 0.0) for n, e in errors.items()}
        broken = [
            f"{name}: {error:.2e} from float32, allowed {limits[name]:.2e}"
            for name, error in errors.items()
            if not error <= limits[name]
        ]
        if broken:
            refused[contender.name] = ("wrong", "; ".join(broken))
    return refused


def _results(workload: Workload, contender: Contender, case: Case) -> dict[str, torch.Tensor]:
    """The samples, or in training the loss and all parameter gradients as one vector; the noise is fixed."""
    torch.manual_seed(SEED)
    workload.clock.start()
    if case.pass_ == SAMPLING:
        return {"samples": workload.sample(contender).float()}
    workload.model.zero_grad(set_to_none=True)
    loss = workload.gradients(contender).detach().float()
    gradients = [p.grad.flatten() for p in workload.model.parameters() if p.grad is not None]
    return {"loss": loss, "gradients": torch.cat(gradients)}
