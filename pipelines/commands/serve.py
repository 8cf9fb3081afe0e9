"""`lfm serve`: serve a stored model."""

from argparse import Namespace

from operators.catalog import Catalog
from pipelines.commands._planned import capacity_at, found_in, inspector_of
from pipelines.commands.run import begin
from pipelines.plan import PlanError, pinned
from pipelines.problems import Places
from pipelines.spec import build
from pipelines.storage.opening import open_storage


def act(arguments: Namespace) -> int:
    """Run a pipeline of one step, which brings up an endpoint."""
    storage = open_storage(arguments.store)
    named = {"model": arguments.model, **({"base": arguments.base} if arguments.base else {})}
    raw = {
        "name": "serve",
        "inputs": {k: {"model": f"lfm://{v}"} for k, v in named.items()},
        "steps": {
            "endpoint": {
                "operator": "serve",
                "inputs": {k: k for k in named},
                "params": {"name": arguments.name, "host": arguments.host, "port": arguments.port},
            }
        },
    }
    catalog = Catalog()
    draft = build(raw, Places("lfm serve"), catalog=catalog)
    spec, inspector, own = draft.whole(), inspector_of(storage), arguments.address == "local"
    problems = found_in(draft, capacity_at(arguments.address), catalog, inspector, own=own)
    if problems:
        raise PlanError(draft.places.sentences(problems))
    return begin(pinned(spec, inspector, catalog), storage, arguments)
