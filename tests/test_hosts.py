"""Several hosts for real: processes that meet over the network and train one network."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import SMALL, checkpoints_of, finish, rows_of, start

OPTIONS = ["--train.epochs", 3, "--train.batch-size", 256, *SMALL]  # 5 steps an epoch


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_two(folder, env):
    """Two processes with a device each."""
    options = ["--auto-resume", "--run-dir", folder, "--checkpoint.every-steps", 2, *OPTIONS]
    where = ["--coordinator", free_address(), "--processes", 2]
    return [start(*options, *where, "--process-id", i, env=env) for i in range(2)]


def wait_for_step(step, folder, processes):
    while max(checkpoints_of(folder), default=0) < step:
        assert all(process.poll() is None for process in processes), finish(processes[0])[2]
        time.sleep(0.01)


def test_two_processes_of_which_one_is_killed_and_one_is_stopped(env, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "one process"
    two_devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    one = start("--run-dir", whole, *OPTIONS, env={**env, **two_devices})

    survivor, killed = start_two(folder, env)
    wait_for_step(2, folder, [survivor, killed])
    killed.kill()
    finish(killed)
    status, _, err = finish(survivor)
    assert status == 1 and "error: process 0 of 2 stopped; " in err

    stopped, other = start_two(folder, env)
    wait_for_step(6, folder, [stopped, other])
    other.terminate()  # only one of them is told, and not the one that leads
    for process in (stopped, other):
        status, _, err = finish(process)
        assert status == 75, err
    assert 6 <= max(checkpoints_of(folder)) < 15

    said = []
    for process in start_two(folder, env):
        status, out, err = finish(process)
        assert status == 0, err
        said.append("global batch 256 on 2 devices of 2 processes, 128 on each" in out)
        said.append("test accuracy" in out)
    assert said == [True, True, False, False]
    assert finish(one)[0] == 0
    for row, other in zip(rows_of(folder), rows_of(whole), strict=True):
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4, err_msg=name)


ONE_OF_SEVERAL = """
import pathlib, sys
import jax
coordinator, process, processes, folder = sys.argv[1:]
if processes != "1":
    jax.distributed.initialize(coordinator, int(processes), int(process))
import test_task
share = test_task.Share(8, int(process), int(processes))
test_task.train(pathlib.Path(folder), share=share)
"""


def test_two_processes_judge_a_task_whose_results_stay_where_they_are(env, tmp_path):
    """The processes' own predictions, each once, give one process's metrics."""
    coordinator = free_address()

    def begin(process, processes):
        folder = tmp_path / str(processes)
        folder.mkdir(exist_ok=True)
        devices = f"--xla_force_host_platform_device_count={8 // processes}"
        path = os.pathsep.join([str(pathlib.Path(__file__).parent), os.getcwd()])
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                ONE_OF_SEVERAL,
                coordinator,
                str(process),
                str(processes),
                folder,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **env, "XLA_FLAGS": devices, "PYTHONPATH": path},
        )

    for process in [begin(0, 1), begin(0, 2), begin(1, 2)]:
        status, _, err = finish(process)
        assert status == 0, err
    alone, together = rows_of(tmp_path / "1"), rows_of(tmp_path / "2")
    assert len(alone) == 3
    for row, other in zip(alone, together, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
