"""Integration of the learned velocity from noise to an image, with classifier-free guidance.

Source: DeCo (arXiv 2511.19365), section 4, in the form the published checkpoints are sampled with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from deco_kernels.flow.path import shift_time

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [B, ...], t [B], cond [B, ...]) → velocity shaped like x."""


def timesteps(steps: int, shift: float = 1.0) -> torch.Tensor:
    """The steps + 1 times from 0 to 1, float32 on the CPU: linspace(0, 1 - 1/steps, steps) and 1, then shifted."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    times = torch.linspace(0, 1 - 1 / steps, steps, dtype=torch.float32, device="cpu")
    return shift_time(torch.cat((times, times.new_ones(1))), shift)


class _GuidedVelocity:
    """v = v_uncond + guidance·(v_cond - v_uncond) where guided, v_cond elsewhere.

    Whether a step is guided is decided on the host before the first one, so that no step waits for the device.
    """

    def __init__(
        self,
        velocity: Velocity,
        cond: torch.Tensor,
        uncond: torch.Tensor | None,
        guidance: float,
        interval: tuple[float, float],
        times: torch.Tensor,
        like: torch.Tensor,
    ):
        lo, hi = interval
        self.velocity, self.cond, self.guidance, self.dtype = velocity, cond, guidance, like.dtype
        guided = (times > lo) & (times <= hi)
        self.guided = guided.tolist() if guidance != 1 else [False] * len(times)
        self.both = torch.cat((uncond, cond)) if any(self.guided[:-1]) else None
        self.times = times.to(like.device)

    def __call__(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """The velocity at x [B, ...] and the start time of `step`, in the dtype of x."""
        x_in = x.to(self.dtype)
        if not self.guided[step]:
            return self._call(x_in, step, self.cond).to(x.dtype)
        v_uncond, v_cond = self._call(torch.cat((x_in, x_in)), step, self.both).to(x.dtype).chunk(2)
        return v_uncond + self.guidance * (v_cond - v_uncond)

    def _call(self, x: torch.Tensor, step: int, cond: torch.Tensor) -> torch.Tensor:
        v = self.velocity(x, self.times[step].expand(len(x)), cond)
        if not isinstance(v, torch.Tensor):
            raise TypeError(f"velocity: expected it to return a tensor, got {type(v).__name__}")
        if v.shape != x.shape:
            raise ValueError(f"velocity: expected it to return the shape of x {tuple(x.shape)}, got {tuple(v.shape)}")
        return v


def _euler(evaluate: _GuidedVelocity, x: torch.Tensor, step_sizes: list[float], steps: Iterable[int]) -> torch.Tensor:
    """x ← x + (t' - t)·v(x, t)."""
    for step in steps:
        x = x + step_sizes[step] * evaluate(x, step)
    return x


SOLVERS: dict[str, Callable[..., torch.Tensor]] = {"euler": _euler}
"""Name → (evaluate, x, step sizes, step numbers) → x at time 1."""


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
    progress: bool = False,
) -> torch.Tensor:
    """Integrate dx/dt = velocity from noise at t = 0 to a sample at t = 1.

    Args:
        velocity: called as velocity(x, t, cond) with t float32 [B]: on the doubled batch (first uncond, then cond) for
            steps that start at lo < t <= hi, on the single batch (cond) for the others and when guidance is 1.
        noise: [B, ...], floating. The state is kept in float32 (or wider); velocity sees it in noise's dtype.
        cond, uncond: conditions [B, ...] of equal shape, such as labels; uncond may be None when guidance is 1.
        solver: a key of `SOLVERS`.
        steps: number of steps, at least 1.
        guidance: 1 means none.
        guidance_interval: (lo, hi) with 0 <= lo < hi <= 1.
        shift: of the times, see `shift_time`.
        progress: show a progress bar (needs tqdm).

    Returns:
        The sample, shape and dtype of noise, without gradients.

    Raises:
        TypeError, ValueError: an argument, or what velocity returned, does not fit; the message says what was expected.
    """
    _check_sample(noise, cond, uncond, solver, guidance, guidance_interval)
    times = timesteps(steps, shift)
    evaluate = _GuidedVelocity(velocity, cond, uncond, guidance, guidance_interval, times, noise)
    numbers: Iterable[int] = range(steps)
    if progress:
        from tqdm import tqdm

        numbers = tqdm(numbers, desc=f"sampling ({solver})", unit="step")
    state = noise.to(torch.promote_types(noise.dtype, torch.float32))
    return SOLVERS[solver](evaluate, state, times.diff().tolist(), numbers).to(noise.dtype)


def _check_sample(
    noise: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    solver: str,
    guidance: float,
    interval: tuple[float, float],
) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {sorted(SOLVERS)}, got {solver!r}")
    for name, tensor in (("noise", noise), ("cond", cond), ("uncond", uncond)):
        if not isinstance(tensor, torch.Tensor) and not (name == "uncond" and tensor is None):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not noise.is_floating_point():
        raise TypeError(f"noise: expected a floating-point tensor, got {noise.dtype}")
    if not noise.dim() or cond.shape[:1] != noise.shape[:1]:
        raise ValueError(f"cond: expected the batch of noise {tuple(noise.shape)} first, got shape {tuple(cond.shape)}")
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)):
        raise TypeError(f"guidance: expected a number, got {type(guidance).__name__}")
    if not isinstance(interval, (tuple, list)) or not all(isinstance(end, (int, float)) for end in interval):
        raise TypeError(f"guidance_interval: expected a pair of numbers (lo, hi), got {interval!r}")
    if uncond is None and guidance != 1:
        raise ValueError(f"uncond: expected a tensor when guidance is not 1, got None with guidance {guidance}")
    if uncond is not None and (uncond.shape != cond.shape or uncond.dtype != cond.dtype):
        raise ValueError(
            f"uncond: expected the shape and dtype of cond, {tuple(cond.shape)} {cond.dtype}, got "
            f"{tuple(uncond.shape)} {uncond.dtype}"
        )
    if not -float("inf") < guidance < float("inf"):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance_interval: expected (lo, hi) with 0 <= lo < hi <= 1, got {tuple(interval)}")
