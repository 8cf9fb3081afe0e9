"""Drivers as processes of their own that need no second to start: each is a fork of one that has imported everything.

Run as ``python -m tests.pipelines.drivers``. It opens a Ray of its own, then reads lines of JSON: words of an `lfm`
command, the folder it is typed in and the file its output goes to. For each it answers with the process's id when that
has begun and with its exit code when it has ended.
"""

import json
import os
import subprocess
import sys

# A driver forks before it has Ray, so Ray is opened by another process, and each driver connects to it.
OPENED = """
import sys
from cluster.connect import cluster
with cluster("local"):
    import ray
    sys.stdout.write(ray.get_runtime_context().gcs_address + "\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


def answer(what):
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def main():
    with subprocess.Popen(
        [sys.executable, "-c", OPENED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as held:
        address = held.stdout.readline().strip()

        import ray  # noqa: F401  so that no fork has to import it

        from cluster.pool import opened
        from pipelines.__main__ import main as lfm
        from pipelines.commands import resume, run  # noqa: F401

        run.opened = lambda *_: opened(address)  # as if it had been opened here: a run stays for its endpoints
        answer("ready")
        for line in sys.stdin:
            asked = json.loads(line)
            pid = os.fork()
            if not pid:
                os.chdir(asked["folder"])
                out = os.open(asked["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                code = 1
                try:
                    code = lfm(asked["words"])
                finally:
                    os._exit(code)  # nothing of the one that it was forked from is ended
            answer(pid)
            answer(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        held.stdin.close()


if __name__ == "__main__":
    main()
