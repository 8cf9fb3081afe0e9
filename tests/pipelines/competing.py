"""Two runs that want the GPU of one cluster: prints whose steps started, in that order, as JSON.

Run as ``python -m tests.pipelines.competing ADDRESS STORE``. A step counts as a minute for both, however long it takes.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Barrier

from cluster.pool import Pool, opened
from operators.resources import Resources
from pipelines import ledger, run as driving
from pipelines.lineage import Journal
from pipelines.storage.local import LocalStorage
from pipelines.store import Store
from tests.pipelines.graphs import Step, planned

STEPS = 3
GPU = Resources(gpus_per_worker=1, accelerator="gpu")


class Minutes:
    """A clock that goes on when a step starts."""

    def __init__(self):
        self.order = []

    def __call__(self):
        return 60.0 * len(self.order)

    def watch(self, run, events):
        self.order += [run for e in events if e.kind == "start"]


def wanted(run):
    """A plan of steps that need nothing of each other."""
    made = planned({f"{run}{i}": Step(word=f"{run}{i}") for i in range(STEPS)})
    return replace(made, steps={n: replace(s, resources=GPU) for n, s in made.steps.items()})


def main(address, folder):
    clock, both = Minutes(), Barrier(2)
    ledger.TURN_S = 0.0
    driving.Turns = partial(ledger.Turns, clock=clock)

    @contextmanager
    def here():
        both.wait()
        yield Pool(shared=True)

    def drive(name):
        store = Store(LocalStorage(Path(folder)))
        journal = Journal.claim(store.storage, name)
        return driving.run(wanted(name), store, journal, connect=here, watch=partial(clock.watch, name))

    with opened(address), ThreadPoolExecutor(2) as pool:
        said = list(pool.map(drive, "ab"))
    sys.stdout.write(json.dumps({"said": said, "order": clock.order}))


if __name__ == "__main__":
    main(*sys.argv[1:])
