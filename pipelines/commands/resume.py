"""`lfm resume`: go on with a run."""

import sys
from argparse import Namespace
from functools import partial

from operators.catalog import Catalog
from operators.code import Code, bring
from pipelines import stops
from pipelines.commands._planned import inspector_of
from pipelines.commands._stored import storage_and_profile
from pipelines.commands.run import drive_to_end
from pipelines.lineage import Journal, find_run, history
from pipelines.plan import plan as planned
from pipelines.problems import Places
from pipelines.profiles import reached
from pipelines.spec import build
from pipelines.tracking.outbox import tracking


def act(arguments: Namespace) -> int:
    """Go on with a run."""
    storage, profile = storage_and_profile(arguments)
    name = find_run(storage, arguments.run)
    began = history(storage, name)[0].data
    arguments.priority = began.get("priority", 0)
    stops.withdraw(storage, name)
    mlflow = tracking(arguments.mlflow or began["mlflow"], storage)
    journal = Journal.claim(storage, name, waiting=partial(print, file=sys.stderr))
    code = Code(tuple(began["uses"]), tuple((k, v) for k, v in began["files"]))
    catalog = Catalog(bring(code))
    spec = build(dict(began["spec"]), Places(name), code=code, catalog=catalog).whole()
    made = planned(spec, inspector_of(storage), catalog, until=began["until"])
    if profile is not None and arguments.address == "local":
        arguments.address = reached(profile).address
    retries = began["retries"]
    return drive_to_end(made, storage, journal, arguments, forced=(), retries=retries, mlflow=mlflow, profile=profile)
