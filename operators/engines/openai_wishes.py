"""What the OpenAI API is asked, and the tokens that it comes to; what would matter and is not done here is refused."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import jinja2
from pydantic import BaseModel, ConfigDict, Field

from operators.data.batches import opening
from operators.engines.native import Native
from operators.engines.openai_answers import CHAT, CHAT_PART, TEXT, Refused

Zero = Annotated[float, Field(ge=0, le=0)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1)]


class Asked(BaseModel):
    """Base of what is asked: a field that is not declared is an error."""

    model_config = ConfigDict(extra="forbid")


class Part(Asked):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Asked):
    """One turn of a conversation; what is None here is what answers of other servers have empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None


class StreamOptions(Asked):
    """What a stream says besides tokens."""

    include_usage: bool = False


class Format(Asked):
    """What an answer is written in."""

    type: Literal["text"]


class Wish(Asked):
    """What both kinds of completion have in common; fields that change nothing as they may be set here are ignored."""

    asks: ClassVar[str]
    kind: ClassVar[str]
    part_kind: ClassVar[str]
    prefix: ClassVar[str]
    opening: ClassVar[dict[str, Any] | None] = None

    model: str
    temperature: float | None = None
    top_p: float | None = None
    seed: Seed | None = None
    stop: Stop | list[Stop] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> Sequence[str]:
        """Every string that ends the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or ()


class ChatWish(Wish):
    """``/v1/chat/completions``."""

    asks, kind, part_kind, prefix = "messages", CHAT, CHAT_PART, "chatcmpl"
    opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Zero | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    response_format: Format | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens that are wanted."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            what = "max_tokens and max_completion_tokens, expected one of them"
            raise Refused(400, what, "max_tokens", "invalid_value")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TextWish(Wish):
    """``/v1/completions``."""

    asks, kind, part_kind, prefix = "prompt", TEXT, TEXT, "cmpl"

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = None
    logprobs: None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens that are wanted."""
        return 16 if self.max_tokens is None else self.max_tokens  # as OpenAI has it


def chat_ids(engine: Native, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation, up to where the assistant goes on."""
    if engine.tokenizer.chat_template is None:
        raise Refused(400, "this model has no chat template, expected a prompt. Use /v1/completions.", "messages")
    turns = [{"role": _role(m), "content": _text(m)} for m in messages]
    try:
        text = engine.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        what = f"messages: this model's chat template does not take them ({error})"
        raise Refused(400, what, "messages", "invalid_value") from error
    return list(engine.tokenizer(text, add_special_tokens=False)["input_ids"]) or [engine.start]


def text_ids(engine: Native, prompt: str | list[str] | list[int] | list[list[int]]) -> list[int]:
    """The tokens of a prompt."""
    if isinstance(prompt, str):
        said = engine.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return [*opening(engine.tokenizer), *said] or [engine.start]
    ids = [p for p in prompt if isinstance(p, int)]
    texts = [p for p in prompt if not isinstance(p, int)]
    if texts or not ids:
        if len(texts) != 1:
            raise Refused(400, f"prompt: {len(texts)} prompts, expected one", "prompt", "invalid_value")
        return text_ids(engine, texts[0])
    largest = engine.model.get_input_embeddings().num_embeddings - 1
    if not all(0 <= i <= largest for i in ids):
        what = f"prompt: a token outside of the vocabulary, expected 0 to {largest}"
        raise Refused(400, what, "prompt", "invalid_value")
    return ids


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role  # OpenAI's newer name for it


def _text(message: Message) -> str:
    return message.content if isinstance(message.content, str) else "".join(p.text for p in message.content)
