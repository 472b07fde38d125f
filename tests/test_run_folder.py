import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from experiments.runtime import run_folder
from experiments.runtime.errors import UserError

# A process that holds a folder: a run of this host, or one of another host whose locks this one's
# system does not see.
HERE = """
from experiments.runtime import run_folder
import pathlib, sys, time
with run_folder.held(pathlib.Path(sys.argv[1]), "--run-dir"):
    (pathlib.Path(sys.argv[1]) / "config.json").touch()
    print("held", flush=True)
    time.sleep(1000)
"""
ELSEWHERE = """
import filelock, pathlib, socket, sys, time
socket.gethostname = lambda: "elsewhere"
pathlib.Path(sys.argv[1]).mkdir()
with filelock.SoftFileLease(sys.argv[1] + "/.holder", lease_duration=float(sys.argv[2])).acquire():
    print("held", flush=True)
    time.sleep(1000)
"""


@contextlib.contextmanager
def holding(folder, code=HERE):
    command = [sys.executable, "-c", code, str(folder), str(run_folder._SILENCE)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_is_used_by_one_run_at_a_time_and_free_when_that_is_killed(tmp_path):
    folder = tmp_path / "run"
    with holding(folder) as process:
        with (
            pytest.raises(UserError) as refused,
            run_folder.held(folder, "--resume"),
        ):
            pass
        assert str(refused.value) == (
            f'--resume: "{folder}" is in use by process {process.pid} on {socket.gethostname()}; '
            "wait until that has ended, stop it, or name another folder."
        )
    with run_folder.held(folder, "--resume"):
        assert (folder / "config.json").exists()
    assert sorted(os.listdir(folder)) == [".lock", "config.json"]


def test_a_folder_of_a_run_on_another_host(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "_SILENCE", 2.0)
    folder = tmp_path / "run"
    with (
        holding(folder, ELSEWHERE) as process,
        pytest.raises(UserError, match=rf"in use by process {process.pid} on elsewhere; "),
        run_folder.held(folder, "--run-dir"),
    ):
        pass
    with run_folder.held(folder, "--run-dir"):
        pass
    line = f'"{folder}" was last used by process {process.pid} on elsewhere; seeing whether that'
    assert capsys.readouterr().out.count(line) == 2


def test_a_new_folder_is_one_that_was_not_there(tmp_path):
    names = []
    for _ in range(3):
        with run_folder.held(tmp_path / "runs" / "x", "--run-dir", new=True) as folder:
            (folder / "config.json").touch()
            names.append(folder.name)
    assert names == ["x", "x-2", "x-3"]


@pytest.mark.parametrize("made", [(), ("runs",), ("runs", "x")])
def test_a_run_that_writes_nothing_leaves_nothing(made, tmp_path):
    tmp_path.joinpath(*made).mkdir(exist_ok=True, parents=True)
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(UserError, match="no data"),
        run_folder.held(tmp_path / "runs" / "x", "--run-dir"),
    ):
        raise UserError("no data")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(UserError, match=r'^--run-dir: "\S+/file/x" cannot be written to: Not a'),
        run_folder.held(tmp_path / "file" / "x", "--run-dir"),
    ):
        pass


def test_a_holder_file_that_a_cut_of_power_left_empty(tmp_path):
    holder = tmp_path / "run" / ".holder"
    holder.parent.mkdir()
    holder.write_bytes(b"")
    (holder.parent / "config.json").write_text("{}")
    os.utime(holder, (time.time() - 600,) * 2)
    with run_folder.held(holder.parent, "--run-dir"):
        assert holder.stat().st_size > 0


def test_the_data_that_a_run_is_trained_on(tmp_path):
    facts = {"training images": 40, "classes": "ab12"}
    run_folder.check_data(tmp_path, facts)  # a run of an older version
    assert not run_folder.has_data_record(tmp_path)
    run_folder.record_data(tmp_path, facts)
    assert run_folder.has_data_record(tmp_path)
    run_folder.check_data(tmp_path, {**facts, "a fact of a newer version": 3})
    with pytest.raises(UserError) as refused:
        run_folder.check_data(tmp_path, {"training images": 39, "classes": "ab12"})
    assert "trained on other data: training images was 40 and is 39. Continue it" in str(
        refused.value
    )
    with pytest.raises(UserError, match="classes was ab12 and is unknown. "):
        run_folder.check_data(tmp_path, {"training images": 40})
    with pytest.raises(UserError, match="processes of this run read different data: classes was"):
        run_folder.check_data(tmp_path, {**facts, "classes": "x"}, new=True)
    for damaged in ("{", "{}", json.dumps([1])):
        (tmp_path / "data.json").write_text(damaged)
        with pytest.raises(UserError, match='data.json", the record of the data, cannot be read'):
            run_folder.check_data(tmp_path, facts)
