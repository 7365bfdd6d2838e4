"""Samples images from a checkpoint: single files, a grid, animated trajectories, and an archive for FID evaluation.

    python python/sample.py runs/small/checkpoints/step_000002000.ckpt --out out/samples --size 64 --animate 2
    python python/sample.py published.ckpt --out out/fid --count 50000 --npz
    python python/sample.py published.safetensors --out out/text --prompt "a red fox" --size 512
    python python/sample.py published.ckpt --out out/fast --calibrate-trunk-steps 50
    python python/sample.py published.safetensors --out out/geneval --layout geneval --prompts evaluation_metadata.jsonl
    torchrun --nproc_per_node 8 python/sample.py ...          or once for each i:  --shard i/8

A run that was stopped or killed continues with the same command. On the same machine and with the same thread count,
image i depends bit for bit only on i and the settings in run.json, not on sharding or interruptions.

Exit status: 0; 2 with a line that begins with "error:"; 130 when interrupted.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from command_line.failures import exit_status, importing, out_of_memory

with importing("torch numpy pillow tqdm"):
    import torch
    from torch import nn
    from tqdm import tqdm

    from deco_kernels import flow, model
    from deco_kernels.command_line import natural
    from deco_kernels.training.images import to_pixels
    from sampling import layouts, trunk_steps
    from sampling.folder import ANIMATIONS, SampleFolder, recorded_settings
    from sampling.inputs import (
        DTYPES,
        Condition,
        Conditioner,
        Draws,
        add_options,
        device_of,
        dtype_of,
        load_network,
        read_conditions,
        reads_text,
        sha256,
        solver_settings,
    )

FRAMES = 25  # maximum per animation
BATCH = 16  # images at a time on a GPU


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options), options.debug, "interrupted; the same command continues")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python/sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="published file or file of this package, see docs/checkpoints.md")
    parser.add_argument("--out", type=Path, required=True, help="folder to create or to continue")
    add_options(parser, batch=f"1 on the CPU, else {BATCH}")
    trunk_steps.add_options(parser)
    layouts.add_options(parser)
    made = parser.add_argument_group("additional outputs")
    made.add_argument("--grid", type=natural, default=16, metavar="N", help="grid of the first N images (default: 16)")
    made.add_argument("--npz", action="store_true", help="all images in one array, for the ADM evaluation suite")
    made.add_argument("--animate", type=natural, default=0, metavar="N", help="animate the first N images (default: 0)")
    made.add_argument("--animation", choices=list(ANIMATIONS), default="gif", help="animation format (default: gif)")
    parser.add_argument(
        "--shard", type=shard, metavar="I/N", help="part I (from 0) of N (default: RANK and WORLD_SIZE if set)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    return parser.parse_args(arguments)


def shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got {text!r}")
    return int(index), int(count)


def share(options: argparse.Namespace) -> tuple[int, int]:
    """(part, parts) of this process: from --shard, else from RANK and WORLD_SIZE, else (0, 1)."""
    rank, processes = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if options.shard or (rank is None and processes is None):
        return options.shard or (0, 1)
    try:
        return shard(f"{rank}/{processes}")
    except argparse.ArgumentTypeError:
        raise ValueError(
            "RANK and WORLD_SIZE: expected both in the environment, with 0 <= RANK < WORLD_SIZE, or neither; got "
            f"{rank} and {processes}; unset them, or give --shard I/N"
        ) from None


def batch_of(options: argparse.Namespace, device: torch.device) -> int:
    """Images computed together; independent of --count, so that a run can continue with a larger one."""
    return options.batch or (1 if device.type == "cpu" else BATCH)


def run(options: argparse.Namespace) -> None:
    """Samples the share of this process; the process that completes the last image assembles them."""
    part, parts = share(options)
    device = device_of(options)
    network = load_network(options.checkpoint, options, device)
    benchmark = layouts.read_benchmark(options, network)
    conditions = benchmark.prompts if benchmark else read_conditions(options, network)
    count = benchmark.count if benchmark else options.count or len(conditions)
    batch = batch_of(options, device)
    solver, dtype = solver_settings(options, network), dtype_of(options, device)
    conditioner = Conditioner.of(network, device, options.text_encoder)
    conditioner.check(conditions)
    chosen = trunk_steps_of(options, conditioner, conditions, **solver, dtype=DTYPES[dtype])
    sampler = flow.Sampler(network, **solver, dtype=DTYPES[dtype], trunk_steps=chosen)
    settings = settings_of(options, network)
    settings |= {"conditions": conditions, **layouts.settings_of(benchmark), **solver}
    settings |= {"trunk_steps": sampler.trunk_steps, "batch": batch, "dtype": dtype, "device": device.type}
    outputs = (options.out, settings, count, options.animate, options.animation)
    folder = benchmark.folder(*outputs) if benchmark else SampleFolder(*outputs)
    if options.calibrate_trunk_steps:
        folder.write_trunk_steps(sampler.trunk_steps, **solver)
    groups = [range(first, first + batch) for first in range(0, count, batch)][part::parts]
    open_groups = [group for group in groups if folder.missing(group)]
    if open_groups:
        draws = Draws(conditions, options.seed, options.size, benchmark.per_prompt if benchmark else None)
        draw = GroupSampler(sampler, conditioner, draws, batch)
        sample_groups(draw, folder, groups, open_groups)
    left = len(folder.missing(range(count)))
    if left:
        print(f"{left} of {count} images are left to other shards; the one that finishes last assembles them")
        return
    for path in folder.assemble(options.grid, options.npz):
        print(f"wrote {path}")
    print(f"{count} images in {folder.images}")


def settings_of(options: argparse.Namespace, network: nn.Module) -> dict[str, Any]:
    """The settings for run.json that follow from the options and the checkpoint alone."""
    settings = {
        "checkpoint_sha256": sha256(options.checkpoint),
        "weights": model.read_checkpoint(options.checkpoint).choose(options.weights),
        "seed": options.seed,
        "size": options.size,
        "calibrate_trunk_steps": options.calibrate_trunk_steps,
    }
    return settings | ({"text_encoder": options.text_encoder} if reads_text(network) else {})


def trunk_steps_of(
    options: argparse.Namespace, conditioner: Conditioner, conditions: list[Condition], **settings: Any
) -> flow.TrunkSteps | None:
    """Steps at which the trunk runs: those given, those calibrated before in the folder, or calibrated ones; None for
    every step. settings: of `flow.Sampler`."""
    if not options.calibrate_trunk_steps:
        return trunk_steps.given(options.trunk_steps, settings["steps"])
    recorded = recorded_settings(options.out)
    if recorded is not None:  # the folder refuses other settings, and these steps with them
        return recorded.get("trunk_steps") if recorded.get("steps") == settings["steps"] else None
    count = options.calibrate_trunk_steps
    return trunk_steps.calibrated(conditioner, conditions, options.seed, options.size, count, **settings)


def sample_groups(draw: "GroupSampler", folder: SampleFolder, groups: list[range], open_groups: list[range]) -> None:
    """Samples the groups with missing images and writes those images, with a progress bar."""
    total = sum(min(group.stop, folder.count) - group.start for group in groups)
    todo = sum(len(folder.missing(group)) for group in open_groups)
    with tqdm(total=total, initial=total - todo, desc="sampling", unit="image") as bar:
        for group in open_groups:
            missing = folder.missing(group)
            images, frames = draw(group, trajectory=any(index < folder.animated for index in missing))
            for index in missing:
                place = index - group.start
                animated = frames is not None and index < folder.animated
                folder.write(index, images[place], frames[place] if animated else None)
            bar.update(len(missing))


class GroupSampler:
    """Samples a whole group of images at a time.

    The bits of a matmul depend on its number of rows. Therefore image i is always computed in the full group
    i // batch, even if the count ends inside the group or only some of its images are missing.

    When memory runs out, the group size is halved from then on, which may change the last bits.
    """

    def __init__(self, sampler: flow.Sampler, conditioner: Conditioner, draws: Draws, batch: int):
        self.sampler, self.conditioner, self.draws, self.at_once = sampler, conditioner, draws, batch

    def __call__(self, group: range, trajectory: bool):
        """(images uint8 [n, H, W, 3], frames uint8 [n, up to FRAMES, H, W, 3] or None) of a group.

        Raises MemoryError if a single image does not fit, FloatingPointError if one is not finite.
        """
        while True:
            try:
                return self._draw(group, trajectory)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.at_once == 1:
                    raise MemoryError(
                        f"one image of {self.draws.size} does not fit into memory, try a smaller --size"
                    ) from error
            self.at_once //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            tqdm.write(f"out of memory: {self.at_once} images at a time from here on", file=sys.stderr)

    def _draw(self, group: range, trajectory: bool):
        parts = [group[first : first + self.at_once] for first in range(0, len(group), self.at_once)]
        images, states = zip(*(self._draw_together(part, trajectory) for part in parts), strict=True)
        images = torch.cat(images)
        if not images.isfinite().all():
            raise FloatingPointError(
                f"images {group[0]} to {group[-1]}: expected finite values, got infinity or NaN; try --dtype float32 "
                "or a smaller --guidance; otherwise the checkpoint is corrupted"
            )
        pixels = to_pixels(images)
        if not trajectory:
            return pixels, None
        states = torch.cat(states)
        return pixels, to_pixels(states.flatten(0, 1)).reshape(*states.shape[:2], *pixels.shape[1:])

    def _draw_together(self, indices: range, trajectory: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        noise = torch.stack([self.draws.noise(index) for index in indices])
        cond, uncond = self.conditioner([self.draws.condition(index) for index in indices])
        result = self.sampler(noise.to(self.conditioner.device), cond, uncond, trajectory=trajectory)
        if not trajectory:
            return result.cpu(), None
        images, states = result
        chosen = torch.linspace(0, len(states) - 1, min(FRAMES, len(states))).round().int().tolist()
        return images.cpu(), torch.stack([states[index].cpu() for index in chosen], dim=1)


if __name__ == "__main__":
    sys.exit(main())
