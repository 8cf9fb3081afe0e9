"""What this machine has, told without Ray."""

import pytest

from cluster import capacity


@pytest.mark.parametrize(
    "model",
    [
        "NVIDIA H100 80GB HBM3",
        "Tesla V100-SXM2-16GB",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA GeForce RTX 5090",
        "NVIDIA L40S",
        "NVIDIA TITAN V",
        "Tesla T4",
    ],
)
def test_a_device_is_called_as_ray_calls_it(model):
    nvidia = pytest.importorskip("ray._private.accelerators.nvidia_gpu")
    assert capacity.accelerator(model) == nvidia.NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(model)


def test_devices_are_read_off_the_driver(tmp_path, monkeypatch):
    for number in range(2):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
        (tmp_path / f"0000:0{number}:00.0" / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   5\n")
    monkeypatch.setattr(capacity, "DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (capacity.here().gpus, capacity.here().accelerators) == (2, frozenset({"H100"}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert capacity.here().gpus == 1
    monkeypatch.setattr(capacity, "DRIVER", tmp_path / "nothing")
    assert (capacity.here().gpus, capacity.here().accelerators) == (0, frozenset())


H100 = {"accelerators": frozenset({"H100"})}


@pytest.mark.parametrize(
    ("node", "asks", "workers"),
    [
        ({"cpus": 8}, {"cpus": 3}, 2),
        ({"cpus": 1}, {"cpus": 0.1}, 10),  # floats say 9
        ({"cpus": 0.3}, {"cpus": 0.1}, 3),  # floats say 2
        ({"cpus": 8, "memory": 10}, {"cpus": 1, "memory": 4}, 2),
        ({"cpus": 8, "memory": 3}, {"cpus": 1, "memory": 4}, 0),
        ({"cpus": 8, "gpus": 2, **H100}, {"cpus": 1, "gpus": 1, "accelerator": "gpu"}, 2),
        ({"cpus": 8, "gpus": 2, **H100}, {"cpus": 1, "gpus": 0.5, "accelerator": "H100"}, 4),
        ({"cpus": 8, "gpus": 2, **H100}, {"cpus": 1, "gpus": 0.6, "accelerator": "gpu"}, 2),  # no share of two GPUs
        ({"cpus": 8, "gpus": 2, **H100}, {"cpus": 1, "gpus": 1, "accelerator": "L4"}, 0),
        ({"cpus": 8, "gpus": 2, **H100}, {"cpus": 1}, 8),
        ({"cpus": 8}, {"cpus": 1, "gpus": 1, "accelerator": "gpu"}, 0),
    ],
)
def test_a_machine_holds_as_many_workers_as_its_scarcest_part(node, asks, workers):
    assert capacity.Node(**node).holds(**asks) == workers


def test_where_nobody_has_looked_all_is_one_machine():
    two = [capacity.Node(cpus=2, memory=4), capacity.Node(cpus=3, memory=5)]
    assert capacity.Capacity.of(two).machines == tuple(two)
    assert capacity.Capacity(cpus=5, gpus=0, memory=9).machines == (capacity.Node(cpus=5, memory=9),)
