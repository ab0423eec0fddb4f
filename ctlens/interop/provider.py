"""The model provider of Inspect: what Inspect asks a model of ctlens, and the answers as Inspect has them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    TopLogprob,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from ctlens.core.errors import CtlensError, unknown
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn, token_ids
from ctlens.interop.answering import Answer, AnswerRequest, answer_requests, request_ids
from ctlens.models.loading import load_model
from ctlens.organism import SHIPPED, SHIPPED_NAME

OPTIONS = "options"
"""The field of `extra_body` that asks for the likeliest of some texts instead of free words."""
_REFUSED: Mapping[str, Any] = {
    "best_of": 1,
    "frequency_penalty": 0,
    "logit_bias": None,
    "modalities": None,
    "num_choices": 1,
    "presence_penalty": 0,
    "prompt_logprobs": None,
    "response_schema": None,
    "top_k": None,
}
"""Settings of Inspect that would change an answer and that ctlens does not have, with the value that changes none."""


@dataclass(eq=False)
class _Waiting:
    """A request in the queue, and what has become of it."""

    request: AnswerRequest
    found: Answer | Exception | None = None


class CtlensAPI(ModelAPI):
    """A model of ctlens that Inspect asks.

    Requests that come while others are being answered are answered together, each as if it were alone. Without a
    temperature, or at 0, the answer is the greedy one that `ctlens.evaluate` judges. `extra_body={"options": [...]}`
    asks for the likeliest of some texts; `metadata` of the output then has the share of each.

    Args:
        model_name: `"organism"`, or what `ctlens.load_model` takes: a folder, a name on the hub, a run.
        base_url, api_key: of no use here.
        config: Inspect's settings.
        lens: a model in memory, which the name then only names.
        options: of `ctlens.load_model`, such as `device` and `dtype`.

    Raises:
        PrerequisiteError: the model cannot be loaded.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  (Inspect's own default)
        *,
        lens: LensModel | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        try:
            source = SHIPPED if model_name == SHIPPED_NAME else model_name
            self.model = load_model(source, **options) if lens is None else lens
        except (CtlensError, TypeError) as error:
            raise PrerequisiteError(f"ctlens/{model_name}: {error}") from None
        self.waiting: list[_Waiting] = []
        self.lock = anyio.Lock()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answers one conversation.

        Raises:
            CtlensError: it asks for something that the model does not have, or cannot be rendered.
        """
        start = time.monotonic()
        one = _Waiting(_request(input, tools, config))
        request_ids(self.model, one.request)  # refuses it alone, and not those that are answered with it
        self.waiting.append(one)
        async with self.lock:
            if one.found is None:
                together = self.waiting
                self.waiting = []
                await anyio.to_thread.run_sync(self._answer, together)
        if isinstance(one.found, Answer):
            return _output(self.model_name, one.request, one.found, time.monotonic() - start)
        raise one.found or CtlensError("the request was dropped: ask again.")

    def _answer(self, together: Sequence[_Waiting]) -> None:
        try:
            found: Sequence[Answer | Exception] = answer_requests(self.model, [one.request for one in together])
        except Exception as error:  # whatever it is, each of them failed by it, and nobody else may wait for ever
            found = [error] * len(together)
        for one, given in zip(together, found, strict=True):
            one.found = given

    async def tokenize(self, text: str) -> list[int]:
        """The tokens of a text by itself."""
        return list(token_ids(self.model.tokenizer, text))

    async def count_text_tokens(self, text: str) -> int:
        """How many tokens a text has, by the model's own tokenizer."""
        return len(await self.tokenize(text))

    def max_connections(self) -> int:
        """How many requests may wait together."""
        return 32

    def connection_key(self) -> str:
        """Each model has a queue of its own."""
        return self.model_name


def _request(messages: Sequence[ChatMessage], tools: Sequence[ToolInfo], config: GenerateConfig) -> AnswerRequest:
    if tools:
        raise CtlensError("a model of ctlens calls no tools: take a task without them.")
    if asked := [name for name, none in _REFUSED.items() if getattr(config, name) not in (None, none)]:
        raise CtlensError(f"a model of ctlens has no {asked[0]}: leave it out.")
    extra = config.extra_body or {}
    if other := [name for name in extra if name != OPTIONS]:
        raise unknown("field of extra_body", other[0], [OPTIONS])
    scored = config.logprobs or config.top_logprobs is not None
    return AnswerRequest(
        turns=tuple(map(_turn, messages)),
        options=tuple(extra.get(OPTIONS, ())),
        max_new_tokens=config.max_tokens,
        temperature=config.temperature or 0.0,
        top_p=1.0 if config.top_p is None else config.top_p,
        seed=config.seed,
        stops=tuple(config.stop_seqs or ()),
        top_logprobs=(config.top_logprobs or 0) if scored else None,
    )


def _turn(message: ChatMessage) -> Turn:
    if message.role == "tool" or getattr(message, "tool_calls", None):
        raise CtlensError("a model of ctlens calls no tools: give a conversation without them.")
    if not isinstance(message.content, str) and any(part.type not in ("text", "reasoning") for part in message.content):
        raise CtlensError("a model of ctlens reads text alone: give messages without images, sound or files.")
    return Turn(message.role, message.text)


def _output(name: str, request: AnswerRequest, found: Answer, seconds: float) -> ModelOutput:
    scores = None
    if found.scores is not None:
        scores = Logprobs(
            content=[
                Logprob(
                    token=one.token,
                    logprob=one.logprob,
                    top_logprobs=[TopLogprob(token=token, logprob=value) for token, value in one.top] or None,
                )
                for one in found.scores
            ]
        )
    message = ChatMessageAssistant(content=found.text, model=name, source="generate")
    used = len(found.tokens)
    return ModelOutput(
        model=name,
        choices=[ChatCompletionChoice(message=message, stop_reason=found.stop, logprobs=scores)],
        usage=ModelUsage(
            input_tokens=found.n_prompt_tokens, output_tokens=used, total_tokens=found.n_prompt_tokens + used
        ),
        time=seconds,
        metadata={"shares": dict(zip(request.options, found.shares, strict=True))} if request.options else None,
    )
