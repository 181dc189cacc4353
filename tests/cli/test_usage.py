"""Which GPUs are busy is what the driver says of them; where it says nothing, all count as idle."""

from types import SimpleNamespace

import pytest
import torch

from patune.cli import usage


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """An nvidia-smi that answers what it is told, and two GPUs that torch numbers the other way round."""

    def answers(text: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(usage, "SECOND_LOOK_S", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ba"[index]))
    return answers


@pytest.mark.parametrize(
    ("text", "busy"),
    [
        ("GPU-a, 0, 600\nGPU-b, 0, 4", {}),
        ("GPU-a, 0, 2048\nGPU-b, 0, 4", {1: "0% in use, 2.0 GiB of its memory taken"}),
        ("GPU-a, 0, 4\nGPU-b, 97, 512", {0: "97% in use, 0.5 GiB of its memory taken"}),
        ("GPU-a, [N/A], [N/A]", {}),
    ],
)
def test_a_gpu_is_busy_with_kernels_or_memory(driver, text, busy):
    driver(text)
    assert usage.busy_gpus() == busy


def test_a_gpu_that_is_idle_at_the_second_look_is_idle(driver, monkeypatch):
    driver("GPU-a, 97, 4\nGPU-b, 97, 4")
    monkeypatch.setattr(usage.time, "sleep", lambda seconds: driver("GPU-a, 0, 4\nGPU-b, 97, 4"))
    assert usage.busy_gpus().keys() == {0}


def test_without_a_driver_none_is_busy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert usage.busy_gpus() == {}
