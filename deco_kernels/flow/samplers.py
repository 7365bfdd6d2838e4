"""Integration of the learned velocity from noise to an image, with classifier-free guidance.

Source: DeCo (arXiv 2511.19365), section 4, as used for sampling from the published checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from deco_kernels.flow.cuda_graphs import CudaGraph, GraphedVelocity, Velocity
from deco_kernels.flow.path import shift_time
from deco_kernels.flow.solvers import SOLVERS
from deco_kernels.model.pixel_decoder import PixelDecoder

SAMPLING_DTYPES = (torch.bfloat16, torch.float16)


def timesteps(steps: int, shift: float = 1.0) -> torch.Tensor:
    """The steps + 1 times from 0 to 1, float32 on the CPU: linspace(0, 1 - 1/steps, steps) and 1, then `shift_time`.

    Raises TypeError or ValueError unless steps is an integer of at least 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
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
            raise TypeError(f"velocity: expected it to return a tensor, got {type(v).__name__}")
        if v.shape != x.shape:
            raise ValueError(f"velocity: expected it to return the shape of x {tuple(x.shape)}, got {tuple(v.shape)}")
        return v


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

    Returns:
        The sample, with the shape and dtype of noise, without gradients. With `trajectory`, the pair of the sample and
        the list of the steps + 1 states from noise to sample, in the dtype of noise.

    Raises:
        TypeError, ValueError: an invalid argument or an invalid result of velocity.
    """
    times = _check_settings(solver, steps, guidance, guidance_interval, shift)
    _check_tensors(noise, cond, uncond, guidance)
    lo, hi = guidance_interval
    starts = times[:-1]
    before_end = starts <= hi if SOLVERS[solver].guides_end else starts < hi
    guided = ((starts > lo) & before_end).tolist() if guidance != 1 else [False] * steps
    evaluate = _GuidedVelocity(velocity, cond, uncond, guidance, guided, times, noise)
    state = noise.to(torch.promote_types(noise.dtype, torch.float32))
    states: Iterable[torch.Tensor] = SOLVERS[solver].advance(evaluate, state, times.tolist())
    if progress:
        from tqdm import tqdm

        states = tqdm(states, total=steps, desc=f"sampling ({solver})", unit="step")
    visited = [noise.clone()] if trajectory else []
    for state in states:
        if trajectory:
            visited.append(state.to(noise.dtype))
    result = state.to(noise.dtype)
    return (result, visited) if trajectory else result


def _check_settings(
    solver: str, steps: int, guidance: float, interval: tuple[float, float], shift: float
) -> torch.Tensor:
    """Check the settings of `sample` and return its times; raises TypeError or ValueError."""
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {sorted(SOLVERS)}, got {solver!r}")
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)):
        raise TypeError(f"guidance: expected a number, got {type(guidance).__name__}")
    if not -float("inf") < guidance < float("inf"):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")
    if not isinstance(interval, (tuple, list)) or not all(isinstance(end, (int, float)) for end in interval):
        raise TypeError(f"guidance_interval: expected a pair of numbers (lo, hi), got {interval!r}")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance_interval: expected (lo, hi) with 0 <= lo < hi <= 1, got {tuple(interval)}")
    return timesteps(steps, shift)


def _check_tensors(noise: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor | None, guidance: float) -> None:
    for name, tensor in (("noise", noise), ("cond", cond), ("uncond", uncond)):
        if not isinstance(tensor, torch.Tensor) and not (name == "uncond" and tensor is None):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not noise.is_floating_point():
        raise TypeError(f"noise: expected a floating-point tensor, got {noise.dtype}")
    if not noise.dim() or cond.shape[:1] != noise.shape[:1]:
        raise ValueError(f"cond: expected the batch of noise {tuple(noise.shape)} first, got shape {tuple(cond.shape)}")
    if uncond is None and guidance != 1:
        raise ValueError(f"uncond: expected a tensor when guidance is not 1, got None with guidance {guidance}")
    if uncond is not None and (uncond.shape != cond.shape or uncond.dtype != cond.dtype):
        raise ValueError(
            f"uncond: expected the shape and dtype of cond, {tuple(cond.shape)} {cond.dtype}, got "
            f"{tuple(uncond.shape)} {uncond.dtype}"
        )


class Sampler:
    """Samples from one model with fixed settings.

    With `dtype`, the model is copied, the weights of its linears are cast once and the copy runs under autocast. The
    samples are those of the model under autocast, without the casts in every step. Without `dtype`, the given model
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
    ):
        _check_settings(solver, steps, guidance, guidance_interval, shift)
        self.settings: dict[str, Any] = dict(
            steps=steps, solver=solver, guidance=guidance, guidance_interval=guidance_interval, shift=shift
        )
        self.dtype, self.cuda_graph = dtype, cuda_graph
        self.model: Velocity = model if dtype is None else _cast_copy(model, dtype)
        if compile_trunk:
            compile_blocks = getattr(self.model, "compile_trunk", None)
            if compile_blocks is None:
                raise TypeError(f"model: expected one that has compile_trunk, such as DeCo, got {type(model).__name__}")
            compile_blocks()
        self.graphed = GraphedVelocity(self._call_model, CudaGraph)

    def __call__(
        self,
        noise: torch.Tensor,
        cond: torch.Tensor,
        uncond: torch.Tensor | None = None,
        *,
        trajectory: bool = False,
        progress: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Sample from noise [B, ...] and conditions [B, ...] on the model's device; returns and raises as `sample`."""
        velocity = self.graphed if self.cuda_graph and _is_cuda(noise) else self._call_model
        return sample(velocity, noise, cond, uncond, **self.settings, trajectory=trajectory, progress=progress)

    def _call_model(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        if self.dtype is None:
            return self.model(x, t, cond)
        with torch.autocast(x.device.type, dtype=self.dtype, cache_enabled=False):
            return self.model(x, t, cond)


def _is_cuda(noise: torch.Tensor) -> bool:
    return isinstance(noise, torch.Tensor) and noise.is_cuda


def _cast_copy(model: Velocity, dtype: torch.dtype) -> nn.Module:
    """A frozen copy for inference whose weights that autocast would cast in every call already have `dtype`."""
    if dtype not in SAMPLING_DTYPES:
        raise TypeError(f"dtype: expected None or one of {list(SAMPLING_DTYPES)}, got {dtype}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module when dtype is given, got {type(model).__name__}")
    matrices = [p for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters(False)]
    matrices += [module.up_weight for module in model.modules() if isinstance(module, PixelDecoder)]
    # deepcopy uses these instead of copies, so that no weight is held in both dtypes.
    cast = {id(p): nn.Parameter(p.detach().to(dtype, copy=True)) for p in matrices}
    return copy.deepcopy(model, cast).eval().requires_grad_(False)
