"""What a chat completion request may say, and what its answer looks like: OpenAI's shapes, as pydantic models.

A request is read strictly: a parameter that is not named here is refused, and one that OpenAI knows but this server
does not honour is taken only with a value at which it changes nothing. The models of answers describe what
jaxspec/serving/http/answers.py writes, for the OpenAPI schema.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag
from pydantic_core import PydanticCustomError, core_schema

from jaxspec.speculation.params import MAX_LOGPROBS, REPETITION

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_MESSAGES = 4096
INT32 = 2**31 - 1


class Strict(BaseModel):
    """A part of a request: no unknown fields, no number in place of a string."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Only:
    """Marks a parameter that is not honoured: it takes null, and values at which it changes nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def check(self, value: Any) -> Any:
        """The value itself. Raises pydantic's error for any other."""
        if value is None or any(value == each and type(value) is type(each) for each in self.values):
            return value
        raise PydanticCustomError("unsupported", "unsupported", {"neutral": self.values})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [*self.values, None], "description": "Not honoured."}


Unsupported = Annotated[Any, Only()]


def kind_of_content(value: Any) -> str:
    return "text" if isinstance(value, str) else "list"


OR_LIST = Discriminator(kind_of_content)
"""Tells a text from a list, so that an error is about the one that was meant."""


# -- messages --------------------------------------------------------------------------------------------------------


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    """A data: URL in base64, or http(s) where the server allows the host."""
    detail: Annotated[Any, Only("auto")] = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Strict):
    url: str
    """A data: URL in base64 of an animated picture or a video file, or http(s) where the server allows the host."""


class VideoPart(Strict):
    """For targets that read videos."""

    type: Literal["video_url"]
    video_url: VideoUrl


Words = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("list"), Field(min_length=1, max_length=MAX_MESSAGES)],
    OR_LIST,
]
UserPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]
UserContent = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[UserPart], Tag("list"), Field(min_length=1, max_length=MAX_MESSAGES)],
    OR_LIST,
]


class SystemMessage(Strict):
    """`developer` is OpenAI's newer name for the same."""

    role: Literal["system", "developer"]
    content: Words
    name: Unsupported = None


class UserMessage(Strict):
    role: Literal["user"]
    content: UserContent
    name: Unsupported = None


class AssistantMessage(Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Words
    name: Unsupported = None
    refusal: Unsupported = None
    audio: Unsupported = None
    annotations: Annotated[Any, Only([])] = None
    function_call: Unsupported = None
    tool_calls: Annotated[Any, Only([])] = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


# -- the answer's form -----------------------------------------------------------------------------------------------


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: str = Field(min_length=1, max_length=64)
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Answers follow the schema whatever this says."""
    description: Unsupported = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuredOutputs(Strict):
    """vLLM's words for the same: one of the two."""

    json_schema: Annotated[Annotated[str, Tag("text")] | Annotated[dict[str, Any], Tag("list")], OR_LIST] | None = (
        Field(None, alias="json")
    )
    """The schema, or its JSON text."""
    regex: str | None = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only(False)] = None


# -- the request -----------------------------------------------------------------------------------------------------


class ChatRequest(Strict):
    """A chat completion. What is null or left out stays as the target's generation_config.json says, else off: without
    one, answers are greedy (OpenAI's temperature would be 1)."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)

    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT32)
    """0 and -1 are off."""
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**32)
    """Same seed, same answer, whatever else runs; choice i of n takes seed + i."""
    repetition_penalty: float | None = Field(None, ge=REPETITION[0], le=REPETITION[1])
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    """By token id."""

    max_completion_tokens: int | None = Field(None, ge=1, le=INT32)
    """Tokens of an answer at most; by default, and at most, all that the prompt leaves of the model's length."""
    max_tokens: int | None = Field(None, ge=1, le=INT32)
    """The older name of the same."""
    min_tokens: int | None = Field(None, ge=0, le=INT32)
    stop: (
        Annotated[
            Annotated[str, Tag("text"), Field(min_length=1, max_length=MAX_STOP_LENGTH)]
            | Annotated[
                list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
                Tag("list"),
                Field(max_length=MAX_STOPS),
            ],
            OR_LIST,
        ]
        | None
    ) = None
    stop_token_ids: list[Annotated[int, Field(ge=0, le=INT32)]] | None = Field(None, max_length=MAX_STOP_TOKENS)

    n: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    """Users take turns where requests wait."""

    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    regex: str | None = None
    """A regular expression that the whole answer matches."""
    structured_outputs: StructuredOutputs | None = None

    audio: Unsupported = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    functions: Annotated[Any, Only([])] = None
    metadata: Annotated[Any, Only({})] = None
    modalities: Annotated[Any, Only(["text"])] = None
    moderation: Unsupported = None
    parallel_tool_calls: Annotated[Any, Only(True, False)] = None
    prediction: Unsupported = None
    prompt_cache_key: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    safety_identifier: Unsupported = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    store: Annotated[Any, Only(False)] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    tools: Annotated[Any, Only([])] = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None


# -- answers ---------------------------------------------------------------------------------------------------------


class Answer(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class TopLogprob(Answer):
    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Answer):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


FinishReason = Literal["stop", "length"]


class Choice(Answer):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class PromptTokensDetails(Answer):
    cached_tokens: int
    """Tokens of the prompt that were read before, for another request."""


class SpeculativeDecoding(Answer):
    """What the drafter earned in this request, over all of its choices; null where there is nothing to divide by."""

    rounds: int
    """Verification steps of the target."""
    mean_acceptance_length: float | None
    """Tokens per round, the target's own included."""
    mean_accepted_draft_tokens: float | None
    """The same without it."""
    acceptance_at_position: list[float | None]
    """Entry i: share of rounds in which at least i + 1 draft tokens were accepted."""
    conditional_acceptance: list[float | None]
    draft_acceptance_rate: float | None


class RequestMetrics(Answer):
    """Seconds are of the choice that took longest."""

    speculative_decoding: SpeculativeDecoding
    queue_seconds: float | None
    time_to_first_token: float | None
    total_seconds: float | None
    decode_tokens_per_second: float | None


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    metrics: RequestMetrics


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class Delta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Answer):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Answer):
    """One `data:` line of a stream; the last line is `data: [DONE]`, after an error there is none."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Most tokens of prompt and answer together."""
    drafter: str | None
    """The method that drafts; null where decoding is autoregressive."""
    tree: str
    """What it drafts at most: depth / top_k / total_tokens."""


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class Health(Answer):
    status: Literal["ok"]
    version: str
    model: str
    running: int
    waiting: int
    slots: int


class Ready(Answer):
    status: Literal["ready"]
