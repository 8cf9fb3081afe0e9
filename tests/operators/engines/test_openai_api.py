import asyncio
import itertools
import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import SimpleNamespace

import openai
import pytest
import uvicorn
from starlette.testclient import TestClient

from operators.engines.native import Native, Sampling
from operators.engines.openai_api import api
from tests.operators import small

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}]}
TEXT = {"model": "tiny", "prompt": "the cat"}
WAIT_S = 60  # until a test gives up on what should have happened


@pytest.fixture(scope="module")
def tokenizer():
    return small.tokenizer()


@pytest.fixture(scope="module")
def engine(tokenizer):
    return Native(small.model(tie_word_embeddings=False), tokenizer)


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(api(engine, "tiny", {"digest": "d" * 64})) as open_client:
        yield open_client


class Scripted:
    """An engine that says what it is told to, one token after another."""

    context, start = None, 0

    def __init__(self, tokenizer, ids):
        self.tokenizer, self.ids = tokenizer, ids
        self.model = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(num_embeddings=small.VOCABULARY))
        self.asked = []

    def decode(self, prompts, sampling):
        self.asked.append((prompts, sampling))
        for token in itertools.islice(self.ids, sampling.max_tokens):
            yield [token]


def scripted(tokenizer, text):
    return Scripted(tokenizer, tokenizer(text)["input_ids"])


def events(answer):
    """The values of a stream."""
    blocks = answer.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def said(values):
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for v in values for c in v["choices"])


def greedy(engine, text, number):
    ids = engine.tokenizer(text)["input_ids"]
    (found,) = engine.complete([ids], Sampling(max_tokens=number))
    return engine.tokenizer.decode(found, skip_special_tokens=True), len(ids), len(found)


def test_models_are_listed_with_what_they_are(client):
    (listed,) = client.get("/v1/models").json()["data"]
    assert listed["id"] == "tiny"
    assert listed["object"] == "model"
    assert listed["digest"] == "d" * 64
    assert client.get("/v1/models/tiny").json() == listed
    assert client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize("wish", [CHAT, TEXT], ids=["chat", "text"])
def test_an_answer_is_what_the_engine_generates(client, engine, wish):
    asked = "<|user|>the cat<|end|><|assistant|>" if wish is CHAT else "the cat"
    text, prompt_tokens, tokens = greedy(engine, asked, 8)
    found = client.post(
        f"/v1/{'chat/' if wish is CHAT else ''}completions", json={**wish, "temperature": 0, "max_tokens": 8}
    )
    assert found.status_code == 200
    answer = found.json()
    (choice,) = answer["choices"]
    assert (choice["message"]["content"] if wish is CHAT else choice["text"]) == text
    assert choice["finish_reason"] == ("length" if tokens == 8 else "stop")
    assert answer["object"] == ("chat.completion" if wish is CHAT else "text_completion")
    assert answer["model"] == "tiny"
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


@pytest.mark.parametrize("wish", [CHAT, TEXT], ids=["chat", "text"])
def test_a_stream_is_the_whole_answer_in_parts(client, wish):
    url = "/v1/chat/completions" if wish is CHAT else "/v1/completions"
    kind = "chat.completion.chunk" if wish is CHAT else "text_completion"
    wish = {**wish, "seed": 3, "max_tokens": 12}
    whole = client.post(url, json=wish).json()
    values = events(client.post(url, json={**wish, "stream": True, "stream_options": {"include_usage": True}}))
    assert said(values) == (whole["choices"][0].get("text") or whole["choices"][0]["message"]["content"])
    assert len(values) > 4
    assert len({v["id"] for v in values}) == 1
    assert {v["object"] for v in values} == {kind}
    *parts, last, counted = values
    assert [p["choices"][0]["finish_reason"] for p in parts] == [None] * len(parts)
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (counted["choices"], counted["usage"]) == ([], whole["usage"])
    assert all(v["usage"] is None for v in [*parts, last])
    if "messages" in wish:
        assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert last["choices"][0]["delta"] == {}
    without = events(client.post(url, json={**wish, "stream": True}))
    assert said(without) == said(values)
    assert all(v["choices"] and "usage" not in v for v in without)


