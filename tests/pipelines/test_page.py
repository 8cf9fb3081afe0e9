"""The page of a run: what it says for each kind of run, and that a browser needs nothing else for it."""

import contextlib
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import psutil
import pytest

from cluster import processes
from pipelines import lineage
from pipelines.__main__ import main
from pipelines.lineage import Event, Journal
from pipelines.page.account import account
from pipelines.page.curves import series
from pipelines.page.document import document
from pipelines.page.intervals import comparisons
from pipelines.page.markup import ALONE
from pipelines.page.scales import MINUS, brief
from pipelines.store import Result, canonical

RUN = "20260101-000000000-tiny-abcd"
EVIL = "<script>alert(1)</script>\"'&\x00"


class Page(HTMLParser):
    """A page as a browser reads it: its elements, its text, and whether each end fits its start."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.said = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.said).split()).replace(MINUS, "-")

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ALONE
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.said.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def part(html, tag):
    """The first element of its kind."""
    return html[html.index(f"<{tag}") : html.index(f"</{tag}>")] + f"</{tag}>"


class Told:
    """A run whose journal is written by hand: one call for each thing that happens."""

    def __init__(self, store, steps, *, run=RUN, name="tiny", inputs=("text",), effects=()):
        self.store, self.run, self.time = store, run, 1_767_225_600.0
        self.steps = {n: self.step(n, filled, n in effects) for n, filled in steps.items()}
        self.inputs = {n: {"kind": "dataset", "uri": f"/data/{n}.jsonl", "digest": f"d-{n}"} for n in inputs}
        self.name = name
        self.begin()

    def step(self, name, filled, effect):
        flat = [f for one in filled.values() for f in ([one] if isinstance(one, str) else one)]
        operators = {"gate": "gate", "serve": "serve", "register": "register", "search": "search"}
        operator = next((o for word, o in operators.items() if name.startswith(word)), "make")
        return {"operator": operator, "method": None, "params": {"max_steps": 9}, "inputs": filled, "effect": effect,
                "resources": {"workers": 1}, "kind": "model", "needs": [f for f in flat if f != "text"],
                "fingerprint": f"f-{name}", "components": {"operator": operator, "method": None}}  # fmt: skip

    def begin(self):
        self.journal = Journal.claim(self.store.storage, self.run)
        spec = {"name": self.name}
        self.tell("started", run=self.run, spec=spec, inputs=self.inputs, steps=self.steps, version="1.2.3")

    def tell(self, kind, step="", *, after=1.0, **data):
        self.time += after
        self.journal.write([Event(kind, step, data, self.time)])
        return self

    def start(self, step, lines=()):
        attempt = self.journal.attempts(step) + 1
        log = f"runs/{self.run}/logs/{step}/{attempt}.log"
        self.store.storage.append(log, b"it says something\n")
        if lines:
            text = "".join(json.dumps({"time": self.time, **line}) + "\n" for line in lines)
            self.store.storage.append(f"runs/{self.run}/measures/{step}/{attempt}.jsonl", text.encode())
        return self.tell("start", step, attempt=attempt, log=log)

    def end(self, step, *, after=10.0, **about):
        made = {"artifact": "model", "digest": f"d-{step}", "about": about, "seconds": after}
        result = Result(fingerprint=f"f-{step}", kind="model", digest=f"d-{step}", about=about, run=self.run, step=step,
                        seconds=after, components=self.steps[step]["components"])  # fmt: skip
        self.store.commit(result)
        return self.tell("commit", step, after=after, attempt=self.journal.attempts(step), **made)

    def done(self, step, lines=(), *, after=10.0, **about):
        return self.start(step, lines).end(step, after=after, **about)

    def reuse(self, step, run="earlier", **about):
        return self.tell("reuse", step, artifact="model", digest=f"d-{step}", about=about, run=run, seconds=7.0)

    def fail(self, step, error="ValueError", sentence="it went wrong."):
        attempt = self.journal.attempts(step)
        log = f"runs/{self.run}/logs/{step}/{attempt}.log"
        return self.tell("fail", step, error=error, sentence=sentence, log=log, seconds=1.0, attempt=attempt)

    def finish(self, status="done"):
        return self.tell("finished", status=status)

    def account(self, now=0.0):
        return account(self.store, self.run, now=now)

    def page(self, now=0.0):
        return Page(document(self.account(now)))


CHAIN = {"a": {"data": "text"}, "b": {"model": "a"}, "c": {"model": "b"}}


@pytest.fixture
def told(store):
    return lambda steps=CHAIN, **more: Told(store, steps, **more)


def losses(*values, name="loss", **others):
    total = len(values)
    return [
        {"done": i, "total": total, "measures": {name: v, **{k: o[i - 1] for k, o in others.items()}}}
        for i, v in enumerate(values, 1)
    ]


# ---- every kind of run


def test_a_finished_run_shows_its_steps_times_and_what_it_came_from(told):
    run = told().done("a").done("b", after=75.0).done("c").finish()
    page = run.page()
    assert {s.state for s in run.account().steps.values()} == {"done"}
    assert "tiny done" in page.text
    assert "took 1 min 39 s" in page.text
    assert "2026-01-01 00:00:01 UTC" in page.text
    assert "3 done" in page.text
    assert "lfm 1.2.3" in page.text
    assert "1 min 15 s" in page.text
    assert f"{run.store.storage.uri}/runs/{RUN}/logs/b/1.log" in page.text
    assert {"f-a", "f-b", "f-c", "d-c"} <= set(page.text.split())
    assert [h for h in ("What went wrong", "Evaluations", "Gate", "Curves") if h in page.text] == []


def test_machines_are_drawn_from_when_they_came_to_when_they_went(told):
    run = told({"a": {"data": "text"}})
    assert 'id="machines"' not in document(run.account()), "nobody has counted any"
    run.tell("nodes", nodes={"cpu": 1})
    run.tell("nodes", after=10.0, nodes={"cpu": 1, "l4": 2})
    run.tell("nodes", after=20.0, nodes={"l4": 4})
    run.tell("nodes", after=30.0, nodes={})
    run.finish()
    html = document(run.account())
    rows = re.findall(r'<tr><th scope="row">(?:cpu|l4).*?</tr>', html)
    cpu, l4 = (Page(row).all("i") for row in rows)
    assert [i["title"] for i in cpu] == ["1 from +1.0 s to +11.0 s", "1 from +11.0 s to +31.0 s"]
    assert [i["title"] for i in l4] == ["2 from +11.0 s to +31.0 s", "4 from +31.0 s to +1 min 1 s"]
    assert [i["style"].rpartition("top:")[2] for i in l4] == ["55%", "10%"], "as high as there are"


def test_a_failed_run_says_so_first_and_how_to_go_on(told):
    run = told().done("a").start("b").fail("b").finish("failed")
    page = run.page()
    assert [s.state for s in run.account().steps.values()] == ["done", "failed", "skipped"]
    log = f"{run.store.storage.uri}/runs/{RUN}/logs/b/1.log"
    assert f"b failed in attempt 1 with ValueError : it went wrong. Log: {log}" in page.text
    assert f"Go on with lfm resume {RUN}" in page.text
    assert page.text.index("What went wrong") < page.text.index("Graph")
    assert "Not run: c ." in page.text


def test_a_step_that_failed_once_and_then_went_well_is_done_and_the_failure_stays_visible(told):
    run = told({"a": {"data": "text"}}).start("a").fail("a").done("a").finish()
    (step,) = run.account().steps.values()
    assert (step.state, [a.state for a in step.attempts], step.seconds) == ("done", ["failed", "done"], 10.0)
    assert "; another attempt went well." in run.page().text
    assert "in attempt 2" in run.page().text


def test_a_step_whose_number_of_workers_changed_says_how_many_there_were(told):
    run = told({"a": {"data": "text"}}).start("a").tell("workers", "a", workers=1, why="others wait", attempt=1)
    run.tell("workers", "a", workers=4, why="there is room for more", attempt=1)
    with driven(run):
        assert run.account(now=run.time + 1).steps["a"].state == "running"
    text = run.fail("a").done("a").finish().page().text
    assert "workers of attempt 1 1: others wait; 4: there is room for more" in text
    assert "workers of attempt 2" not in text


def test_a_step_that_nothing_could_hold_failed_without_an_attempt(told):
    run = told().done("a").tell("wait", "b", why="asks for 9 GPUs.")
    with driven(run):
        assert [s.state for s in run.account(now=run.time + 1).steps.values()] == ["done", "waiting", "waiting"]
    said = {"error": "Unschedulable", "class": "capacity", "sentence": "asks for 9 GPUs.", "log": "", "attempt": 1}
    run.tell("fail", "b", **said).finish("failed")
    assert [s.state for s in run.account().steps.values()] == ["done", "failed", "skipped"]
    text = run.page().text
    assert "b failed in attempt 1 with Unschedulable : asks for 9 GPUs." in text
    assert "waited asks for 9 GPUs." in text
    assert "logs/b" not in text


def test_a_step_that_waits_for_its_turn_says_behind_whom(told, capsys):
    why = "its turn on the cluster comes after run other"
    run = told().done("a").tell("wait", "b", why=why, behind=["other"])
    with driven(run):
        listed = ["ps", "--store", run.store.storage.uri]
        assert main([*listed, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["waits"] == {"b": why}
        assert main(listed) == 0
        assert f"1/3; b waits, {why}" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_used_only_stored_results_shows_them_with_the_curves_of_the_run_that_made_them(told):
    told(run="20250101-000000000-tiny-0000").done("a", losses(3.0, 2.0, 1.5)).done("b").done("c").finish()
    run = told().reuse("a").reuse("b").reuse("c").finish()
    page = run.page()
    assert [s.state for s in run.account().steps.values()] == ["reused"] * 3
    assert "No step had to run. Reused without running: a , b , c ." in page.text
    assert "reused from run earlier, where it took 7.0 s" in page.text
    assert len(page.all("figure")) == 1
    assert "loss from 3 at step 1 to 1.5 at step 3, lowest 1.5 at step 3" in str(page.all("svg"))


@contextlib.contextmanager
def driven(run):
    """Another process that lives drives the run."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        claim = {**processes.this(), "pid": other.pid, "born": psutil.Process(other.pid).create_time()}
        key = f"runs/{RUN}/claims/000001.json"
        run.store.storage.replace_if_match(key, canonical(claim), run.store.storage.read(key))
        yield
        other.communicate(b"\n")


