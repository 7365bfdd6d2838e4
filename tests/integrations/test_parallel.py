"""A swapped model under DDP and FSDP: two processes on the CPU get the gradients of one process on the whole batch."""

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from deco_kernels import flow, ops
from deco_kernels.integrations import is_swapped, swap_decoder
from tests.golden_files import relative_error
from tests.integrations.published import gradients_of, published_model
from tests.random_models import random_batch

PROCESSES = 2


def whole_batch():
    batch = random_batch(2 * PROCESSES, 32, 32)
    return batch, torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(2))


def expected_gradients():
    """Gradients of the original forward in one process; the mean over processes is the mean over half batches."""
    batch, grad_output = whole_batch()
    _, gradients = gradients_of(published_model(), batch, grad_output / PROCESSES)
    return gradients


def share_of(rank: int):
    batch, grad_output = whole_batch()
    mine = slice(2 * rank, 2 * rank + 2)
    return tuple(tensor[mine] for tensor in batch), grad_output[mine]


def backward(model: nn.Module, rank: int) -> None:
    inputs, grad_output = share_of(rank)
    (model(*inputs) * grad_output).sum().backward()


def total_loss(model: nn.Module, part: slice, fused: bool) -> torch.Tensor:
    """Loss of the images, times and noise of one process, or of all."""
    (x, t, y), noise = whole_batch()
    objective = flow.Objective(ops.jpeg_frequency_weight(85), fused=fused)
    return objective.losses(model, x[part], y[part], t[part], noise[part])["total"]


def expected_gradients_of_the_loss() -> dict[str, torch.Tensor]:
    model = published_model()
    total_loss(model, slice(None), fused=False).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def backward_of_the_loss(model: nn.Module, rank: int) -> None:
    model.zero_grad(set_to_none=True)
    total_loss(model, slice(2 * rank, 2 * rank + 2), fused=True).backward()


def worst_error(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert gradients.keys() == expected.keys()
    return max(relative_error(gradients[name], expected[name]) for name in expected)


def ddp(rank: int) -> None:
    model = published_model()
    swap_decoder(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for run, expected in ((backward, expected_gradients()), (backward_of_the_loss, expected_gradients_of_the_loss())):
        run(wrapped, rank)
        assert worst_error({name: parameter.grad for name, parameter in model.named_parameters()}, expected) < 1e-5
    refused(wrapped, "DDP")


def fsdp(rank: int) -> None:
    """Blocks and decoder are separate FSDP units; x_embedder belongs to the root."""
    from torch.distributed.fsdp import fully_shard

    model = published_model()
    swap_decoder(model)
    for part in (*model.blocks, model.dec_net, model):
        fully_shard(part)
    for run, expected in ((backward, expected_gradients()), (backward_of_the_loss, expected_gradients_of_the_loss())):
        run(model, rank)
        gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
        assert worst_error(gradients, expected) < 1e-5
    assert is_swapped(model)
    with torch.no_grad():
        model(*share_of(rank)[0])
    refused(model, "FSDP")
    for name in ("x_embedder", "dec_net.res_blocks.1"):
        model = published_model()
        swap_decoder(model)
        for part in (model.get_submodule(name), model):
            fully_shard(part)
        with pytest.raises(TypeError, match="with fully_shard make dec_net one unit and leave x_embedder"):
            model(*share_of(rank)[0])


def refused(wrapped: nn.Module, wrapper: str) -> None:
    with pytest.raises(TypeError, match=f"that {wrapper} has wrapped or compiled"):
        swap_decoder(wrapped)


def work(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    address, patience = f"tcp://127.0.0.1:{port}", timedelta(seconds=600)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES, timeout=patience)
    ddp(rank)
    fsdp(rank)
    dist.destroy_process_group()


def test_gradients_of_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port,), nprocs=PROCESSES)