def test_prompts_may_be_tokens_and_messages_parts(client, tokenizer):
    def text(**changes):
        return client.post("/v1/completions", json={**TEXT, "temperature": 0, **changes}).json()["choices"][0]["text"]

    ids = tokenizer("the cat")["input_ids"]
    assert text() == text(prompt=ids) == text(prompt=["the cat"]) == text(prompt=[ids])
    assert text() != text(prompt="a mat")

    def chat(*messages):
        wish = {**CHAT, "messages": messages, "temperature": 0, "max_completion_tokens": 8}
        return client.post("/v1/chat/completions", json=wish).json()["choices"][0]["message"]["content"]

    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    assert chat({"role": "user", "content": parts}) == chat({"role": "user", "content": "the cat"})
    orders = [{"role": role, "content": "sat"} for role in ("system", "developer")]
    user = CHAT["messages"][0]
    assert chat(orders[0], user) == chat(orders[1], user) != chat(user)


def test_the_defaults_are_those_of_openai(tokenizer):
    engine = scripted(tokenizer, "the cat sat on a mat and the dog ran to it while rain fell")
    client = TestClient(api(engine, "tiny", {}))
    client.post("/v1/completions", json=TEXT)
    client.post(
        "/v1/completions", json={**TEXT, "temperature": None, "top_p": None, "n": 1, "stop": None, "seed": None}
    )
    client.post("/v1/chat/completions", json={**CHAT, "temperature": 0.5, "top_p": 0.25, "seed": -3, "max_tokens": 5})
    client.post("/v1/chat/completions", json=CHAT)
    samplings = [sampling for _, sampling in engine.asked]
    assert [(s.temperature, s.top_p, s.max_tokens) for s in samplings[:3]] == [(1, 1, 16), (1, 1, 16), (0.5, 0.25, 5)]
    assert samplings[3].max_tokens > 1000  # as many as there is room for
    assert samplings[2].seed == -3
    assert samplings[0].seed != samplings[1].seed


def test_what_changes_nothing_may_be_said(client):
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "n": 1,
        "user": "me",
        "tools": [],
        "tool_choice": "none",
        "logprobs": False,
        "response_format": {"type": "text"},
        "stream_options": None,
        "stop": [],
    }
    assert client.post("/v1/chat/completions", json={**CHAT, **neutral, "max_tokens": 1}).status_code == 200
    assert (
        client.post("/v1/completions", json={**TEXT, "echo": False, "best_of": 1, "logprobs": None}).status_code == 200
    )


BOTH = {
    "n": 2,
    "temperature": 3,
    "top_p": 0,
    "max_tokens": 0,
    "logprobs": True,
    "seed": 2**63,
    "stop": "",
    "frequency_penalty": 0.5,
    "logit_bias": {"3": 1},
    "stream_options": {"include_usage": 3},
}
ONLY_CHAT = {
    "tools": [{"type": "function"}],
    "tool_choice": "auto",
    "response_format": {"type": "json_object"},
    "top_logprobs": 2,
    "messages": [],
}
ONLY_TEXT = {"echo": True, "best_of": 2, "suffix": "a", "prompt": ["a", "b"]}


@pytest.mark.parametrize(
    ("url", "wish", "field", "value"),
    [
        *[("chat/completions", CHAT, *item) for item in (BOTH | ONLY_CHAT).items()],
        *[("completions", TEXT, *item) for item in (BOTH | ONLY_TEXT).items()],
        ("chat/completions", CHAT, "max_tokens", -1),
        ("completions", TEXT, "prompt", []),
        ("completions", TEXT, "prompt", [small.VOCABULARY]),
        ("completions", TEXT, "prompt", [-1]),
        ("completions", TEXT, "temperature", "warm"),
        ("chat/completions", CHAT, "messages", [{"role": "tool", "content": "a"}]),
        ("chat/completions", CHAT, "messages", [{"role": "user", "content": None}]),
        (
            "chat/completions",
            CHAT,
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        ),
    ],
)
def test_what_would_matter_is_refused_by_name(client, url, wish, field, value):
    found = client.post(f"/v1/{url}", json={**wish, field: value})
    error = found.json()["error"]
    assert found.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (field, "invalid_value")
    assert field in error["message"]


