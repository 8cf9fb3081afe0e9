"""The OpenAI API over one engine: models, chat and plain completions, whole or streamed."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import iterate_in_threadpool

from lfm.errors import LfmError
from operators.engines.native import Native, Sampling


class Message(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str


class StreamOptions(BaseModel):
    """What a stream says besides tokens."""

    include_usage: bool = False


class Wish(BaseModel):
    """What both kinds of completion have in common; what is not listed here is refused if it would matter."""

    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    n: Literal[1] = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Literal[None, False, 0] = None
    tools: None = None


class ChatWish(Wish):
    """``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class TextWish(Wish):
    """``/v1/completions``."""

    prompt: str | list[int] | list[str]
    max_tokens: int | None = 16
    echo: Literal[False] = False


@dataclass
class Answer:
    """A text as it grows.

    Attributes:
        reason: ``stop`` where the model ended it or a stop string did, ``length`` where the limit did.
    """

    tokens: int = 0
    reason: str = "length"


def api(engine: Native, name: str, about: dict[str, Any]) -> FastAPI:
    """The application; it answers one request at a time, in the order in which they came."""
    app = FastAPI(title=f"LFM: {name}")
    turn = asyncio.Lock()
    born = int(time.time())

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"][1:])
        return _refusal(400, f"{where}: {first['msg']}", "invalid_request_error")

    @app.exception_handler(LfmError)
    async def refused(request: Request, error: LfmError) -> JSONResponse:
        return _refusal(400, str(error), "invalid_request_error")

    @app.exception_handler(HTTPException)
    async def missing(request: Request, error: HTTPException) -> JSONResponse:
        return _refusal(error.status_code, error.detail, "invalid_request_error")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": born, "owned_by": "lfm", **about}],
        }

    @app.post("/v1/chat/completions")
    async def chat(wish: ChatWish) -> Any:
        _known(wish.model, name)
        ids = _chat_ids(engine, wish.messages)
        limit = wish.max_completion_tokens or wish.max_tokens

        def choice(text: str, reason: str | None, *, part: bool, first: bool) -> dict[str, Any]:
            said = {"role": "assistant", "content": text} if first or not part else {"content": text} if text else {}
            return {"index": 0, "delta" if part else "message": said, "logprobs": None, "finish_reason": reason}

        return await _respond(engine, turn, wish, ids, limit, name, "chat.completion", choice)

    @app.post("/v1/completions")
    async def complete(wish: TextWish) -> Any:
        _known(wish.model, name)
        ids = _text_ids(engine, wish.prompt)

        def choice(text: str, reason: str | None, *, part: bool, first: bool) -> dict[str, Any]:
            return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

        return await _respond(engine, turn, wish, ids, wish.max_tokens, name, "text_completion", choice)

    return app


async def _respond(
    engine: Native,
    turn: asyncio.Lock,
    wish: Wish,
    ids: list[int],
    limit: int | None,
    name: str,
    kind: str,
    choice: Callable[..., dict[str, Any]],
) -> Any:
    room = engine.context - len(ids) if engine.context else 1 << 20
    if room < 1:
        raise HTTPException(400, f"the prompt has {len(ids)} tokens, expected fewer than {engine.context}")
    sampling = Sampling(
        max_tokens=min(limit or room, room),
        temperature=wish.temperature,
        top_p=wish.top_p,
        seed=wish.seed if wish.seed is not None else uuid.uuid4().int % 2**31,
    )
    stops = [wish.stop] if isinstance(wish.stop, str) else list(wish.stop or ())
    answer = Answer()
    text = _grow(engine, ids, sampling, stops, answer)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if not wish.stream:
        async with turn:
            whole = "".join([part async for part in iterate_in_threadpool(text)])
        done = choice(whole, answer.reason, part=False, first=True)
        return {**head, "object": kind, "choices": [done], "usage": _usage(ids, answer)}
    shape = {**head, "object": "chat.completion.chunk" if kind == "chat.completion" else kind}

    async def events() -> AsyncIterator[str]:
        first = True
        async with turn:
            async for part in iterate_in_threadpool(text):
                yield _event({**shape, "choices": [choice(part, None, part=True, first=first)]})
                first = False
        yield _event({**shape, "choices": [choice("", answer.reason, part=True, first=first)]})
        if wish.stream_options is not None and wish.stream_options.include_usage:
            yield _event({**shape, "choices": [], "usage": _usage(ids, answer)})
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _grow(
    engine: Native, ids: Sequence[int], sampling: Sampling, stops: Sequence[str], answer: Answer
) -> Iterator[str]:
    """The answer's text in parts; what may still become a stop string, or half a character, is held back."""
    tokens: list[int] = []
    given = ""
    text = ""
    for (token,) in engine.decode([ids], sampling):
        assert token is not None, "a single prompt ends the loop with its last token"
        tokens.append(token)
        answer.tokens += 1
        text = engine.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [at for stop in stops if (at := text.find(stop)) >= 0]
        if ends:
            answer.reason = "stop"
            text = text[: min(ends)]
            break
        held = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        ready = text[: len(text) - held]
        if len(ready) > len(given) and not ready.endswith("\ufffd"):
            yield ready[len(given) :]
            given = ready
    else:
        answer.reason = "length" if answer.tokens == sampling.max_tokens else "stop"
    if len(text) > len(given):
        yield text[len(given) :]


def _chat_ids(engine: Native, messages: Sequence[Message]) -> list[int]:
    if engine.tokenizer.chat_template is None:
        raise HTTPException(400, "this model has no chat template; use /v1/completions")
    turns = [m.model_dump() for m in messages]
    text = engine.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(engine.tokenizer(text, add_special_tokens=False)["input_ids"])


def _text_ids(engine: Native, prompt: str | list[int] | list[str]) -> list[int]:
    if isinstance(prompt, list):
        if len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        elif prompt and all(isinstance(p, int) for p in prompt):
            largest = engine.model.get_input_embeddings().num_embeddings
            if not all(0 <= int(p) < largest for p in prompt):
                raise HTTPException(400, f"prompt: a token id outside 0..{largest - 1}")
            return [int(p) for p in prompt]
        else:
            raise HTTPException(400, "prompt: several prompts at once, expected one")
    ids = list(engine.tokenizer(prompt)["input_ids"])
    return ids or [engine.tokenizer.eos_token_id]


def _known(asked: str, name: str) -> None:
    if asked != name:
        raise HTTPException(404, f"no model is called {asked!r}, expected {name!r}")


def _usage(ids: Sequence[int], answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": len(ids),
        "completion_tokens": answer.tokens,
        "total_tokens": len(ids) + answer.tokens,
    }


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _refusal(status: int, message: str, kind: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)