def test_a_run_whose_driver_lives_is_shown_as_of_now(told):
    run = told().done("a").start("b", losses(3.0, 2.0))
    with driven(run):
        found = run.account(now=run.time + 30)
    page = Page(document(found))
    assert [s.state for s in found.steps.values()] == ["done", "running", "waiting"]
    assert found.steps["b"].seconds == 30
    assert "as of 2026-01-01 00:00:43 UTC" in page.text
    assert "2/2" in page.text
    assert "Waiting: c ." in page.text
    assert "What went wrong" not in page.text


def test_a_run_that_stays_for_its_endpoint_is_serving(told):
    run = told({"a": {"data": "text"}}).done("a").tell("serving", endpoints=[])
    with driven(run):
        found = run.account(now=run.time + 90)
    assert (found.status, found.served, found.sessions) == ("serving", 90, ((run.time - 12, run.time),))
    assert "tiny serving" in Page(document(found)).text


def test_a_run_without_a_driver_was_interrupted(told):
    run = told().done("a").start("b")
    found = run.account(now=9e9)
    assert (found.status, found.now) == ("interrupted", 0.0)
    assert [s.state for s in found.steps.values()] == ["done", "interrupted", "skipped"]
    assert "It was interrupted before it ended. Go on with lfm resume" in run.page().text


