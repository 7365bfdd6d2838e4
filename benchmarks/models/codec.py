"""`python -m benchmarks codec`: the per-pixel decoder of CoD-Lite (arXiv 2604.12525) on whole frames, on the CPU.

D 32, N 3, p 16, Z = Zq = 384, random weights, without gradients. Contenders: the published formulation, eager and
compiled; the best eager one, with folded linears; the module of this package. Time, interleaved in one process with a
kept heap; for large frames each contender in a process of its own with the C library's default heap. Peak memory growth
of one call in a process of its own. See docs/codec.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.harness import results
from benchmarks.harness.header import header
from benchmarks.harness.measure import statistics_of
from benchmarks.harness.timing import interleaved
from benchmarks.harness.verification import SEED
from benchmarks.names import BEST_EAGER, DTYPES, PUBLISHED
from benchmarks.report.markdown import table
from deco_kernels import model, testing
from deco_kernels.command_line import new_file, positive, thread_count
from deco_kernels.machine import default_heap, keep_heap, peak_bytes, reset_peak
from deco_kernels.signatures import OPS
from deco_kernels.testing.published_model import CodLiteDecoder

SIZES = {"1920x1024": (1024, 1920), "3840x2160": (2160, 3840)}
ALONE = {"3840x2160"}  # sizes of which the kept heap of one contender may not fit in memory
COMPILED, OURS = "torch.compile", "deco_kernels"
CONTENDERS = (PUBLISHED, COMPILED, BEST_EAGER, OURS)
TOKEN_WIDTH = QUERY_WIDTH = 384
PATCH = 16
MIB = 2**20

Call = Callable[[], torch.Tensor]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks codec", description="Times the per-pixel decoder of CoD-Lite on the CPU."
    )
    parser.add_argument("--size", action="append", choices=SIZES, help="repeatable (default: all)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable (default: float32, bfloat16)")
    parser.add_argument("--threads", type=thread_count, default=2, metavar="N", help="PyTorch threads (default: 2)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="timed rounds (default: 5)")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--output", type=new_file, metavar="FILE.json", help="write the result to this file")
    parser.add_argument("--growth", choices=CONTENDERS, help="print only the memory growth of one call, in bytes")
    parser.add_argument("--times", choices=CONTENDERS, help="print only the milliseconds of each round, as JSON")
    options = parser.parse_args(arguments)
    sizes, dtypes = options.size or list(SIZES), options.dtype or list(DTYPES[:2])
    torch.set_num_threads(options.threads)
    if options.growth:
        print(growth(options.growth, *SIZES[sizes[0]], getattr(torch, dtypes[0])))
        return 0
    if options.times:
        print(json.dumps(interleaved_times([options.times], sizes[0], dtypes[0], options.rounds)[0]))
        return 0
    keep_heap("-m", "benchmarks", "codec", *arguments)
    names = [name for name in CONTENDERS if name != COMPILED or not options.no_compile]
    in_order = sorted(sizes, key=ALONE.__contains__, reverse=True)  # before the heap of this process has grown
    rows = [row for size in in_order for dtype in dtypes for row in measure(size, dtype, names, options)]
    result = {"header": header("cpu"), "rows": rows}
    results.publish(result, report(result), options.output)
    return 0


class Frame:
    """The decoder as published and as the module of this package, with the same random weights, and one frame."""

    def __init__(self, height: int, width: int):
        """Sides are rounded up to whole patches, as a codec pads them."""
        torch.manual_seed(SEED)
        self.published = CodLiteDecoder(TOKEN_WIDTH, QUERY_WIDTH).eval().requires_grad_(False)
        for name, parameter in self.published.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(1.0 if name.endswith(("in_ln.weight", "norm.weight")) else 0.0, scale)
        self.decoder = decoder_of(self.published)
        rows, columns = -(-height // PATCH), -(-width // PATCH)
        self.image = torch.randn(1, 3, rows * PATCH, columns * PATCH)
        self.tokens = torch.randn(rows * columns, TOKEN_WIDTH)
        self.cond = torch.randn(1, QUERY_WIDTH, rows, columns)

    def call(self, contender: str, dtype: torch.dtype) -> Call:
        """One decoding without gradients; eager contenders with 16-bit activations run under autocast."""
        tokens, cond = self.tokens.to(dtype), self.cond.to(dtype)
        query_tokens = cond.flatten(2).transpose(1, 2).reshape(len(tokens), -1)
        module = torch.compile(self.published, dynamic=False) if contender == COMPILED else self.published

        def decode() -> torch.Tensor:
            if contender == OURS:
                return self.decoder(self.image, tokens, query_tokens=query_tokens)
            if contender == BEST_EAGER:
                return self._best_eager(tokens, query_tokens)
            with torch.autocast("cpu", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
                return module(self.image, tokens, cond)

        return torch.no_grad()(decode)

    def _best_eager(self, tokens: torch.Tensor, query_tokens: torch.Tensor) -> torch.Tensor:
        op, decoder = "pixel_decoder_from_tokens", self.decoder
        weights = (decoder.up_weight, decoder.up_bias, *decoder.folded_weights())
        tensors = dict(zip(OPS[op].names, (self.image, tokens, *weights), strict=False))
        query_weight, query_bias = decoder.fold_features()
        tensors |= {"query_tokens": query_tokens, "query_weight": query_weight, "query_bias": query_bias}
        return testing.eager(op, tensors, {"patch_size": PATCH, "head_norm": "rms"})


def decoder_of(published: CodLiteDecoder) -> model.PixelDecoder:
    """`model.PixelDecoder` with the parameters of the published modules."""
    decoder = model.PixelDecoder(TOKEN_WIDTH, query_width=QUERY_WIDTH, head_norm="rms", patch_size=published.patch_size)
    net, final = published.dec_net, published.final_layer
    pairs = {
        "feature": published.y_embedder_x,
        "embed": published.x_embedder.embedder[0],
        "input": net.input_proj,
        "up": net.cond_embed,
        "head": final.linear,
    }
    blocks = list(net.res_blocks)
    stacks = {
        "norm": [block.in_ln for block in blocks],
        "mod": [block.adaLN_modulation[1] for block in blocks],
        "fc1": [block.mlp[0] for block in blocks],
        "fc2": [block.mlp[2] for block in blocks],
    }
    state = {"head_norm_weight": final.norm.weight}
    for kind in ("weight", "bias"):
        state |= {f"{name}_{kind}": getattr(module, kind) for name, module in pairs.items()}
        state |= {f"{name}_{kind}": torch.stack([getattr(m, kind) for m in ms]) for name, ms in stacks.items()}
    state["feature_weight"] = state["feature_weight"].flatten(1)
    decoder.load_state_dict(state)
    return decoder.eval().requires_grad_(False)


def measure(size: str, dtype: str, names: list[str], options: argparse.Namespace) -> list[dict]:
    """Rows of the contenders on one size in one dtype, after their results have been verified."""
    kind = getattr(torch, dtype)
    verify(kind, names)
    if size in ALONE:
        times = [json.loads(elsewhere("times", name, size, dtype, options)) for name in names]
    else:
        times = interleaved_times(names, size, dtype, options.rounds)
    rows = []
    for name, ms in zip(names, times, strict=True):
        row = {"size": size, "dtype": dtype, "contender": name, "least_ms": min(ms)} | statistics_of(ms)
        rows.append(row | {"growth_bytes": int(elsewhere("growth", name, size, dtype, options))})
    return rows


def interleaved_times(names: list[str], size: str, dtype: str, rounds: int) -> list[list[float]]:
    """Milliseconds of every round, for each of the contenders."""
    frame = Frame(*SIZES[size])
    calls = [_with_index(frame.call(name, getattr(torch, dtype))) for name in names]
    return interleaved(calls, "cpu", 0.0, rounds)


def _with_index(call: Call) -> Callable[[int], torch.Tensor]:
    return lambda _: call()


def verify(dtype: torch.dtype, names: list[str]) -> None:
    """Raise ValueError if a contender breaks the rule of error on a small frame, against the published float64."""
    frame = Frame(96, 64)
    exact_frame = Frame(96, 64)
    exact_frame.published.double()
    for name in ("image", "tokens", "cond"):
        setattr(exact_frame, name, getattr(exact_frame, name).double())
    exact = exact_frame.call(PUBLISHED, torch.float64)()
    errors = {name: testing.relative_error(frame.call(name, dtype)(), exact) for name in names}
    bound = testing.error_bound(dtype, errors[PUBLISHED], gradient=False)
    for name, error in errors.items():
        if name != PUBLISHED and not error <= bound:
            raise ValueError(f"codec: {name}: expected a relative error of at most {bound:.2g}, got {error:.2g}")


def growth(name: str, height: int, width: int, dtype: torch.dtype) -> int:
    """Peak memory during one call minus memory before it, in bytes; a small frame, or compilation, runs first."""
    Frame(32, 32).call(name, dtype)()
    call = Frame(height, width).call(name, dtype)
    if name == COMPILED:
        call()
    before = reset_peak("cpu")
    call()
    return peak_bytes("cpu") - before


def elsewhere(measured: str, name: str, size: str, dtype: str, options: argparse.Namespace) -> str:
    """What a new process, on the C library's default heap, prints with `--growth NAME` or `--times NAME`.

    Raises OSError with its error if it fails.
    """
    command = [sys.executable, "-m", "benchmarks", "codec", f"--{measured}", name, "--size", size, "--dtype", dtype]
    command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
    answer = subprocess.run(command, env=default_heap(), capture_output=True, text=True, check=False)
    if answer.returncode:
        raise OSError(f"codec: {measured} of {name}: not measured: {answer.stderr.strip() or 'it was killed'}")
    return answer.stdout


def report(result: dict) -> str:
    """The result as Markdown; gains are those of the median over the published formulation."""
    published = {(r["size"], r["dtype"]): r for r in result["rows"] if r["contender"] == PUBLISHED}
    rows = []
    for row in result["rows"]:
        base = published[row["size"], row["dtype"]]
        cells = [row["size"], row["dtype"], row["contender"], f"{row['ms']:.0f} ms", f"{base['ms'] / row['ms']:.2f} x"]
        rows.append([*cells, f"{row['growth_bytes'] / MIB:.0f} MiB"])
    return table(["frame", "activations", "contender", "time", "gain", "memory growth"], rows)
