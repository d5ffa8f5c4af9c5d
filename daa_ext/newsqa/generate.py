"""The models that write questions: an OpenAI-compatible endpoint, or a transformers model here."""

import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import httpx

from daa_ext.newsqa.questions import Message

LONGEST_WAIT = 60.0  # seconds between two tries
LOCAL_TOKENS = 512
RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
REFUSALS = frozenset({400, 413, 422})  # of this one request: too long, against a content rule
CONTINUE = "What is finished is kept: run the same command again to continue."


class RefusedError(Exception):
    """The model does not take this one article; another may be well."""


class Generator(Protocol):
    """Anything that answers chat messages. Called from several threads if `parallel`."""

    parallel: bool

    def __call__(self, messages: Sequence[Message]) -> str:
        """The model's answer.

        Raises:
            RefusedError: the model does not take this request.
            ValueError: no request will succeed before the user mends something.
        """
        ...


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; None leaves it to the endpoint (some take no such key), and is
    greedy and LOCAL_TOKENS for a local model.
    """

    temperature: float | None = None
    max_tokens: int | None = None


class Endpoint:
    """POST {url}/chat/completions, tried again with growing waits where that can help.

    Args:
        url: base URL as OpenAI clients take it, such as http://localhost:8000/v1.
        key_variable: environment variable that holds the API key; None sends none.
        retries: further tries after the first, of one request.
        timeout: seconds for one try.
    """

    parallel = True

    def __init__(
        self, url: str, model: str, sampling: Sampling, key_variable: str | None = None,
        retries: int = 5, timeout: float = 120.0,
    ) -> None:  # fmt: skip
        self.url, self.model, self.key_variable = _checked_url(url), model, key_variable
        settings = {key: value for key, value in asdict(sampling).items() if value is not None}
        self._body, self._retries = {"model": model, **settings}, retries
        headers = {}
        if key_variable is not None:
            key = os.environ.get(key_variable, "").strip()
            if not key:
                raise ValueError(
                    f"api-key-env={key_variable}: that environment variable is not set. Export "
                    "it, or leave the option out for an endpoint without a key."
                )
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx.Client(headers=headers, timeout=timeout)

    def __call__(self, messages: Sequence[Message]) -> str:
        body = {**self._body, "messages": list(messages)}
        for attempt in range(self._retries + 1):
            reply: httpx.Response | None = None
            try:
                reply = self._client.post(f"{self.url}/chat/completions", json=body)
                problem = f"HTTP {reply.status_code}: {_excerpt(reply.text)}"
            except httpx.RequestError as error:
                problem = f"{type(error).__name__}: {error}"
            if reply is not None and reply.status_code not in RETRIED:
                return self._content(reply)
            if attempt < self._retries:
                time.sleep(_wait(attempt, reply))
        advice = "Try a lower --concurrency, or later." if reply is not None else "Does it run?"
        raise ValueError(
            f"endpoint={self.url}: no answer in {self._retries + 1} tries ({problem}). {advice} "
            f"{CONTINUE}"
        )

    def _content(self, reply: httpx.Response) -> str:
        """The text of an answer that no further try would change."""
        status = reply.status_code
        said = f"endpoint={self.url}: HTTP {status}: {_excerpt(reply.text)}"
        if status in REFUSALS:
            raise RefusedError(said)
        if status in (401, 403):
            key = (
                f"the key in {self.key_variable}" if self.key_variable else "a request without key"
            )
            raise ValueError(f"{said}. It does not take {key}: see --api-key-env. {CONTINUE}")
        if status != 200:
            raise ValueError(
                f"{said}. Is --endpoint the base URL (most end in /v1), and does it have a model "
                f"named {self.model}? {CONTINUE}"
            )
        try:
            content = reply.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"endpoint={self.url}: an answer that is no chat completion: "
                f"{_excerpt(reply.text)}. Is this an OpenAI-compatible endpoint? {CONTINUE}"
            ) from error
        return content or ""  # null: the model has used up its tokens or called a tool


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"endpoint={url}: a URL such as http://localhost:8000/v1 is needed.")
    if parsed.userinfo:
        raise ValueError(
            f"endpoint: {parsed.host} comes with a password. It would be written into the "
            "reports: put the key into an environment variable and name it by --api-key-env."
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def _wait(attempt: int, reply: httpx.Response | None) -> float:
    """Seconds: what the server asks for, else 1, 2, 4, ... times a draw, so clients spread out."""
    asked = reply.headers.get("retry-after", "") if reply is not None else ""
    seconds = float(asked) if asked.isdecimal() else 2**attempt * random.uniform(0.5, 1.5)
    return min(seconds, LONGEST_WAIT)


def _excerpt(text: str) -> str:
    return " ".join(text.split())[:300] or "(empty)"


class LocalModel:
    """A causal language model of transformers in this process, on a GPU where there is one.

    Args:
        path: a folder, or a name that the hub or its cache knows.
    """

    parallel = False

    def __init__(self, path: str, sampling: Sampling) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        except (OSError, ValueError) as error:
            raise ValueError(f"local-model={path}: cannot be loaded: {error}") from error
        self._model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._room = getattr(self._model.config, "max_position_embeddings", None)
        self._tokens = sampling.max_tokens or LOCAL_TOKENS
        self._draws: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            self._draws = {"do_sample": True, "temperature": sampling.temperature}

    def __call__(self, messages: Sequence[Message]) -> str:
        import torch

        chat = bool(self._tokenizer.chat_template)
        if chat:
            prompt = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        else:  # a base model: plain text
            prompt = "\n\n".join(message["content"] for message in messages) + "\n\n"
        inputs = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
        length = inputs["input_ids"].shape[1]
        if self._room is not None and length + self._tokens > self._room:
            raise RefusedError(
                f"{length} tokens of prompt and {self._tokens} of answer do not fit into the "
                f"model's {self._room}: lower --max-chars or --max-tokens"
            )
        ids, mask = (inputs[key].to(self._model.device) for key in ("input_ids", "attention_mask"))
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=self._tokens,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
                **self._draws,
            )  # fmt: skip
        return self._tokenizer.decode(output[0, length:], skip_special_tokens=True)
