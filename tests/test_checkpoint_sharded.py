"""Checkpoints of a model that FSDP2 has shared out to two processes: read back by two, by one, and the reverse."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from classiclm.files import defect, sha256_of_file
from classiclm.train import checkpoint


class Net(nn.Module):
    """Rows that do not divide by two, a single row, and a layer that has no gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


def make_model(seed=0):
    torch.manual_seed(seed)
    return Net()


def train(model, optimizer, n):
    torch.manual_seed(1)
    for _ in range(n):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


class Ranks:
    """The processes of torch.distributed as `checkpoint.save` wants them."""

    def __init__(self):
        from torch import distributed

        self.rank, self.size, self.distributed = distributed.get_rank(), distributed.get_world_size(), distributed

    def gather(self, value):
        values = [None] * self.size
        self.distributed.all_gather_object(values, value)
        return values


def rank_main(folder, rank):
    """One of two processes: three updates, save; another model loads that, and what one process has saved."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = make_model()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    first = checkpoint.save(folder / "two", model, optimizer, checkpoint.State(step=3), {}, Ranks())
    for source, target in ((first, "again"), (checkpoint.folder_of(folder / "one", 3), "other")):
        model = make_model(seed=7)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        checkpoint.load_weights(source, model)
        checkpoint.load_moments(source, model, optimizer)
        checkpoint.save(folder / target, model, optimizer, checkpoint.State(step=3), {}, Ranks())
        train(model, optimizer, 2)
        whole = {n: tensor.full_tensor() for n, tensor in model.state_dict().items()}
        if rank == 0:
            save_file(whole, folder / f"{target}.safetensors")
    distributed.barrier()
    distributed.destroy_process_group()


def test_a_run_shared_out_to_two_goes_on_in_two_or_one_and_from_one_in_two(tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    checkpoint.save(tmp_path / "one", model, optimizer, checkpoint.State(step=3), {})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(tmp_path), str(rank)] for rank in range(2)]
    ranks = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate(timeout=100)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said

    two = checkpoint.folder_of(tmp_path / "two", 3)
    assert defect(two) is None
    parts = {f"{stem}-0000{rank}-of-00002.safetensors" for stem in ("model", "optimizer") for rank in (1, 2)}
    assert {path.name for path in two.iterdir()} == {*parts, "state.json", "MANIFEST.json"}
    assert not set(load_file(two / "model-00001-of-00002.safetensors")).isdisjoint({"a.weight"})
    again = checkpoint.folder_of(tmp_path / "again", 3)
    assert {p: sha256_of_file(two / p) for p in parts} == {p: sha256_of_file(again / p) for p in parts}

    single = make_model(seed=9)
    moments = torch.optim.AdamW(single.parameters(), lr=0.01)
    checkpoint.load_weights(two, single)
    checkpoint.load_moments(two, single, moments)
    for a, b in zip(model.parameters(), single.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    train(single, moments, 2)
    for target in ("again", "other"):
        whole = load_file(tmp_path / f"{target}.safetensors")
        for n, tensor in single.state_dict().items():
            assert torch.allclose(whole[n], tensor, atol=1e-5), (target, n)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), int(sys.argv[2]))
