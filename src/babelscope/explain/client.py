"""Asking an OpenAI-compatible endpoint (`/chat/completions`): retries, answers kept on disk, and what it will cost."""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

import requests

from babelscope.core.errors import UserError
from babelscope.core.files import read_json, write_json
from babelscope.core.redact import redact
from babelscope.explain.prompts import Message

KEY = "OPENAI_API_KEY"
# A message in a chat has some tokens around it.
_AROUND = 8
_TRIES, _TIMEOUT = 6, 300.0
# The longest wait that a server can ask for by Retry-After (seconds).
_LONGEST_WAIT = 300.0
# Bytes of a reply: thousands of times what any answer asked for takes.
_LONGEST = 2**24
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}


class Request(NamedTuple):
    """Messages, and the longest answer (tokens)."""

    messages: list[Message]
    max_tokens: int


def tokens(some: Sequence[Request]) -> tuple[int, int]:
    """The most tokens that are sent and that come back: whatever the tokenizer, a token has at least one byte."""
    sent = sum(len(m["content"].encode()) + _AROUND for one in some for m in one.messages)
    return sent, sum(one.max_tokens for one in some)


class Client:
    """An endpoint and a model behind it.

    Parameters
    ----------
    endpoint: base URL, such as `http://localhost:8000/v1`.
    model: its name there.
    keep: folder in which every answer is kept under the hash of its request: what is paid for is not asked twice.
    parallel: requests at once.
    pause: called with the seconds to wait before a request is tried again; without it a refusal ends the wait.

    The key is read from the environment (`OPENAI_API_KEY`); it is written nowhere.

    Raises
    ------
    UserError: the key in the environment cannot be one.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        keep: Path,
        parallel: int,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        key = os.environ.get(KEY, "")
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{KEY}: holds characters that cannot be sent; allowed: printable ASCII, in one line")
        self.url, self.model, self.keep = f"{endpoint.rstrip('/')}/chat/completions", model, keep
        self._stop = threading.Event()
        self.parallel, self.pause = parallel, pause or self._stop.wait

    def ask(self, some: Sequence[Request], advance: Callable[[int], None] = lambda requests: None) -> list[str]:
        """The answers, in the order of the requests.

        After the first refusal nothing more is sent; requests under way are waited for, since they are paid for.

        Raises
        ------
        UserError: the endpoint refuses, or fails again and again.
        """
        self._stop.clear()
        with ThreadPoolExecutor(self.parallel) as pool:
            futures = [pool.submit(self._one, request) for request in some]
            try:
                for future in as_completed(futures):
                    future.result()
                    advance(1)
            finally:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures]

    def _one(self, request: Request) -> str:
        body = {"model": self.model, "messages": request.messages, "max_tokens": request.max_tokens}
        body |= {"temperature": 0, "seed": 0}
        name = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        file = self.keep / f"{name}.json"
        with suppress(UserError, KeyError):  # where there is none yet
            return str(read_json(file)["answer"])
        answer = self._answer(body)
        write_json(file, {"answer": answer})
        return answer

    def _answer(self, body: dict[str, Any]) -> str:
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        reason = ""
        asked_for = 0.0
        for attempt in range(_TRIES):
            if attempt:
                self.pause(max(2.0 ** (attempt - 1), asked_for))
                if self._stop.is_set():
                    break
            asked_for = 0.0
            try:
                with requests.post(self.url, json=body, headers=headers, timeout=_TIMEOUT, stream=True) as reply:
                    content = _beginning(reply)
            except requests.RequestException as error:
                reason = f"{type(error).__name__}"
                continue
            if len(content) > _LONGEST:
                reason = f"an answer of more than {_LONGEST:,} bytes"
                break
            if reply.status_code == 200:
                if (answer := answer_in(content)) is not None:
                    return answer
                reason = "an answer without choices[0].message.content"
                continue
            # Before it is cut: half a key is too much, too.
            said = redact(content.decode(errors="replace"))
            reason = f"status {reply.status_code}: {' '.join(said.split())[:200]}"
            asked_for = _retry_after(reply.headers.get("Retry-After", ""))
            if reply.status_code not in _PASSING:
                break
        raise UserError(f"params.yaml: explain.endpoint: {self.url}: {reason}")


def _retry_after(header: str) -> float:
    """The seconds of a Retry-After header (RFC 9110: seconds, or a date); 0 where there is none that can be read."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_WAIT) if math.isfinite(seconds) else 0.0


def _beginning(reply: requests.Response) -> bytes:
    """What a server sends, or a little more than `_LONGEST` of it."""
    content = bytearray()
    for part in reply.iter_content(2**16):
        content += part
        if len(content) > _LONGEST:
            break
    return bytes(content)


def answer_in(reply: bytes) -> str | None:
    """The text of the first choice in a reply, without what UTF-8 cannot spell; null where there is none."""
    try:
        said = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return str(said or "").encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
