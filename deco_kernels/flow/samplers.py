"""Integration of the learned velocity from noise to an image, with classifier-free guidance.

Source: DeCo (arXiv 2511.19365), section 4, as used for sampling from the published checkpoints.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from deco_kernels.flow.cuda_graphs import CudaGraph, GraphedVelocity, Velocity
from deco_kernels.flow.path import shift_time
from deco_kernels.flow.solvers import SOLVERS, Evaluate
from deco_kernels.flow.trunk_steps import TrunkSteps, resolve_trunk_steps
from deco_kernels.model.dit import PatchTransformer
from deco_kernels.model.pixel_decoder import PixelDecoder

OnStep = Callable[[int, torch.Tensor], None]
"""(step, state) → None, called after every step."""

SAMPLING_DTYPES = (torch.bfloat16, torch.float16)


def timesteps(steps: int, shift: float = 1.0) -> torch.Tensor:
    """The steps + 1 times from 0 to 1, float32 on the CPU: linspace(0, 1 - 1/steps, steps) and 1, then `shift_time`.

    Raises TypeError or ValueError unless steps is an integer of at least 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}; pass an integer")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}; pass 1 or more")
    times = torch.linspace(0, 1 - 1 / steps, steps, dtype=torch.float32, device="cpu")
    return shift_time(torch.cat((times, times.new_ones(1))), shift)


class _GuidedVelocity:
    """v = v_uncond + guidance·(v_cond - v_uncond) in guided steps, v_cond in the others.

    The guided steps are determined on the host before the first step, so that no step synchronizes with the device.
    """

    def __init__(
        self,
        velocity: Velocity,
        cond: torch.Tensor,
        uncond: torch.Tensor | None,
        guidance: float,
        guided: list[bool],
        times: torch.Tensor,
        like: torch.Tensor,
    ):
        self.velocity, self.cond, self.guidance, self.guided = velocity, cond, guidance, guided
        self.both = torch.cat((uncond, cond)) if uncond is not None and any(guided) else None
        self.times, self.dtype = times.to(like.device), like.dtype

    def __call__(self, x: torch.Tensor, at: int, step: int | None = None) -> torch.Tensor:
        """The velocity at x [B, ...] and time index `at` in the dtype of x, guided if step `step` (else `at`) is."""
        x_in = x.to(self.dtype)
        if self.both is None or not self.guided[at if step is None else step]:
            return self._call(x_in, at, self.cond).to(x.dtype)
        v_uncond, v_cond = self._call(torch.cat((x_in, x_in)), at, self.both).to(x.dtype).chunk(2)
        return v_uncond + self.guidance * (v_cond - v_uncond)

    def _call(self, x: torch.Tensor, at: int, cond: torch.Tensor) -> torch.Tensor:
        v = self.velocity(x, self.times[at].expand(len(x)), cond)
        if not isinstance(v, torch.Tensor):
            raise TypeError(
                f"velocity: expected it to return a tensor, got {type(v).__name__}; return the velocity alone"
            )
        if v.shape != x.shape:
            raise ValueError(
                f"velocity: expected it to return the shape of x {tuple(x.shape)}, got {tuple(v.shape)}; "
                "return one value per value of x"
            )
        return v


class Halves(NamedTuple):
    """The two halves of a model, each as one call."""

    both: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # (x, t, cond) → (velocity, tokens)
    decode: Callable[..., torch.Tensor]  # (x, t, tokens) → velocity


