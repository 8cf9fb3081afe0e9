"""Who lives, and who only seems to."""

import os
import subprocess
import sys

import psutil

from cluster import processes


def test_this_process_lives_and_none_of_another_machine_is_known_to():
    assert processes.alive(processes.this())
    assert processes.alive({**processes.this(), "host": "elsewhere"}) is None
    assert processes.alive({}) is None


def test_a_number_that_came_again_is_another_process():
    assert processes.alive({**processes.this(), "born": 1.0}) is False


def test_who_has_ended_and_was_not_asked_how_is_dead():
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    claim = {"host": processes.host(), "pid": ended.pid, "born": psutil.Process(ended.pid).create_time()}
    assert processes.alive(claim)
    ended.kill()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.pid_exists(ended.pid)
    assert processes.alive(claim) is False
    ended.wait()
    assert processes.alive(claim) is False