def test_other_errors_have_the_shape_of_openais_too(client, tokenizer):
    def refused(url, wish=None, **more):
        found = client.post(f"/v1/{url}", **({"json": wish} if wish is not None else more))
        error = found.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        return found.status_code, error["param"], error["code"], error["message"]

    assert refused("completions", {**TEXT, "model": "other"}) == (
        404,
        "model",
        "model_not_found",
        "no model is called 'other', expected 'tiny'",
    )
    assert refused("completions", {**TEXT, "mesages": 1})[:3] == (400, "mesages", "unknown_parameter")
    assert refused("chat/completions", {"model": "tiny"})[:3] == (400, "messages", "missing_required_parameter")
    assert refused("completions", {"prompt": "a"})[:3] == (400, "model", "missing_required_parameter")
    assert refused("completions", content=b"{", headers={"content-type": "application/json"})[:3] == (400, None, None)
    assert refused("completions", content=b"")[0] == 400
    assert refused("embeddings", {})[:3] == (404, None, None)
    both = {**CHAT, "max_tokens": 3, "max_completion_tokens": 3}
    assert refused("chat/completions", both)[:3] == (400, "max_tokens", "invalid_value")
    status, param, code, message = refused("completions", {**TEXT, "prompt": "the cat " * 40})
    assert (status, param, code) == (400, "prompt", "context_length_exceeded")
    assert "tokens, expected fewer than the model's context of 64" in message
    status, param, code, _ = refused("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "a" * 99}]})
    assert (status, param, code) == (400, "messages", "context_length_exceeded")


def test_an_answer_fills_the_room_that_is_left(client, tokenizer):
    ids = tokenizer("the cat")["input_ids"]
    prompt = (ids * 40)[:60]
    found = client.post("/v1/completions", json={**TEXT, "prompt": prompt, "temperature": 0, "max_tokens": 50}).json()
    assert found["usage"]["completion_tokens"] <= 4
    assert found["choices"][0]["finish_reason"] == ("length" if found["usage"]["completion_tokens"] == 4 else "stop")


def test_a_model_without_template_or_with_a_strict_one_says_so(engine, tokenizer):
    kept = tokenizer.chat_template
    client = TestClient(api(engine, "tiny", {}))
    try:
        tokenizer.chat_template = None
        found = client.post("/v1/chat/completions", json=CHAT)
        assert found.status_code == 400
        assert "no chat template, expected a prompt. Use /v1/completions" in found.json()["error"]["message"]
        tokenizer.chat_template = "{{ raise_exception('No system role.') }}"
        found = client.post("/v1/chat/completions", json=CHAT)
        assert found.status_code == 400
        assert found.json()["error"]["param"] == "messages"
        assert "does not take them (No system role.)" in found.json()["error"]["message"]
    finally:
        tokenizer.chat_template = kept


def streamed(tokenizer, text, **wish):
    """The parts in which a text is streamed, and how the whole answer to the same wish comes."""
    client = TestClient(api(scripted(tokenizer, text), "tiny", {}))
    wish = {**TEXT, "max_tokens": 1000, **wish}
    whole = client.post("/v1/completions", json=wish).json()
    values = events(client.post("/v1/completions", json={**wish, "stream": True}))
    assert values[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    return [v["choices"][0]["text"] for v in values[:-1]], whole


@pytest.mark.parametrize("text", ["naïve 😀 日本語 é", "👩‍👩‍👧 ok", "\ufffd and \ufffd", "é"])
def test_no_character_is_broken(tokenizer, text):
    parts, whole = streamed(tokenizer, text)
    assert len(tokenizer(text)["input_ids"]) > len(text) or "\ufffd" not in text  # several tokens for one character
    assert "".join(parts) == whole["choices"][0]["text"] == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in part for part in parts)


def test_half_a_character_at_the_end_is_given_as_it_is_decoded(tokenizer):
    ids = tokenizer("a 😀")["input_ids"][:-1]
    client = TestClient(api(Scripted(tokenizer, ids), "tiny", {}))
    values = events(client.post("/v1/completions", json={**TEXT, "stream": True}))
    assert said(values) == tokenizer.decode(ids)


def cut(tokenizer, ids, stops):
    """What is left of an answer, told after each token: all before the first stop string that is there."""
    for number in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:number])
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)], "stop", number
    return tokenizer.decode(ids), "stop", len(ids)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("the cat sat on a mat", "sat"),
        ("the cat sat on a mat", "t s"),
        ("the cat sat on a mat", ["on a", "at"]),
        ("the cat sat on a mat", "the"),
        ("the cat sat on a mat", "mate"),
        ("the cat sat on a mat", "mat"),
        ("abababac", "abac"),
        ("aé b", "aé"),
        ("a😀\n\nb", ["\n\n"]),
    ],
)
def test_a_stop_string_ends_the_answer_wherever_tokens_meet(tokenizer, text, stop):
    stops = [stop] if isinstance(stop, str) else stop
    ids = tokenizer(text)["input_ids"]
    expected, reason, number = cut(tokenizer, ids, stops)
    parts, whole = streamed(tokenizer, text, stop=stop)
    assert whole["choices"][0]["text"] == expected
    assert whole["choices"][0]["finish_reason"] == reason
    assert whole["usage"]["completion_tokens"] == number
    assert "".join(parts) == expected