def test_of_a_killed_run_the_page_tells_what_its_steps_reported_last_like_the_terminal(told, capsys):
    run = told().done("a").start("b", [{"done": 1, "total": 9, "time": 1_767_225_600.0 + 73}])
    found = run.account(now=9e9)
    assert found.sessions == ((run.time - 12, run.time + 60),)
    assert (found.steps["b"].state, found.steps["b"].seconds) == ("interrupted", 60)
    assert "took 1 min 12 s" in Page(document(found)).text
    assert main(["show", RUN, "--store", run.store.storage.uri, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["seconds"] == 72
    assert {n: s["state"] for n, s in said["steps"].items()} == {"a": "done", "b": "interrupted", "c": "waiting"}


def test_a_resumed_run_leaves_out_the_time_in_which_nobody_worked(told):
    run = told().done("a").start("b")
    began, stopped = run.time - 12.0, run.time
    run.time += 7200
    run.begin()
    run.reuse("a", RUN).done("b", after=20.0).done("c").finish()
    found = run.account()
    assert [s.state for s in found.steps.values()] == ["done"] * 3
    assert [a.state for a in found.steps["b"].attempts] == ["interrupted", "done"]
    assert found.sessions[0] == (began, stopped)
    assert sum(e - b for b, e in found.sessions) == 12 + 1 + 1 + 20 + 1 + 10 + 1 + 1 - 1
    page = run.page()
    assert "resumed once" in page.text
    assert "+2 h 0 min" in page.text


def test_while_a_resumed_run_goes_on_what_its_first_driver_left_stays_interrupted(told, monkeypatch):
    run = told().done("a").start("b")
    run.time += 7200
    run.begin()
    run.reuse("a", RUN).start("b")
    monkeypatch.setattr(lineage, "lives", lambda storage, run: True)
    found = run.account(now=run.time + 30)
    assert [(a.state, a.ended - a.began) for a in found.steps["b"].attempts] == [
        ("interrupted", 0.0),
        ("running", 30.0),
    ]
    assert [s.state for s in found.steps.values()] == ["done", "running", "waiting"]


def test_what_an_endpoint_was_up_for_is_no_work(told):
    run = told({"a": {"data": "text"}, "serve_it": {"model": "a"}}, effects=("serve_it",)).done("a")
    proof = {"from_artifact": 2e-7, "from_base": 0.25}
    run.done("serve_it", url="http://127.0.0.1:8000/v1", name="helper", model="d-a", probe=proof)
    run.tell("serving", endpoints=[]).tell("finished", after=3600.0, status="done")
    found = run.account()
    assert found.served == 3600
    assert sum(e - b for b, e in found.sessions) == 23
    page = run.page()
    assert "served 1 h 0 min" in page.text
    assert "logits differ from artifact by 2e-7 logits differ from base by 0.25" in page.text
    assert "http://127.0.0.1:8000/v1" in [a.get("href") for a in page.all("a")]


def test_what_was_registered_is_shown_with_its_version(told):
    run = told({"a": {"data": "text"}, "register_it": {"model": "a"}}, effects=("register_it",)).done("a")
    run.done("register_it", registered={"name": "helper", "version": 3, "alias": "champion"}).finish()
    assert "Registered by register_it name helper version 3 alias champion" in run.page().text


def test_steps_come_in_the_order_of_the_plan_even_where_the_journal_was_sorted(told):
    steps = {"z": {"data": "text"}, "m": {"model": "z"}, "a": {"model": "m"}, "k": {"model": "z"}}
    run = told(steps).finish("failed")
    assert list(run.account().steps) == ["z", "m", "a", "k"]
    key = f"runs/{RUN}/journal/000001-000001.json"
    old = run.store.storage.read(key)
    run.store.storage.replace_if_match(key, canonical(json.loads(old)), old)
    run.store.storage.delete(f"runs/{RUN}/packs")  # which older journals do not have either
    assert list(run.account().steps) == ["z", "k", "m", "a"]


# ---- results


def test_evaluations_stand_in_one_table_with_the_best_of_each_column(told):
    steps = {"one": {"model": "text"}, "two": {"model": "text"}}
    run = told(steps)
    run.done("one", sets={"x": {"documents": 5, "loss": 2.0, "perplexity": math.exp(2), "tokens": 9.0}})
    both = {"x": {"documents": 5, "loss": 1.5, "perplexity": math.exp(1.5), "exact_match": 0.25, "chrf": 0.5}}
    run.done("two", sets={**both, "y": {"documents": 7, "loss": 11.0}}, parameters=3_900_000).finish()
    html = document(run.account())
    table = part(html, "table")
    page = Page(table)
    assert "x 5 documents y 7 documents loss perplexity exact match chrf loss" in page.text
    assert re.findall(r"<b>([^<]*)</b>", table) == ["1.500", "4.482"]
    assert "one 2.000 7.389 not measured not measured not measured" in page.text
    assert "two, 3.9 M parameters 1.500 4.482 0.250 0.500 11.00" in page.text


def test_where_two_look_the_same_no_one_is_the_best(told):
    run = told({n: {"model": "text"} for n in ("one", "two", "three")})
    for step, loss, match in (("one", 2.0, 0.0), ("two", 1.50001, 0.0), ("three", 1.5, 0.0)):
        run.done(step, sets={"x": {"documents": 5, "loss": loss, "exact_match": match}})
    assert "<b>" not in part(document(run.finish().account()), "table")


def test_a_loss_that_is_no_number_is_not_the_best(told):
    run = told({n: {"model": "text"} for n in ("one", "two", "three")})
    for step, loss in (("one", math.nan), ("two", 2.0), ("three", 1.5)):
        run.done(step, sets={"x": {"documents": 5, "loss": loss}})
    table = part(document(run.finish().account()), "table")
    assert re.findall(r"<b>([^<]*)</b>", table) == ["1.500"]


REQUIRED = [{"better": "a", "than": "b", "on": "x", "measure": m} for m in ("loss", "chrf")]


def test_an_open_gate_shows_each_difference_with_its_interval_and_a_word(told):
    run = told({"gate_it": {"model": "text"}})
    report = [{**REQUIRED[0], "mean": -0.5, "low": -0.75, "high": -0.25, "said": ""},
              {**REQUIRED[1], "mean": 0.125, "low": 0.0625, "high": 0.25, "said": ""}]  # fmt: skip
    run.done("gate_it", gate=report).finish()
    page = run.page()
    assert "gate open: all 2 hold" in page.text
    assert "a better than b on x -0.500 [-0.750, -0.250] holds" in page.text
    assert "a better than b on x 0.125 [0.062, 0.250] holds" in page.text
    told = [e["aria-label"].replace(MINUS, "-") for e in page.all("svg") if e.get("class") == "interval holds"]
    assert told == ["-0.500 [-0.750, -0.250], holds", "0.125 [0.062, 0.250], holds"]


def test_a_closed_gate_shows_what_it_measured_before_it_failed(told):
    run = told({"gate_it": {"model": "text"}})
    run.steps["gate_it"]["params"]["require"] = REQUIRED
    run.finish("failed").begin()
    lines = [{"done": i, "total": 2, "measures": {"mean": m, "low": m - 0.25, "high": m + 0.25, "holds": h}}
             for i, (m, h) in enumerate(((-0.5, 1.0), (0.125, 0.0)), 1)]  # fmt: skip
    run.start("gate_it", lines).fail("gate_it", "GateClosed", "gate closed: chrf.").finish("failed")
    assert [(c.measure, c.holds) for c in comparisons(run.account().steps["gate_it"])] == [
        ("loss", True),
        ("chrf", False),
    ]
    page = run.page()
    assert "gate closed: 1 of 2 do not hold" in page.text
    assert "a better than b on x 0.125 [-0.125, 0.375] fails" in page.text
    assert "Curves" not in page.text


# ---- curves


def test_series_leave_out_what_is_no_number_and_what_was_seen_once():
    lines = losses(3.0, math.nan, 1.0, rate=[1.0, 2.0, math.inf])
    lines.append({"done": 3, "total": 3})
    lines.append({"done": 3, "total": 3, "measures": {"held_out_loss": 2.0}})
    assert series(lines) == {"loss": [(1, 3.0), (3, 1.0)], "rate": [(1, 1.0), (2, 2.0)]}


def test_a_curve_has_axes_a_legend_and_says_what_it_was_where_one_points(told):
    values = [8.0 * 0.99**i for i in range(400)]
    lines = losses(*values, learning_rate=[1e-3] * 400)
    for line in lines[49::50]:
        line["measures"]["held_out_loss"] = line["measures"]["loss"] + 0.5
    run = told({"a": {"data": "text"}}).done("a", lines).finish()
    html = document(run.account())
    page = Page(part(html, "figure"))
    assert f"loss {brief(values[-1])} held out loss {brief(values[-1] + 0.5)}" in page.text
    assert "logarithmic" in page.text
    assert "learning rate" in page.text
    assert f"steps 1 to 7 loss {brief(values[6])} to 8 learning rate 0.001" in page.text
    assert "100 200 300 400 step" in page.text
    classes = [e.get("class") for e in page.all("g")]
    assert {"curve c0", "curve c1", "curve small"} <= set(classes)


def test_a_measure_that_never_changes_and_a_single_measure_make_no_trouble(told):
    run = told({"a": {"data": "text"}, "b": {"model": "a"}})
    run.done("a", losses(0.0, 0.0, name="reward")).done("b", losses(4.0)).finish()
    assert [s.get("aria-label") for s in run.page().all("svg") if "reward" in str(s)] == [
        "a: reward from 0 at step 1 to 0 at step 2, lowest 0 at step 1"
    ]


@pytest.mark.parametrize("steps", [1, 41, 100])
def test_the_graph_shows_every_step_however_many_there_are(told, steps):
    draw = random.Random(steps)
    made = {"s0": {"data": "text"}}
    for i in range(1, steps):
        made[f"s{i}"] = {"experts": sorted({f"s{draw.randrange(i)}" for _ in range(draw.randint(1, 3))})}
    page = told(made).finish("failed").page()
    assert sum(e.get("class") == "step skipped" for e in page.all("a")) == steps
    assert f"Graph of {steps} steps" in page.text


# ---- what every page holds to


def full(told):
    """A run with something in every part of the page."""
    steps = {
        "a": {"data": "text"},
        "b": {"model": "a", "data": {"x": "text"}},
        "gate_it": {"model": "a", "results": {"b": "b"}},
        "register_it": {"model": "gate_it"},
        "serve_it": {"model": "register_it"},
        "left": {"experts": ["a", "b"]},
    }
    run = told(steps, effects=("register_it", "serve_it")).start("a").fail("a")
    run.done("a", losses(3.0, 2.0, 1.0)).done("b", sets={"x": {"documents": 5, "loss": 2.0, "chrf": 0.5}})
    run.done("gate_it", gate=[{**REQUIRED[0], "mean": -0.5, "low": -0.75, "high": -0.25, "said": ""}])
    run.done("register_it", registered={"name": "helper", "version": 1, "alias": "champion"})
    run.done("serve_it", url="http://127.0.0.1:1/v1", name="helper", model="d-a", probe={"from_artifact": 0.0})
    return run.start("left").fail("left").finish("failed")


def test_the_page_asks_for_nothing_and_runs_nothing(told):
    html = document(full(told).account())
    page = Page(html)
    assert page.all("script") == []
    assert not [k for _, attributes in page.elements for k in attributes if k.startswith("on")]
    addresses = [v for _, e in page.elements for k, v in e.items() if k in ("href", "src", "xlink:href")]
    assert {a for a in addresses if not a.startswith("#")} == {"data:,", "http://127.0.0.1:1/v1"}
    assert "url(" not in html
    assert "@import" not in html
    (policy,) = (e["content"] for e in page.all("meta") if e.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_every_link_inside_the_page_leads_somewhere_and_no_name_stands_twice(told):
    page = full(told).page()
    names = [e["id"] for _, e in page.elements if "id" in e]
    assert len(names) == len(set(names))
    links = {e["href"].removeprefix("#") for _, e in page.elements if e.get("href", "").startswith("#")}
    assert links <= set(names)
    assert "step-serve_it" in links


def test_every_drawing_says_what_it_shows_or_is_an_ornament(told):
    page = full(told).page()
    drawings = page.all("svg")
    assert len(drawings) > 10
    assert all(d.get("aria-label") or d.get("aria-hidden") == "true" for d in drawings)
    assert [e["aria-label"] for e in page.all("div") if e.get("role") == "img"]
    assert page.all("html") == [{"lang": "en"}]
    assert all(e.get("scope") or e.get("aria-label") for e in page.all("th"))


def test_what_names_and_messages_hold_is_text(told):
    run = told({"a": {"data": "text"}, "b": {"model": "a"}}, name=EVIL)
    run.steps["a"]["params"] = {EVIL: EVIL}
    run.steps["a"]["method"] = {"name": EVIL, EVIL: 1}
    run.inputs["text"]["uri"] = EVIL
    run.finish("failed").begin()
    run.done("a", losses(2.0, 1.0, name=EVIL), sets={EVIL: {"documents": 1, "loss": 1.0, EVIL: 2.0}}, **{EVIL: EVIL})
    run.done("b", url="javascript:alert(1)", name=EVIL, model=EVIL, probe={EVIL: 1.0})
    run.start("b").fail("b", EVIL, EVIL).finish("failed")
    html = document(run.account())
    assert "<script" not in html
    assert "\x00" not in html
    page = Page(html)
    assert page.text.count("<script>alert(1)</script>\"'&\N{REPLACEMENT CHARACTER}") > 10
    structure = "html head meta link title style body header nav main section h1 h2 h3 p ul li dl dt dd div span a"
    words = "b i strong small code time table caption thead tbody tr th td figure figcaption details summary"
    drawings = "svg symbol use g path rect circle line text"
    known = {*structure.split(), *words.split(), *drawings.split()}
    assert {tag for tag, _ in page.elements} <= known
    assert "javascript:alert(1)" not in [e.get("href") for e in page.all("a")]


def test_the_same_journal_gives_the_same_page_whenever_it_is_asked_for(told):
    run = full(told)
    assert document(run.account(now=1.0)) == document(run.account(now=9e9))


def test_the_page_of_twenty_trained_steps_stays_small(told):
    draw = random.Random(4)
    run = told({f"s{i}": {"data": "text"} for i in range(20)})
    for i in range(20):
        noise = [4 + draw.random() for _ in range(1500)]
        run.done(f"s{i}", losses(*noise, learning_rate=noise, gradient_norm=noise))
    assert len(document(run.finish().account()).encode()) < 1_000_000


# ---- writing it


def test_show_writes_the_page_and_says_where(told, store, tmp_path, capsys):
    told().done("a").finish()
    target = tmp_path / "run.html"
    words = ["show", "last", "--store", store.storage.uri, "--html", str(target)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"run {RUN}: done; see {target}\n"
    assert Page(target.read_text()).text.startswith("tiny: done")
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
