"""Requests to an OpenAI-compatible endpoint (`/chat/completions`): retries, answers kept on disk, numbers of tokens."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry
from urllib3.exceptions import InvalidHeader

from babelscope.core.errors import UserError
from babelscope.core.files import read_json, write_json
from babelscope.core.redact import redact

log = logging.getLogger(__name__)

Message = dict[str, str]

KEY = "OPENAI_API_KEY"
# Tokens that the chat format adds to a message.
_AROUND = 8
_TIMEOUT = 300.0
# Bytes of a reply: thousands of times more than any answer takes.
_LONGEST = 2**24


class Request(NamedTuple):
    """Messages, and the longest answer (tokens)."""

    messages: list[Message]
    max_tokens: int


def tokens(asked: Sequence[Request]) -> tuple[int, int]:
    """Upper bounds of the tokens sent and received: with any tokenizer, a token has at least one byte."""
    sent = sum(len(m["content"].encode()) + _AROUND for one in asked for m in one.messages)
    return sent, sum(one.max_tokens for one in asked)


def check_cost(asked: Sequence[Request], section: Any, what: str, fewer: str) -> None:
    """Log what the requests will cost at most, at the prices of `section` (`explain`).

    `what` names the stage in messages, `fewer` the settings that make fewer requests.

    Raises
    ------
    UserError: more than `explain.max_cost`.
    """
    sent, back = tokens(asked)
    cost = (sent * section.price_in + back * section.price_out) / 1e6
    log.info(
        "%s: %d requests, at most %d tokens sent (one a byte) and %d back: %.2g at most, if none is repeated",
        what, len(asked), sent, back, cost,
    )  # fmt: skip
    if cost > section.max_cost:
        raise UserError(
            f"params.yaml: explain.max_cost: this would cost up to {cost:.2g}; allowed: {section.max_cost}. Raise it, "
            f"or lower {fewer}"
        )


class _Retry(Retry):
    """Waits as long as the server asks for (`Retry-After`), otherwise 0, 2, 4, ... s with jitter."""

    def get_retry_after(self, response: Any) -> float | None:
        """The seconds that the server asks for, at most 300; None if it names none that can be read."""
        with suppress(InvalidHeader, OverflowError):
            return min(super().get_retry_after(response) or 0, 300)
        return None


_RETRY = _Retry(
    5, allowed_methods=None, status_forcelist={408, 409, 425, 429, 500, 502, 503, 504}, raise_on_status=False,
    backoff_factor=1, backoff_jitter=1,
)  # fmt: skip


class Client:
    """An endpoint (base URL, such as `http://localhost:8000/v1`) and a model behind it, asked in `parallel` requests.

    Every answer is kept in `folder` under the hash of its request, so that none is paid for twice. The key is read from
    the environment (`OPENAI_API_KEY`) and never written.

    Raises
    ------
    UserError: the key in the environment is not printable ASCII.
    """

    def __init__(self, endpoint: str, model: str, folder: Path, parallel: int) -> None:
        self.key = os.environ.get(KEY, "")
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError(f"{KEY}: holds characters that cannot be sent; allowed: printable ASCII, in one line")
        self.url, self.model = f"{endpoint.rstrip('/')}/chat/completions", model
        self.folder, self.parallel = folder, parallel

    def ask(self, asked: Sequence[Request], advance: Callable[[int], None] = lambda requests: None) -> list[str]:
        """The answers, in the order of the requests.

        It ends at the first refusal: nothing more is sent, and it does not wait for running requests.

        Raises
        ------
        UserError: the endpoint refuses a request or keeps failing.
        """
        answers: dict[int, str] = {}
        with ThreadPool(self.parallel) as pool:  # its threads end with the process, unlike those of an executor
            for number, answer in pool.imap_unordered(lambda pair: (pair[0], self._one(pair[1])), enumerate(asked)):
                answers[number] = answer
                advance(1)
        return [answers[number] for number in range(len(asked))]

    def _one(self, request: Request) -> str:
        body = {"model": self.model, "messages": request.messages, "max_tokens": request.max_tokens}
        body |= {"temperature": 0, "seed": 0}
        name = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        file = self.folder / f"{name}.json"
        with suppress(UserError, KeyError):  # no answer is kept yet
            return str(read_json(file)["answer"])
        try:
            answer = self._answer(body)
        except requests.RequestException as error:
            raise self._refusal(type(error).__name__) from None
        write_json(file, {"answer": answer})
        return answer

    def _answer(self, body: dict[str, Any]) -> str:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=_RETRY))
            with session.post(self.url, json=body, headers=headers, timeout=_TIMEOUT, stream=True) as reply:
                content = bytearray()
                for part in reply.iter_content(2**16):
                    content += part
                    if len(content) > _LONGEST:
                        raise self._refusal(f"an answer of more than {_LONGEST:,} bytes")
        if reply.status_code != 200:
            # Redacted before it is cut: the cut could leave a part of a key.
            text = " ".join(redact(content.decode(errors="replace")).split())[:200]
            raise self._refusal(f"status {reply.status_code}: {text}")
        if (answer := answer_in(bytes(content))) is None:
            raise self._refusal("an answer without choices[0].message.content")
        return answer

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"params.yaml: explain.endpoint: {self.url}: {reason}")


def answer_in(reply: bytes) -> str | None:
    """The text of the first choice in a reply, without characters that UTF-8 cannot encode; None if there is none."""
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return str(text or "").encode("utf-16", "surrogatepass").decode("utf-16", "ignore")


def verdicts(answer: str, count: int) -> list[bool] | None:
    """The list of 0 and 1 in an answer; None if there is none of the right length."""
    for found in re.findall(r"\[[^\[\]]*\]", answer):
        try:
            values = json.loads(found)
        except (ValueError, RecursionError):
            continue
        if len(values) == count and all(value in (0, 1) and not isinstance(value, float) for value in values):
            return [bool(value) for value in values]
    return None
