"""Run on_gpu.py in a process that sees the GPU. conftest.py hides the GPU from all other tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="this machine has no NVIDIA GPU")
def test_on_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"MALA_GPU": "cuda"}
    if "MALA_VISIBLE_DEVICES" in os.environ:  # its value before conftest.py hid the GPU
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["MALA_VISIBLE_DEVICES"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        ROOT / "tests/on_gpu.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]
