"""The static model: cycles per pipe and the largest bound."""

import pytest
import torch

from benchmarks.static import sass
from benchmarks.static.machines import MACHINES, PIXELS, largest_bound, machine_of
from tests.interpreted import interpreted

H100 = MACHINES["sm_90a"]


def test_instructions_occupy_their_pipes():
    cycles = H100.cycles(
        {"HMMA.16816.F32.BF16": 4, "LDSM.16.M88.4": 3, "SHFL.BFLY": 2, "MUFU.TANH": 5, "FFMA": 7, "LDG.E.128": 1}
    )
    assert cycles == {
        "issue": 22,
        "tensor": pytest.approx(4 * H100.mma_cycles),
        "shared": 4 * (3 * 4 + 2 * 1),
        "special": 5 * H100.special_cycles,
        "fp32": 7,
        "alu": 0,
    }


def test_asynchronous_copies_occupy_shared_memory():
    cycles = H100.cycles({"LDGSTS.E.BYPASS.128": 3, "LDG.E.128": 5, "LDGDEPBAR": 1})
    assert (cycles["issue"], cycles["shared"]) == (9, 3 * 4 * H100.shared_cycles)


@pytest.mark.parametrize(
    ("opcode", "passes"),
    [("LDSM.16.M88", 1), ("LDSM.16.MT88.2", 2), ("STSM.16.M88.4", 4), ("LDS", 1), ("LDS.64", 2), ("STS.128", 4),
     ("LDS.U16", 1), ("LDS.U8", 1), ("LDGSTS.E.BYPASS.LTC128B.128", 4), ("LDGSTS.E.64", 2), ("LDGSTS.E", 1)],
)  # fmt: skip
def test_passes_of_shared_memory(opcode, passes):
    assert sass.shared_passes(opcode) == passes


@pytest.mark.parametrize(
    ("opcode", "cycles"),
    [
        ("HMMA.1688.F32.BF16", 6.26 / 2),
        ("HMMA.1688.F32.TF32", 6.26),
        ("HGMMA.64x32x16.F32.BF16", 24.7),
        ("HGMMA.64x16x16.F32.BF16", 24.7),
        ("HGMMA.64x96x16.F32.BF16", 48.7),
        ("HGMMA.64x48x16.F32.BF16", (24.7 + 32.8) / 2),
        ("HGMMA.64x192x16.F32.BF16", 2 * 48.7),
        ("HGMMA.64x64x8.F32.TF32", 32.8),
    ],
)
def test_cycles_of_matmuls_on_hopper(opcode, cycles):
    assert H100.cycles({opcode: 1})["tensor"] == pytest.approx(cycles)


def test_consumer_gpus_pay_for_float32_accumulation():
    """An RTX 5090 accumulates a 16-bit matmul in float32 at half its rate: five times the cycles of an H100."""
    instructions = {"HMMA.16816.F32.BF16": 1.0}
    assert MACHINES["sm_120"].cycles(instructions)["tensor"] > 5 * H100.cycles(instructions)["tensor"]


def test_the_largest_bound_is_named():
    cycles = {"issue": 100.0, "tensor": 90.0}
    by_issue = largest_bound(H100, cycles, bytes_per_px=1)
    assert by_issue.name == "issue"
    assert by_issue.milliseconds == pytest.approx(1e3 * 100 * PIXELS / 16 / (4 * 132) / H100.clock)
    by_bytes = largest_bound(H100, cycles, bytes_per_px=1000)
    assert by_bytes.name == "bytes"
    assert by_bytes.milliseconds == pytest.approx(1e3 * 1000 * PIXELS / H100.bytes_per_second)
    assert largest_bound(H100, None, None) is None


def test_float32_instructions_add_to_mma_sync_on_hopper():
    """As the probe of one mma.sync and four FFMA measures on an H200."""
    cycles = {"issue": 5.0, "tensor": 6.0, "fp32": 4.0}
    both, alone = (machine.milliseconds(cycles, None) for machine in (H100, MACHINES["sm_90"]))
    assert both["tensor"] == pytest.approx(10 / 6 * alone["tensor"])
    assert both["fp32"] == alone["fp32"] and both["issue"] == alone["issue"]
    assert H100.milliseconds({"tensor": 0.0, "fp32": 4.0}, None)["tensor"] == 0


def test_a_device_has_the_rates_of_its_architecture():
    """On a GPU of sm_90 the kernels of cuda are compiled for sm_90a, whose matmuls exclude float32 instructions."""
    device = machine_of("sm_90a", 100, 1.5e9, 4e12)
    assert device == H100._replace(multiprocessors=100, clock=1.5e9, bytes_per_second=4e12)
    assert device.mma_excludes_fp32
    assert machine_of("sm_90", 100, None, 4e12).clock == MACHINES["sm_90"].clock


@interpreted
def test_global_bytes_of_the_decoder_with_a_float32_image():
    """The table of docs/triton.md: D 32, N 3, C 3."""
    from benchmarks.static import triton_traffic

    found = triton_traffic.bytes_of_op("pixel_decoder", 32, torch.bfloat16, torch.float32)
    row, image, velocity = 64, 12, 6
    assert found == {
        "weights.pack_kernel": 0,
        "weights.unpack_grad_kernel": 0,
        "pixel_decoder.forward_kernel": row + image + velocity,
        "pixel_decoder.recompute_kernel": (row + image + velocity) + 4 * row,  # 338
        "adaln_block.backward_kernel+first": 3 * row + 2 * row,
        "adaln_block.backward_kernel": 4 * row + 2 * row,
        "adaln_block.backward_kernel+last": 4 * row + 2 * row,
        "pixel_decoder.embedding_kernel": row + 2 * image,
    }
