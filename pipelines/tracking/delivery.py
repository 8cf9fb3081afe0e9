"""Outbox -> MLflow: one run while it goes on, and whatever earlier ones left; only `mirror`'s process imports this."""

import sys
import threading
import time

from pipelines.faults import reached
from pipelines.lineage import driver
from pipelines.storage.base import Storage, remove
from pipelines.tracking import outbox
from pipelines.tracking.experiment import Experiment, read, stamp
from pipelines.tracking.outbox import Entry
from pipelines.tracking.telling import FAILURES, Tracking, prepare

POLL_S = 1.0
PATIENCE = 10  # times what telling took, before the journal is read again: a tenth of one core
LONGEST_S = 15.0  # but no longer than this


class Delivery:
    """Tells MLflow of the runs of one store."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._open: dict[str, Tracking] = {}

    def deliver(self, run: str, entry: Entry) -> Experiment | None:
        """Tell MLflow what it lacks of a run, and take it off the list once the run is over.

        Returns:
            What MLflow holds now; None where it is another process's turn, or there is no such run.

        Raises:
            FAILURES: MLflow did not do it; nothing is lost.
        """
        with outbox.turn(self.storage) as mine:
            if not mine:
                return None
            experiment = read(self.storage, run)
            if experiment is None:
                if driver(self.storage, run) is None:
                    outbox.close(self.storage, run)
                return None
            if experiment.stamp != entry.told:
                tracking = self._open.pop(run, None) or self._tracking(entry.tracking, experiment)
                tracking.tell(experiment)
                self._open[run] = tracking
            reached("tell: all is told")
            if not experiment.over:
                # Of a run that goes on not all is told: that its driver died would be no further event.
                if experiment.ended is not None:
                    outbox.note(self.storage, run, Entry(entry.tracking, experiment.stamp))
                return experiment
            outbox.close(self.storage, run)
            reached("tell: entry is gone")
            # A resume claims its run and then enters it: that entry must not be the one that went just now.
            if stamp(self.storage, run) != experiment.stamp:
                outbox.enter(self.storage, run, entry.tracking)
            return experiment

    def follow(self, run: str, where: str, ended: threading.Event) -> None:
        """Tell MLflow of a run while it goes on, and of others whenever there is nothing new of it.

        Args:
            run: The run.
            where: Where it is told, as in its entry.
            ended: Set once the driver has written its last event.

        Raises:
            FAILURES: MLflow did not do it when the run was over.
        """
        tried: set[str] = {run}
        while True:
            last, began = ended.is_set(), time.monotonic()
            told = None
            try:
                told = self.deliver(run, Entry(where))
                if told is not None and (told.over or last):
                    return
                self._others(tried, at_most=1)
            except FAILURES:
                if last:
                    raise
            took = time.monotonic() - began
            if last:  # another process has its turn
                time.sleep(POLL_S / 10)
            else:
                ended.wait(max(POLL_S, min(PATIENCE * took, LONGEST_S)))

    def others(self) -> list[str]:
        """Tell MLflow of every run that is open and has no driver that does it; a clause for each that failed."""
        return self._others(set(), at_most=sys.maxsize)

    def _others(self, tried: set[str], *, at_most: int) -> list[str]:
        failed = []
        for run, entry in outbox.entries(self.storage).items():
            if run in tried or driver(self.storage, run) is not None:
                continue
            if not at_most:
                break
            at_most -= 1
            tried.add(run)
            try:
                self.deliver(run, entry)
            except FAILURES as error:
                at = outbox.resolved(entry.tracking, self.storage)
                failed.append(f"MLflow at {at} has not all of run {run}: {reason(error)}")
        return failed

    def prepare(self) -> None:
        """Make the store's own MLflow, unless it is there."""
        scratch = self.storage.scratch()
        try:
            prepare(outbox.database(self.storage), outbox.files(self.storage), scratch)
        finally:
            remove(scratch)

    def _tracking(self, where: str, experiment: Experiment) -> Tracking:
        uri = outbox.resolved(where, self.storage)
        if where != outbox.OWN:
            return Tracking(uri, experiment, None)
        self.prepare()
        return Tracking(uri, experiment, outbox.files(self.storage))


def reason(error: BaseException) -> str:
    """Why MLflow did not do it, in one line: what lies at the bottom, where it is the network."""
    bottom = error
    while (below := bottom.__cause__ or bottom.__context__) is not None:
        bottom = below
    found = bottom if isinstance(bottom, ConnectionError | TimeoutError) else error
    return (str(found).strip() or type(found).__name__).partition("\n")[0]
