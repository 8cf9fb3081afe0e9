"""What a Ray of our own leaves goes with its driver, or at the next command."""

import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster import home as module
from cluster.home import MARK, clear, home, marked

SLEEP = ["sh", "-c", "setsid sleep 1000 > /dev/null & echo $!"]  # an orphan in a session of its own


@pytest.fixture
def temporary(monkeypatch):
    """Where homes are made, and nobody else's are."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setattr(module.tempfile, "gettempdir", lambda: folder)
        yield Path(folder)


def orphan():
    return int(subprocess.run(SLEEP, check=True, stdout=subprocess.PIPE).stdout)


def lives(pid):
    try:
        return bool(Path(f"/proc/{pid}/environ").read_bytes())  # who waits to be reaped has none
    except OSError:
        return False


def test_what_was_begun_goes_with_the_folder_and_what_was_begun_beside_it_stays(temporary):
    with home() as folder:
        assert list(temporary.iterdir()) == [folder]
        with marked(folder):
            begun = orphan()
        beside = orphan()
        assert lives(begun)
        clear()
        assert folder.exists(), "its driver lives"
    try:
        assert (lives(begun), lives(beside)) == (False, True)
        assert list(temporary.iterdir()) == []
        assert MARK not in os.environ
    finally:
        os.kill(beside, 9)


def test_what_has_written_a_title_over_its_environment_is_known_by_a_file_that_it_has_open(temporary):
    """As Ray's agents do, of which some outlive the rest by a minute."""
    code = "import sys; file = open(sys.argv[1], 'a'); print('there', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with home() as folder:
        begun, beside = (
            subprocess.Popen(["ray::Agent", "-c", code, str(log)], executable=sys.executable, **pipes)
            for log in (folder / "agent.log", temporary / "other.log")
        )
        for one in (begun, beside):
            assert one.stdout.readline() == b"there\n"
    try:
        assert begun.wait(timeout=60) == -9
        assert beside.poll() is None
    finally:
        beside.kill()
        for one in (begun, beside):
            one.communicate()


def test_what_is_left_when_driver_and_warden_were_killed_goes_at_the_next_command(temporary):
    code = "import sys; from cluster.home import home, marked; from tests.cluster.test_home import orphan\n"
    code += "with home() as folder, marked(folder): print(orphan(), flush=True); sys.stdin.read()"
    driver = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    begun = int(driver.stdout.readline())
    (folder,) = temporary.iterdir()
    wardens = [
        int(p.name)
        for p in Path("/proc").glob("[1-9]*")
        if lives(p.name) and f"cluster.warden\0{folder}\0" in (p / "cmdline").read_text()
    ]
    handles = [os.pidfd_open(pid) for pid in wardens]
    for pid in (*wardens, driver.pid):
        os.kill(pid, 9)
    driver.communicate()
    for handle in handles:  # its lock goes with it, and it is nobody's child here
        select.select([handle], [], [], 60)
        os.close(handle)
    assert (len(wardens), folder.exists(), lives(begun)) == (1, True, True)
    clear()
    assert (list(temporary.iterdir()), lives(begun)) == ([], False)


def test_a_folder_that_another_user_or_nobody_of_ours_has_made_stays(temporary):
    (temporary / "lfm-ray").mkdir()
    (temporary / "lfm-ray-file").touch()
    clear()
    assert sorted(p.name for p in temporary.iterdir()) == ["lfm-ray", "lfm-ray-file"]


@pytest.mark.parametrize(("usual", "where"), [("/" + "x" * 60, "/tmp"), ("/var/tmp", "/var/tmp")])
def test_homes_lie_where_sockets_have_short_enough_names(monkeypatch, usual, where):
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: usual)
    assert module.short_place() == Path(where)
