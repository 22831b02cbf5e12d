"""Several ranks: all skip together, wherever the overflow is, and a scale that follows the norm is one scale."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import math, os, sys
import torch, torch.distributed as dist

rank, port, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
"""

LEAVE = """
sys.stdout.flush()
dist.barrier(device_ids=[rank] if device.type == "cuda" else None)
# Not through torch's teardown of gloo: without a line of halfstep it aborts about one process in ten.
os._exit(0)
"""

SHARDED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from halfstep import GradScaler

mesh = init_device_mesh(device.type, (2,))
weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3, device=device), mesh, [Shard(0)]))
plain = torch.nn.Parameter(torch.zeros(2, device=device))
fused = sys.argv[4] == "fused"
parameters = [weight] if fused else [weight, plain]  # torch's fused Adam takes no mixture
optimizer = torch.optim.Adam(parameters, lr=1.0, fused=fused, foreach=False)
scaler = GradScaler(device.type, init_scale=8.0)
for bad_rank in (None, 1, 0):
    optimizer.zero_grad()
    scaler.scale(torch.zeros((), device=device))
    grad = torch.full((4, 3), 8.0, device=device)
    weight.grad = distribute_tensor(grad, mesh, [Shard(0)])
    plain.grad = torch.zeros(2, device=device)
    if rank == bad_rank:
        weight.grad._local_tensor[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
values = weight._local_tensor.flatten().round(decimals=4).abs().tolist()
print(values, scaler.get_scale(), math.isnan(scaler.history()[0].norm))
"""

FOLLOWING = """
from halfstep import CustomPrecisionPolicy, MixedPrecisionManager

class Policy(CustomPrecisionPolicy):
    def should_use_fp16(self, layer_type, layer_name):
        return layer_name != "1"
    def get_loss_scale_factor(self, gradient_norm):
        return 2.0**6 if gradient_norm > 0.1 else 2.0**10

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).to(device)
model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
manager = MixedPrecisionManager("pytorch", initial_loss_scale=2.0**8, custom_policy=Policy())
model, optimizer, scaler = manager.setup_pytorch_training(model, optimizer)
torch.manual_seed(rank)
scales = []
for step in range(9):
    optimizer.zero_grad()
    with manager.autocast_context():
        out = model(torch.randn(8, 4).to(device))
        assert out.dtype is torch.float32
        loss = out.square().mean() * (0.001 if step % 2 else 3.0 + 0.1 * rank)
    if step == 5 and rank == 1:
        loss = loss * math.inf
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    scales.append(scaler.get_scale())
parameters = [parameter.detach().sum().item().hex() for parameter in model.parameters()]
print(scales, scaler.counters()["skipped"], parameters)
"""

# FSDP: gradients are shards, and in the end each rank has its part of what torch's own sharded scaler makes of them.
FULLY_SHARDED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from halfstep import GradScaler

mesh = init_device_mesh(device.type, (2,))

def trained(scaler):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5)).to(device)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    for step in range(6):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 6, generator=generator).to(device)).square().mean()
        scaler.scale(loss * (math.inf if step == 2 + rank else 1.0)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    return [parameter.to_local() for parameter in model.parameters()], scaler.get_scale()

ours, scale = trained(GradScaler(device.type, init_scale=2.0**10))
torchs, their_scale = trained(torch.amp.GradScaler(device.type, init_scale=2.0**10))
print(all(torch.equal(a, b) for a, b in zip(ours, torchs, strict=True)), sum(each.numel() for each in ours) > 0)
print(scale == their_scale == 2.0**8, scale)
"""

BACKENDS = ["gloo", pytest.param("nccl", marks=[pytest.mark.cuda, pytest.mark.two_gpus])]


def run_two_ranks(tmp_path: Path, worker: str, *arguments: str) -> list[str]:
    (tmp_path / "worker.py").write_text(RANK + worker + LEAVE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, tmp_path / "worker.py", str(rank), port, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = []
    for rank in ranks:
        output, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
        outputs.append(output)
    return outputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["fused", "plain"])
def test_all_ranks_skip_when_one_shard_overflows(tmp_path: Path, backend: str, optimizer: str) -> None:
    assert run_two_ranks(tmp_path, SHARDED, backend, optimizer) == [f"{[0.0] * 6} 2.0 True\n"] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ranks_follow_the_norm_to_one_scale(tmp_path: Path, backend: str) -> None:
    first, second = run_two_ranks(tmp_path, FOLLOWING, backend)
    assert first == second
    high, low = 2.0**10, 2.0**6
    # The scale after each step is of the norm before; the sixth step overflows on one rank, and so on both.
    expected = [2.0**8, low, high, low, high, high / 2, low, low, high / 2]
    assert first.startswith(f"{expected} 1 "), first


@pytest.mark.parametrize("backend", BACKENDS)
def test_fully_sharded_training_is_that_of_torchs_scaler(tmp_path: Path, backend: str) -> None:
    assert run_two_ranks(tmp_path, FULLY_SHARDED, backend) == ["True True\nTrue 256.0\n"] * 2
