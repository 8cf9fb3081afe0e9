"""A compile that was killed keeps nobody waiting; one that goes on does."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.utils import cpp_extension

from operators.learning.extensions import Baton, compile_in_turn

HOLDS = "import sys; file = open(sys.argv[1], 'x'); print('held', flush=True); sys.stdin.read()"
SOURCE = "int answer() { return 42; }"
WAIT_S = 120


@pytest.fixture
def holder(tmp_path):
    """A process that compiles, as far as torch can tell: it has the file open."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_who_comes_while_another_lives_waits_and_who_comes_when_it_is_dead_does_not(tmp_path, holder):
    file = tmp_path / "lock"
    assert not Baton(str(file)).try_acquire()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(Baton(str(file)).wait)
        assert not waits.done()
        assert file.exists()
        holder.kill()
        waits.result(WAIT_S)
    baton = Baton(str(file))
    assert baton.try_acquire()
    assert not Baton(str(file)).try_acquire(), "this process lives"
    baton.release()
    assert not file.exists()


def test_a_stale_one_is_taken(tmp_path):
    (tmp_path / "lock").touch()
    assert Baton(str(tmp_path / "lock")).try_acquire()


@pytest.mark.soak
def test_a_compile_that_was_killed_does_not_hang_the_next(tmp_path, monkeypatch):
    """Torch itself, with its compiler."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    code = (
        "from torch.utils.cpp_extension import load_inline; from operators.learning.extensions import compile_in_turn; "
    )
    code += "compile_in_turn(); "
    code += f"load_inline('answer', {SOURCE!r}, functions=['answer'])"
    killed = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    until = time.monotonic() + WAIT_S
    while not (tmp_path / "answer" / "lock").exists():
        assert killed.poll() is None
        assert time.monotonic() < until
    killed.kill()
    killed.wait()
    assert (tmp_path / "answer" / "lock").exists()
    compile_in_turn()
    assert cpp_extension.load_inline("answer", SOURCE, functions=["answer"]).answer() == 42