class _ReusedTrunk(_GuidedVelocity):
    """`_GuidedVelocity` of a model whose trunk runs at some time indices only.

    An evaluation at a time index in `trunk_steps` encodes: it runs trunk and decoder. All others run the decoder on the
    newest tokens of each condition. A condition that has no tokens yet is encoded.
    """

    def __init__(
        self, halves: Halves, trunk_steps: list[int], cond: torch.Tensor, uncond: torch.Tensor | None, *rest: Any
    ):
        super().__init__(halves.decode, cond, uncond, *rest)
        self.halves, self.trunk_steps = halves, frozenset(trunk_steps)
        self.tokens: dict[str, torch.Tensor] = {}
        self.conditions = {"uncond": uncond, "cond": cond}

    def _call(self, x: torch.Tensor, at: int, cond: torch.Tensor) -> torch.Tensor:
        names = ["uncond", "cond"] if cond is self.both else ["cond"]
        t = self.times[at].expand(len(x))
        if at in self.trunk_steps:
            velocity, tokens = self.halves.both(x, t, cond)
            self.tokens.update(zip(names, tokens.chunk(len(names)), strict=True))
            return velocity
        for name in names:
            if name not in self.tokens:
                count = len(x) // len(names)
                self.tokens[name] = self.halves.both(x[:count], t[:count], self.conditions[name])[1]
        newest = [self.tokens[name] for name in names]
        return self.halves.decode(x, t, torch.cat(newest) if len(newest) > 1 else newest[0])


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None = None,
    *,
    solver: str = "euler",
    steps: int,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    shift: float = 1.0,
    trajectory: bool = False,
    progress: bool = False,
    on_step: OnStep | None = None,
) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
    """Integrate dx/dt = velocity from noise at t = 0 to a sample at t = 1.

    Args:
        velocity: called as velocity(x, t, cond) with t float32 [B]. Guided steps call it on the doubled batch (first
            uncond, then cond), other steps on the single batch (cond).
        noise: [B, ...], floating. The state is float32 (or wider); velocity gets it in the dtype of noise.
        cond, uncond: conditions [B, ...] of equal shape, such as labels or text features; uncond may be None when
            guidance is 1.
        solver: "euler"; "heun", whose predictor is the corrector of the previous step; "heun_exact", with two
            evaluations in every step except the last; "adams1", "adams2" or "adams3", Adams-Bashforth of that order.
        steps: number of steps, at least 1.
        guidance: guidance scale; 1 disables guidance.
        guidance_interval: (lo, hi) with 0 <= lo < hi <= 1. A step is guided in all its evaluations if its start t
            has lo < t <= hi (lo < t < hi for the Adams solvers).
        shift: shift of the times, see `shift_time`.
        trajectory: also return all states.
        progress: show a progress bar (needs tqdm).
        on_step: called after every step with its number, from 0, and the state, which it may change in place.

    Returns:
        The sample, with the shape and dtype of noise, without gradients. With `trajectory`, the pair of the sample and
        the list of the steps + 1 states from noise to sample, in the dtype of noise.

    Raises:
        TypeError, ValueError: an invalid argument or an invalid result of velocity.
    """
    times = _check_settings(solver, steps, guidance, guidance_interval, shift)
    _check_tensors(noise, cond, uncond, guidance)
    guided = _guided_steps(times, solver, guidance, guidance_interval)
    evaluate = _GuidedVelocity(velocity, cond, uncond, guidance, guided, times, noise)
    return _integrate(evaluate, noise, times, solver, trajectory, progress, on_step)


def _guided_steps(times: torch.Tensor, solver: str, guidance: float, interval: tuple[float, float]) -> list[bool]:
    lo, hi = interval
    starts = times[:-1]
    before_end = starts <= hi if SOLVERS[solver].guides_end else starts < hi
    return ((starts > lo) & before_end).tolist() if guidance != 1 else [False] * len(starts)


