"""`lfm show`: show a run."""

import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.commands._output import printed, shown
from pipelines.commands._stored import storage_in
from pipelines.costs import costs_table, plain_line, plain_usage
from pipelines.findings import comparisons, endpoints, measured_table, measurements, searched_table, searches
from pipelines.history import used
from pipelines.lineage import find_run, history, served, states, status, worked
from pipelines.page.account import account
from pipelines.page.document import document, write
from pipelines.store import Store
from pipelines.usage import Usage, foreseen
from pipelines.view import drawn, failure, heard, seconds, sentence, without_fingerprint

SHOWN = 500  # rows, which take a second; --json and --html have all


def act(arguments: Namespace) -> int:
    """Show a run."""
    storage = storage_in(arguments)
    name = find_run(storage, arguments.run)
    events = heard(storage, history(storage, name))
    began = events[0].data
    said = status(storage, name, events)
    live = said in ("running", "serving")
    now = states(events, began["steps"], live=live)
    moment = time.time()
    until = moment if live else 0.0
    why = next((e.data.get("why", "") for e in reversed(events) if e.kind in ("started", "finished")), "")
    took, up = worked(events, until), served(events, until)
    if arguments.html:
        write(Path(arguments.html), document(account(Store(storage), name, now=moment)))
        print(f"run {name}: {said}; see {arguments.html}", file=sys.stderr if arguments.json else sys.stdout)
    spent, plan = used(storage, name, events, until), foreseen(events)
    if arguments.json:
        steps = {n: {**began["steps"][n], **asdict(s), **_costs(n, spent, plan)} for n, s in now.items()}
        return printed({"run": name, "status": said, "began": events[0].time, "ended": events[-1].time,
                       "seconds": took, "served": up, "why": why,
                       "inputs": began["inputs"], "steps": steps, **plain_usage(spent),
                       **({"estimate": plan["total"]} if plan else {})})  # fmt: skip
    if arguments.html:
        return 0
    ended = f"{said}, {why}" if why else said
    print(f"run {name}: {ended}, {seconds(took)}{f', then served for {seconds(up)}' if up else ''}")
    shown(drawn(now, storage, moment, SHOWN))
    for line in without_fingerprint(began["steps"]):
        print(line)
    for step, state in now.items():
        if state.state == "failed":
            print(failure(step, state.data, storage))
    for event in events:
        if event.kind == "workers":
            print(sentence(event, storage))
    if "why" in events[-1].data:  # of a trial that had no plan
        print(events[-1].data["why"])
    if spent is not None:
        print()
        shown(costs_table(tuple(now), spent, plan))
    found = measurements(now)
    if found:
        print()
        shown(measured_table(found))
    for step, tried in searches(now):
        print(f"\nsearch {step}:")
        shown(searched_table(tried))
    for one in comparisons(now):
        print(f"gate: {one['said']}")
    for one in endpoints(now):
        print(f"endpoint: {one['name']} at {one['url']}")
    return 0


def _costs(step: str, spent: Usage | None, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a step took of machines and what was foreseen of that, where it is known."""
    took = {} if spent is None else {"took": plain_line(spent.of(step))}
    return {**took, **({"estimate": plan["steps"][step]} if step in plan.get("steps", {}) else {})}
