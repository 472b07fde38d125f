"""What long runs meet, with real processes."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from runs import SMALL, checkpoints_of, finish, rows_of, start, tensorboard


def newest(folder):
    return max(checkpoints_of(folder), default=0)


def begun(folder):
    return tensorboard(folder)[1] if (folder / "tensorboard").exists() else []


def test_a_run_that_is_killed_and_stopped_again_and_again(env, tmp_path):
    seed = time.time_ns()
    print("seed", seed)  # shown where the test fails
    rng, folder, whole = random.Random(seed), tmp_path / "run", tmp_path / "uninterrupted"
    options = ["--train.epochs", 3, *SMALL]
    status, _, err = finish(start("--run-dir", whole, *options, env=env))
    assert status == 0, err

    often = ["--auto-resume", "--run-dir", folder, "--checkpoint.every-steps", 2, *options]
    for life in ("killed", "killed at its start", "stopped", "killed", "done"):
        before, born = newest(folder), begun(folder)
        process = start(*often, env=env)
        if life in ("killed", "stopped"):
            while newest(folder) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.7))
        if life == "killed at its start":
            time.sleep(rng.uniform(0, 6))
        at_least = newest(folder)
        if life == "stopped":
            process.terminate()
        elif life != "done":
            process.kill()
        status, out, err = finish(process)
        assert status == {"stopped": 75, "done": 0}.get(life, -signal.SIGKILL), err
        assert newest(folder) >= at_least >= before
        # It went on from the last checkpoint of the life before, if it came as far as that.
        went_on = begun(folder)[len(born) :]
        assert went_on == [before + 1] or (life == "killed at its start" and not went_on)
        if life == "stopped":
            assert f"stopped by SIGTERM at step {newest(folder)}; continue with --resume" in out
    assert rows_of(folder) == rows_of(whole)


def test_other_options_do_not_continue_a_run(env, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    options = ["--run-dir", tmp_path, "--auto-resume", "--image-size", 16, "--train.epochs", 2]
    status, _, err = finish(start(*options, env=env))
    assert status == 2
    assert "other options: --image-size is 32, not 16; leave these as they are" in err


READING = """
import os, signal, sys, time
from experiments.classification.feed import LabelledImages
from experiments.runtime import data, preemption
from experiments.runtime.pipeline import Loading, Share

if __name__ == "__main__":
    split = data.load(f"folder:{sys.argv[1]}", 8, hold="disk").train
    loading = Loading(workers=2, threads=1)
    feed = LabelledImages(split, split, Share(2), 8, "none", False, 0, loading)
    with preemption.noticed() as stopped_by:
        batches = feed.training(0)
        next(batches)
        os.killpg(0, signal.SIGINT)
        os.killpg(0, signal.SIGTERM)
        read = [next(batches) for _ in range(20)]
        print(stopped_by().name, len(read), flush=True)
        time.sleep(1000)
"""


def test_worker_processes_end_with_their_parent_only(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{i}.png")
    process = subprocess.Popen(
        [sys.executable, "-c", READING, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == b"SIGINT 20\n"
        process.kill()
        # At its end when all are gone that have it: also the process that clears shared memory.
        assert process.communicate(timeout=60) == (b"", None)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_while_a_run_compiles(env, tmp_path):
    cold = {k: v for k, v in env.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    process = start("--run-dir", tmp_path / "run", *SMALL, env=cold)
    while "compiling" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert (status, err) == (130, "\nstopped by Ctrl-C\n")


def mounting(script, **kw):
    """Runs a shell script that may mount disks which only it sees."""
    command = ["unshare", "-Urm", "bash", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, **kw)


CAN_MOUNT = shutil.which("unshare") and not mounting("mount -t tmpfs tmpfs /mnt").returncode


@pytest.mark.skipif(not CAN_MOUNT, reason="nobody may mount a small disk here")
def test_a_disk_that_is_full_and_then_is_not(env, tmp_path):
    """A disk that says there is room, and then has none for the third checkpoint."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    blind = (
        "import shutil; from experiments.classification.__main__ import main; "
        "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 0, 1 << 40); main()"
    )
    script = f"""
        mount -t tmpfs -o size=5m tmpfs {disk}
        {sys.executable} -c '{blind}' --run-dir {disk}/run --train.epochs 4 {" ".join(SMALL)}
        echo status $?, checkpoints $(ls {disk}/run/checkpoints)
        mount -o remount,size=50m {disk}
        {sys.executable} -m experiments.classification --resume {disk}/run
        cp -r {disk}/run {copy}
    """
    result = mounting(script, env={**os.environ, **env})
    assert re.search(
        rf'error: the disk is full: no checkpoint can be written to "{disk}/run/checkpoints"; '
        rf"checkpoint 44 is whole. Free some space and continue with --resume {disk}/run\n",
        result.stderr,
    )
    assert "status 2, checkpoints 22 44 66.orbax-checkpoint-tmp" in result.stdout
    assert [row["epoch"] for row in rows_of(copy)] == [1, 2, 3, 4]
    assert tensorboard(copy)[1] == [1, 45]
