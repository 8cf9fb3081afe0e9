"""The OpenAI API over one engine: models, chat and plain completions, whole or streamed."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request

from operators.engines.native import Native, Sampling
from operators.engines.openai_answers import Refused, Stream, choice, event, failure, refusing, usage
from operators.engines.openai_wishes import ChatWish, TextWish, Wish, chat_ids, text_ids

UNLIMITED = 1 << 20  # tokens of an answer, where the model does not say what it is made for


@dataclass
class Answer:
    """A text as it grows.

    Attributes:
        tokens: How many were generated.
        reason: ``stop`` where the model ended it or a stop string did, ``length`` where the limit did.
    """

    tokens: int = 0
    reason: str = "length"


class Turns:
    """One answer at a time, in the order in which they were asked for, all of them by one thread."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.thread = ThreadPoolExecutor(1, "engine")  # every other one would have threads of torch of its own

    async def taken(self, parts: Generator[str, None, None]) -> AsyncGenerator[str, None]:
        """The parts, when it is their turn; it is over when this generator is closed."""
        loop = asyncio.get_running_loop()
        async with self.turn:
            try:
                while (part := await loop.run_in_executor(self.thread, next, parts, None)) is not None:
                    yield part
            finally:
                self.thread.submit(parts.close)  # behind the token that is being computed, which nothing can stop


def api(engine: Native, name: str, about: dict[str, Any]) -> FastAPI:
    """The application; it answers one request at a time, in the order in which they came.

    Args:
        engine: What generates.
        name: What requests call the model.
        about: What ``/v1/models`` says of it besides.
    """
    app = FastAPI(title=f"LFM: {name}")
    refusing(app)
    turns = Turns()
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "lfm", **about}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{asked:path}")
    async def one(asked: str) -> dict[str, Any]:
        _known(asked, name)
        return model

    @app.post("/v1/chat/completions")
    async def chat(wish: ChatWish, request: Request) -> Any:
        _known(wish.model, name)
        return await _respond(engine, turns, wish, chat_ids(engine, wish.messages), request)

    @app.post("/v1/completions")
    async def complete(wish: TextWish, request: Request) -> Any:
        _known(wish.model, name)
        return await _respond(engine, turns, wish, text_ids(engine, wish.prompt), request)

    return app


def _known(asked: str, name: str) -> None:
    if asked != name:
        raise Refused(404, f"no model is called {asked!r}, expected {name!r}", "model", "model_not_found")


async def _respond(engine: Native, turns: Turns, wish: ChatWish | TextWish, ids: list[int], request: Request) -> Any:
    room = UNLIMITED if engine.context is None else engine.context - len(ids)
    if room < 1:
        what = f"the prompt has {len(ids)} tokens, expected fewer than the model's context of {engine.context}"
        raise Refused(400, what, wish.asks, "context_length_exceeded")
    sampling = Sampling(
        max_tokens=room if wish.limit is None else min(wish.limit, room),
        temperature=1.0 if wish.temperature is None else wish.temperature,
        top_p=1.0 if wish.top_p is None else wish.top_p,
        seed=uuid.uuid4().int % 2**31 if wish.seed is None else wish.seed,
    )
    answer = Answer()
    parts = _grow(engine, ids, sampling, wish.stops, answer)
    head = {"id": f"{wish.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": wish.model}
    if wish.stream:
        return Stream(_events(turns.taken(parts), wish, ids, answer, head))
    said = []
    async with aclosing(turns.taken(parts)) as taken:
        async for part in taken:
            said.append(part)
            if await request.is_disconnected():  # nobody else would tell: an answer as a whole is sent at its end
                break
    done = choice(wish.kind, "".join(said), answer.reason)
    return {**head, "object": wish.kind, "choices": [done], "usage": usage(ids, answer.tokens)}


async def _events(
    parts: AsyncGenerator[str, None], wish: Wish, ids: Sequence[int], answer: Answer, head: dict[str, Any]
) -> AsyncGenerator[str, None]:
    """The answer as server-sent events; an error of the engine is the last one."""
    counted = wish.stream_options is not None and wish.stream_options.include_usage
    shape = {**head, "object": wish.part_kind, **({"usage": None} if counted else {})}
    try:
        if wish.opening:
            yield event({**shape, "choices": [wish.opening]})
        async with aclosing(parts):
            async for part in parts:
                if part:
                    yield event({**shape, "choices": [choice(wish.part_kind, part, None)]})
        yield event({**shape, "choices": [choice(wish.part_kind, "", answer.reason)]})
        if counted:
            yield event({**shape, "choices": [], "usage": usage(ids, answer.tokens)})
    except Exception as error:  # the answer has begun: what went wrong can only be said in it
        logging.getLogger(__name__).exception("streamed answer")
        yield event(failure(error))
    yield "data: [DONE]\n\n"


def _grow(
    engine: Native, ids: Sequence[int], sampling: Sampling, stops: Sequence[str], answer: Answer
) -> Generator[str, None, None]:
    """The answer's text, a part for every token; what may still become a stop string or a character is held back."""
    tokens: list[int] = []
    given = text = ""
    for (token,) in engine.decode([ids], sampling):
        assert token is not None, "a single prompt ends the loop with its last token"
        tokens.append(token)
        answer.tokens += 1
        text = engine.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = [at for stop in stops if (at := text.find(stop)) >= 0]
        if ends:
            yield text[len(given) : min(ends)]
            answer.reason = "stop"
            return
        whole = text.rstrip("\ufffd")  # what half a character at the end is decoded as
        held = max((n for s in stops for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
        ready = whole[: len(whole) - held]
        yield ready[len(given) :]
        given = max(given, ready, key=len)
    answer.reason = "length" if answer.tokens == sampling.max_tokens else "stop"
    yield text[len(given) :]
