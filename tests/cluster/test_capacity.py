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