def test_any_text_and_any_stops_stream_as_they_come_whole(tokenizer):
    draw = random.Random(0)
    for _ in range(60):
        text = "".join(draw.choices("abé\n", k=draw.randrange(1, 30)))
        stops = ["".join(draw.choices("abé\n", k=draw.randrange(1, 5))) for _ in range(draw.randrange(1, 4))]
        parts, whole = streamed(tokenizer, text, stop=stops)
        expected, _, number = cut(tokenizer, tokenizer(text)["input_ids"], stops)
        assert "".join(parts) == whole["choices"][0]["text"] == expected, (text, stops)
        assert whole["usage"]["completion_tokens"] == number


class Breaking(Scripted):
    """An engine that fails at its third token, but for a prompt of one token."""

    def decode(self, prompts, sampling):
        for number, tokens in enumerate(super().decode(prompts, sampling)):
            if number == 2 and len(prompts[0]) > 1:
                raise RuntimeError("out of memory")
            yield tokens


def test_an_error_of_the_engine_ends_an_answer_and_not_the_server(tokenizer):
    engine = Breaking(tokenizer, tokenizer("the cat sat on a mat")["input_ids"])
    client = TestClient(api(engine, "tiny", {}), raise_server_exceptions=False)
    expected = {"message": "RuntimeError: out of memory", "type": "server_error", "param": None, "code": None}
    for _ in range(2):
        found = client.post("/v1/completions", json=TEXT)
        assert (found.status_code, found.json()) == (500, {"error": expected})
        *parts, last = events(client.post("/v1/completions", json={**TEXT, "stream": True}))
        assert len(parts) == 2
        assert last == {"error": expected}
    assert client.post("/v1/completions", json={**TEXT, "prompt": [5]}).status_code == 200


