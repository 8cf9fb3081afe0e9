"""`lfm serve`: serve a stored model."""

from argparse import Namespace

from operators.catalog import Catalog
from pipelines.commands._planned import capacity_at, inspector_of, plan_on
from pipelines.commands.run import begin
from pipelines.spec import SpecError, build
from pipelines.storage import open_storage


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
    spec, problems = build(raw, "lfm serve", catalog=catalog)
    if problems:
        raise SpecError(tuple(problems))
    there = capacity_at(arguments.address)
    made = plan_on(there, spec, catalog, inspector_of(storage), own=arguments.address == "local")
    return begin(made, storage, arguments)
