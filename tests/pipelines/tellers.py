"""Processes that tell MLflow, and need no second to start: each is a fork of one that has opened MLflow's database.

Run as ``python -m tests.pipelines.tellers URI``. It reads lines, each the folder of a store, and answers each with the
exit code of a process that told MLflow of all that was open there.
"""

import os
import sys
from pathlib import Path

from mlflow import MlflowClient

from pipelines.storage.local import LocalStorage
from pipelines.tracking.delivery import Delivery


def main(uri):
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.search_experiments(max_results=1)
    client.search_registered_models(max_results=1)
    for store in (client._tracking_client.store, client._get_registry_client().store):
        store.engine.dispose()  # no two processes may have one connection
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                code = len(Delivery(LocalStorage(Path(line.strip()))).others())
            finally:
                os._exit(code)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