@contextmanager
def serving(app):
    """The application behind a real server on a free port."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen(16)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            yield place.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
            assert not thread.is_alive()


def asker(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=WAIT_S)


@contextmanager
def asking(app):
    with serving(app) as port, asker(port) as client:
        yield client


def test_openais_own_client_gets_what_it_expects(engine):
    text, _, tokens = greedy(engine, "<|user|>the cat<|end|><|assistant|>", 8)
    with asking(api(engine, "tiny", {"digest": "d" * 64})) as client:
        assert [m.id for m in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").digest == "d" * 64
        wish = {**CHAT, "temperature": 0, "max_completion_tokens": 8}
        whole = client.chat.completions.create(**wish)
        assert whole.choices[0].message.content == text
        assert whole.choices[0].message.role == "assistant"
        assert whole.usage.completion_tokens == tokens
        parts = list(client.chat.completions.create(**wish, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.delta.content or "" for p in parts for c in p.choices) == text
        assert parts[-1].usage == whole.usage
        again = [*CHAT["messages"], whole.choices[0].message, {"role": "user", "content": "and"}]
        assert client.chat.completions.create(model="tiny", messages=again, max_tokens=2).usage.completion_tokens <= 2
        plain = client.completions.create(**TEXT, temperature=0, max_tokens=8)
        parts = client.completions.create(**TEXT, temperature=0, max_tokens=8, stream=True)
        assert "".join(p.choices[0].text for p in parts) == plain.choices[0].text == greedy(engine, "the cat", 8)[0]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**CHAT, n=2)
        assert (caught.value.param, caught.value.code) == ("n", "invalid_value")
        with pytest.raises(openai.NotFoundError, match="no model is called 'other'"):
            client.completions.create(model="other", prompt="a")


def test_openais_own_client_hears_of_an_error_within_a_stream(tokenizer):
    engine = Breaking(tokenizer, tokenizer("the cat sat on a mat")["input_ids"])
    with asking(api(engine, "tiny", {})) as client:
        with pytest.raises(openai.APIError, match="out of memory"):
            list(client.completions.create(**TEXT, stream=True))
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            client.completions.create(**TEXT)


class Endless(Scripted):
    """An engine that does not stop by itself, but for a prompt of one token."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, tokenizer("the cat sat")["input_ids"])
        self.begun, self.ended = threading.Event(), threading.Event()

    def decode(self, prompts, sampling):
        if len(prompts[0]) == 1:
            yield from super().decode(prompts, sampling)
            return
        try:
            for token in itertools.cycle(self.ids):
                self.begun.set()
                yield [token]
        finally:
            self.ended.set()


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_who_hangs_up_ends_the_answer_and_gives_up_the_turn(tokenizer, stream):
    engine = Endless(tokenizer)
    body = json.dumps({**TEXT, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with serving(api(engine, "tiny", {})) as port:
        with closing(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)) as leaving:
            leaving.sendall(f"{head}\r\n\r\n".encode() + body)
            assert engine.begun.wait(WAIT_S)
            if stream:
                assert leaving.recv(16).startswith(b"HTTP/1.1 200")
        with asker(port) as client:
            answer = client.completions.create(model="tiny", prompt=[5])
        assert answer.choices[0].text == "the cat sat"
        assert engine.ended.wait(WAIT_S)


class Counting(Scripted):
    """An engine that knows how many ask it at once, and that waits before each answer to be let go."""

    inside = most = 0

    def __init__(self, tokenizer):
        super().__init__(tokenizer, tokenizer("the cat sat on a mat")["input_ids"])
        self.begun, self.go = threading.Event(), threading.Event()

    def decode(self, prompts, sampling):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.begun.set()
        assert self.go.wait(WAIT_S)
        try:
            yield from super().decode(prompts, sampling)
        finally:
            self.inside -= 1


def test_requests_at_once_are_answered_one_after_another(tokenizer):
    engine = Counting(tokenizer)
    engine.go.set()
    with asking(api(engine, "tiny", {})) as client, ThreadPoolExecutor(6) as pool:
        whole = [pool.submit(client.completions.create, **TEXT) for _ in range(3)]
        parts = [pool.submit(lambda: list(client.completions.create(**TEXT, stream=True))) for _ in range(3)]
        texts = [f.result(WAIT_S).choices[0].text for f in whole]
        texts += ["".join(p.choices[0].text for p in f.result(WAIT_S)) for f in parts]
    assert texts == ["the cat sat on a mat"] * 6
    assert engine.most == 1


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_who_is_cancelled_while_a_token_is_computed_gives_up_the_turn_after_it(tokenizer, stream):
    engine = Counting(tokenizer)
    app = api(engine, "tiny", {})

    async def asked(stream, sent):
        body = json.dumps({**TEXT, "stream": stream}).encode()
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "asgi": {}}
        came = iter([{"type": "http.request", "body": body}])

        async def receive():
            return next(came, None) or await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        await app({**scope, "headers": headers}, receive, send)

    async def both():
        one = asyncio.create_task(asked(stream, []))
        await asyncio.to_thread(engine.begun.wait, WAIT_S)
        sent = []
        one.cancel()
        other = asyncio.create_task(asked(False, sent))
        with pytest.raises(asyncio.CancelledError):
            await one
        engine.go.set()
        await other
        return json.loads(b"".join(m.get("body", b"") for m in sent))

    assert asyncio.run(both())["choices"][0]["text"] == "the cat sat on a mat"
    assert (engine.most, engine.inside) == (1, 0)


def test_a_seed_decides_what_is_drawn(client):
    def drawn(**wish):
        return client.post("/v1/completions", json={**TEXT, "max_tokens": 20, **wish}).json()["choices"][0]["text"]

    assert drawn(seed=1) == drawn(seed=1)
    assert len({drawn() for _ in range(4)}) > 1