def _integrate(
    evaluate: Evaluate,
    noise: torch.Tensor,
    times: torch.Tensor,
    solver: str,
    trajectory: bool,
    progress: bool,
    on_step: OnStep | None,
) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the solver; results as in `sample`."""
    state = noise.to(torch.promote_types(noise.dtype, torch.float32))
    states: Iterable[torch.Tensor] = SOLVERS[solver].advance(evaluate, state, times.tolist())
    if progress:
        from tqdm import tqdm

        states = tqdm(states, total=len(times) - 1, desc=f"sampling ({solver})", unit="step")
    visited = [noise.clone()] if trajectory else []
    for step, state in enumerate(states):
        if on_step is not None:
            on_step(step, state)
        if trajectory:
            visited.append(state.to(noise.dtype))
    result = state.to(noise.dtype)
    return (result, visited) if trajectory else result


def _check_settings(
    solver: str, steps: int, guidance: float, interval: tuple[float, float], shift: float
) -> torch.Tensor:
    """Check the settings of `sample` and return its times; raises TypeError or ValueError."""
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {sorted(SOLVERS)}, got {solver!r}; choose one of them")
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)):
        raise TypeError(f"guidance: expected a number, got {type(guidance).__name__}; pass one")
    if not -float("inf") < guidance < float("inf"):
        raise ValueError(f"guidance: expected a finite number, got {guidance}; pass one")
    if not isinstance(interval, (tuple, list)) or not all(isinstance(end, (int, float)) for end in interval):
        raise TypeError(
            f"guidance_interval: expected a pair of numbers (lo, hi), got {interval!r}; pass a pair, such as (0.1, 1)"
        )
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"guidance_interval: expected (lo, hi) with 0 <= lo < hi <= 1, got {tuple(interval)}; choose such a pair"
        )
    return timesteps(steps, shift)


def _check_tensors(noise: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor | None, guidance: float) -> None:
    for name, tensor in (("noise", noise), ("cond", cond), ("uncond", uncond)):
        if not isinstance(tensor, torch.Tensor) and not (name == "uncond" and tensor is None):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}; pass a tensor")
    if not noise.is_floating_point():
        raise TypeError(f"noise: expected a floating-point tensor, got {noise.dtype}; convert it with .float()")
    if not noise.dim() or cond.shape[:1] != noise.shape[:1]:
        raise ValueError(
            f"cond: expected the batch of noise {tuple(noise.shape)} first, got shape {tuple(cond.shape)}; pass one "
            "condition per image"
        )
    if uncond is None and guidance != 1:
        raise ValueError(
            f"uncond: expected a tensor when guidance is not 1, got None with guidance {guidance}; pass the null "
            "condition, such as torch.full_like(labels, model.null_label)"
        )
    if uncond is not None and (uncond.shape != cond.shape or uncond.dtype != cond.dtype):
        raise ValueError(
            f"uncond: expected the shape and dtype of cond, {tuple(cond.shape)} {cond.dtype}, got "
            f"{tuple(uncond.shape)} {uncond.dtype}; expand or convert it"
        )


class Sampler:
    """Samples from one model with fixed settings.

    With `dtype`, the model is copied, the weights of its linears are cast once and the copy runs under autocast. The
    samples are those of the model under autocast, without the casts in every step; on a GPU up to rounding, since the
    copy joins linears of the same input (`PatchTransformer.join_linears`). Without `dtype`, the given model
    runs. On a GPU, the model's call is captured in a CUDA graph for each shape of arguments (with guidance: the doubled
    batch, and the single batch outside the guidance interval) at the first step that needs it. If capture fails, the
    reason is logged once and the model runs without graphs. On the CPU the model runs directly.

    Args:
        model: (x, t, cond) → velocity; a module if `dtype` is given.
        steps, solver, guidance, guidance_interval, shift: as in `sample`.
        dtype: torch.bfloat16 or torch.float16, or None.
        compile_trunk: compile the trunk's blocks with torch.compile, see `DeCo.compile_trunk`. Without `dtype` this
            compiles the given model in place.
        cuda_graph: capture CUDA graphs on a GPU.
        trunk_steps: steps at which the trunk runs; the decoder runs in every evaluation, on the newest tokens. None:
            every step. K: K steps spread evenly in the shifted time, the first among them. A sequence: these indices,
            from 0, such as those of `choose_trunk_steps`. An evaluation encodes if its time index is among them: in
            both Heun solvers the corrector of step s has index s + 1. Fewer than all steps are an approximation. The
            model needs `encode` and `decode`, as DeCo has them. On a GPU two calls are captured, encoding and not.

    A copied model does not follow later changes to the original. A captured model follows in-place changes to its
    parameters, but not replaced parameters.

    Raises:
        TypeError, ValueError: invalid settings, as in `sample`, or a model that cannot be cast or compiled.
    """

    def __init__(
        self,
        model: Velocity,
        *,
        steps: int,
        solver: str = "euler",
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        shift: float = 1.0,
        dtype: torch.dtype | None = None,
        compile_trunk: bool = False,
        cuda_graph: bool = True,
        trunk_steps: TrunkSteps | None = None,
    ):
        times = _check_settings(solver, steps, guidance, guidance_interval, shift)
        self.settings: dict[str, Any] = dict(
            steps=steps, solver=solver, guidance=guidance, guidance_interval=guidance_interval, shift=shift
        )
        self.dtype, self.cuda_graph = dtype, cuda_graph
        self.model: Any = model if dtype is None else _cast_copy(model, dtype)
        if compile_trunk:
            compile_blocks = getattr(self.model, "compile_trunk", None)
            if compile_blocks is None:
                raise TypeError(
                    f"model: expected one that has compile_trunk, such as DeCo, got {type(model).__name__}; "
                    "leave compile_trunk out"
                )
            compile_blocks()
        self.trunk_steps = None if trunk_steps is None else resolve_trunk_steps(trunk_steps, times)
        if self.trunk_steps is not None and not has_halves(self.model):
            raise TypeError(
                "model: expected one with encode and decode, such as DeCo, for trunk_steps, got "
                f"{type(model).__name__}; leave trunk_steps out"
            )
        self.graphed = GraphedVelocity(self._call_model, CudaGraph)
        self.graphed_halves = Halves(
            GraphedVelocity(self._call_both, CudaGraph), GraphedVelocity(self._call_decode, CudaGraph)
        )

    def __call__(
        self,
        noise: torch.Tensor,
        cond: torch.Tensor,
        uncond: torch.Tensor | None = None,
        *,
        trajectory: bool = False,
        progress: bool = False,
        on_step: OnStep | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Sample from noise [B, ...] and conditions [B, ...] on the model's device; returns and raises as `sample`."""
        graphed = self.cuda_graph and _is_cuda(noise)
        observing: dict[str, Any] = dict(trajectory=trajectory, progress=progress, on_step=on_step)
        if self.trunk_steps is None:
            velocity = self.graphed if graphed else self._call_model
            return sample(velocity, noise, cond, uncond, **self.settings, **observing)
        halves = self.graphed_halves if graphed else Halves(self._call_both, self._call_decode)
        return self.sample_halves(halves, noise, cond, uncond, **observing)

    @torch.no_grad()
    def sample_halves(
        self,
        halves: Halves,
        noise: torch.Tensor,
        cond: torch.Tensor,
        uncond: torch.Tensor | None = None,
        *,
        trajectory: bool = False,
        progress: bool = False,
        on_step: OnStep | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Sample through the given halves of the model, running the trunk at `trunk_steps`."""
        solver, guidance = self.settings["solver"], self.settings["guidance"]
        _check_tensors(noise, cond, uncond, guidance)
        times = timesteps(self.settings["steps"], self.settings["shift"])
        guided = _guided_steps(times, solver, guidance, self.settings["guidance_interval"])
        assert self.trunk_steps is not None
        evaluate = _ReusedTrunk(halves, self.trunk_steps, cond, uncond, guidance, guided, times, noise)
        return _integrate(evaluate, noise, times, solver, trajectory, progress, on_step)

    def _call_model(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        with self._autocast(x):
            return self.model(x, t, cond)

    def _call_both(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self._autocast(x):
            tokens = self.model.encode(x, t, cond)
            return self.model.decode(x, t, tokens), tokens

    def _call_decode(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        with self._autocast(x):
            return self.model.decode(x, t, tokens)

    def _autocast(self, x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(x.device.type, dtype=self.dtype, cache_enabled=False)


def has_halves(model: object) -> bool:
    """Whether a model has `encode` and `decode`, so that its trunk can run at some steps only."""
    return callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None))


def _is_cuda(noise: torch.Tensor) -> bool:
    return isinstance(noise, torch.Tensor) and noise.is_cuda


def _cast_copy(model: Velocity, dtype: torch.dtype) -> nn.Module:
    """A frozen copy for inference whose weights that autocast would cast in every call already have `dtype`."""
    if dtype not in SAMPLING_DTYPES:
        raise TypeError(f"dtype: expected None or one of {list(SAMPLING_DTYPES)}, got {dtype}; choose one of them")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a module when dtype is given, got {type(model).__name__}; "
            "pass the model, or leave dtype out"
        )
    matrices = [p for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters(False)]
    matrices += [module.up_weight for module in model.modules() if isinstance(module, PixelDecoder)]
    # deepcopy uses these instead of copies, so that no weight is held in both dtypes.
    cast = {id(p): nn.Parameter(p.detach().to(dtype, copy=True)) for p in matrices}
    copied = copy.deepcopy(model, cast).eval().requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, PatchTransformer) and module.patch_embed.weight.is_cuda:
            module.join_linears()
    return copied
