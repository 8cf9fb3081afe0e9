"""What the OpenAI API answers: choices, their parts, and errors in its own shape."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Send
from typing_extensions import override

from lfm.errors import LfmError
from operators.engines.native import SamplingError

CHAT, CHAT_PART, TEXT = "chat.completion", "chat.completion.chunk", "text_completion"
CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}


class Refused(LfmError, ValueError):
    """A request that is not answered, as the API says it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    def __str__(self) -> str:
        return self.message


class Stream(StreamingResponse):
    """Server-sent events that are closed when the client is gone: its turn is over then, not when memory is cleaned."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.events = events

    @override
    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.events):
            await super().stream_response(send)


def choice(kind: str, text: str, reason: str | None) -> dict[str, Any]:
    """The one choice of an answer, or a part of it."""
    said: Mapping[str, Mapping[str, Any]] = {
        CHAT: {"message": {"role": "assistant", "content": text}},
        CHAT_PART: {"delta": {"content": text} if text else {}},
        TEXT: {"text": text},
    }
    return {"index": 0, **said[kind], "logprobs": None, "finish_reason": reason}


def usage(ids: Sequence[int], tokens: int) -> dict[str, int]:
    """How many tokens were asked with and answered."""
    return {"prompt_tokens": len(ids), "completion_tokens": tokens, "total_tokens": len(ids) + tokens}


def event(value: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def failure(error: Exception) -> dict[str, Any]:
    """An error of ours, not of who asks."""
    return _shaped(f"{type(error).__name__}: {error}", "server_error")


def refusing(app: FastAPI) -> None:
    """Have `app` say every error in the API's shape."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return _refusal(error.status, error.message, error.param, error.code)

    @app.exception_handler(SamplingError)
    async def unsampled(request: Request, error: SamplingError) -> JSONResponse:
        return _refusal(400, str(error), error.field, "invalid_value")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(p) for p in first["loc"][1:]]
        if first["type"] == "json_invalid":
            return _refusal(400, f"the body is no JSON ({first['ctx']['error']})", None, None)
        # A value that may be one of several kinds has an error for each; the place's first part is the field.
        of_field = [e for e in error.errors() if [str(p) for p in e["loc"][1:2]] == place[:1]]
        what = " or ".join(dict.fromkeys(f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in of_field))
        return _refusal(400, what, place[0] if place else None, CODES.get(first["type"], "invalid_value"))

    @app.exception_handler(HTTPException)
    async def missing(request: Request, error: HTTPException) -> JSONResponse:
        return _refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}", None, None)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(failure(error), 500)


def _refusal(status: int, message: str, param: str | None, code: str | None) -> JSONResponse:
    return JSONResponse(_shaped(message, "invalid_request_error", param, code), status)


def _shaped(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
