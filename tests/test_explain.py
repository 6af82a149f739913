"""Explanations: texts chosen, prompts, scores, a server that fails, and the stage against one that answers."""

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from test_browse_stage import WIDE, folder  # noqa: F401
from test_neurons_stages import SAE_AT, model, set_params, stage  # noqa: F401

from babelscope import config
from babelscope.core import endpoint as client
from babelscope.core.endpoint import Client, Request, tokens, verdicts
from babelscope.core.errors import UserError
from babelscope.explain import prompts
from babelscope.explain.scores import balanced_accuracy, fuzzed
from babelscope.features import examples
from babelscope.features.examples import Features, choose
from babelscope.report import browser
from babelscope.sae.autoencoder import SAE


def test_marks_stand_around_runs_and_leave_white_space_outside() -> None:
    pieces = ["Das", " ist", " gut", "."]
    assert prompts.marked(pieces, [False, True, True, False]) == "Das <<ist gut>>."
    assert prompts.marked(pieces, [True, False, False, True]) == "<<Das>> ist gut<<.>>"
    assert prompts.marked(pieces, [False] * 4) == "Das ist gut."


def test_the_question_shows_marks_and_strengths() -> None:
    [system, user] = prompts.explain([(["a", " b"], [0.0, 4.5]), (["c"], [9.0])], 9.0)
    assert system["role"] == "system"
    assert user["content"] == "1. a <<b>>\n   'b' 4\n2. <<c>>\n   'c' 9"


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("Sure! Here: [1,0,0]. Hope it helps", [True, False, False]),
        ("[1, 0]", None),
        ("[1, 2, 0]", None),
        ("[1.0, 0, 1]", None),
        ("[a, b, c]", None),
        ("yes", None),
        ("texts [1] to [3]: [0, 1, 1]", [False, True, True]),
    ],
)
def test_answers_are_read_or_left_out(answer: str, read: list[bool] | None) -> None:
    assert verdicts(answer, 3) == read


def test_balanced_accuracy_by_hand() -> None:
    truth = [True, True, True, True, False, False]
    assert balanced_accuracy(truth, [True, True, True, False, False, True]) == (0.75 + 0.5) / 2
    assert balanced_accuracy(truth, [True] * 6) == 0.5
    assert balanced_accuracy(truth, [True, None, None, None, None, False]) == 1.0
    assert balanced_accuracy(truth, [True, None, None, None, None, None]) is None


def test_wrong_marks_are_as_many_and_none_of_the_right_ones() -> None:
    on = [True, False, True, False, False, False, False]
    wrong = fuzzed(on, [0, 1])
    assert sum(wrong) == 2 and not any(a and b for a, b in zip(on, wrong, strict=True))
    assert fuzzed(on, [0, 1]) == wrong and fuzzed([True, True], [0]) == [False, False]


def test_the_texts_of_a_unit_are_its_strongest_and_further_ones_and_silent_ones() -> None:
    # Unit u fires on direction u, as strongly as the text's number says; text 0 and every third are silent for unit 1.
    sae = SAE(torch.eye(3), torch.eye(3), torch.zeros(3), torch.zeros(3), 1)
    texts = torch.arange(12).repeat_interleave(2)

    def gather(rows: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(len(rows), 3)
        text = rows // 2
        x[:, 1] = torch.where((rows % 2 == 1) & (text % 3 > 0), text.float(), torch.tensor(0.0))
        x[:, 2] = torch.where(x[:, 1] == 0, 0.5, 0.0)
        return x

    feature = Features(sae, torch.tensor([1]))
    [chosen] = choose(feature, gather, texts, examples=2, scored=3, seeds=[[0, 1]])
    assert [one.text for one in chosen.examples] == [11, 10]
    assert chosen.examples[0].activations == [0.0, 11.0]
    assert [one.text for one in chosen.active] == [8, 5, 1]  # the strongest of the rest, the weakest, one between
    assert len(chosen.silent) == 3 and all(one.text % 3 == 0 and not any(one.activations) for one in chosen.silent)
    [again] = choose(feature, gather, texts, examples=2, scored=3, seeds=[[0, 1]])
    assert again == chosen


def test_texts_are_encoded_many_at_once_to_the_same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    decoder, x = torch.randn(16, 8, generator=g), torch.randn(90, 8, generator=g)
    sae = SAE(decoder, decoder, torch.zeros(16), torch.zeros(8), 4)
    texts, two = torch.arange(30).repeat_interleave(3), Features(sae, torch.tensor([3, 7]))
    options: dict[str, Any] = {"examples": 4, "scored": 3, "seeds": [[0, 3], [0, 7]]}
    asked: list[int] = []

    def gather(rows: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return x[rows]

    read: list[int] = []
    whole = choose(two, gather, texts, **options, advance=read.append)
    assert asked[0] == sum(read) == 90 and len(asked) == 2  # all texts, then those that are shown
    for chunk in (1, 10):
        monkeypatch.setattr(examples, "CHUNK", chunk)
        again = choose(two, gather, texts, **options)
        for one, other in zip(whole, again, strict=True):
            for part, same in zip(one, other, strict=True):
                assert [w.text for w in part] == [w.text for w in same]
                for a, b in zip(part, same, strict=True):
                    assert a.activations == pytest.approx(b.activations, rel=1e-5)
    assert max(asked[2:]) <= 12


class Server(ThreadingHTTPServer):
    """Speaks the protocol; `script` holds (status, content) to answer first, before it answers as it should."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, str]] = []
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.retry_after: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        status, content = self.server.script.pop(0) if self.server.script else (200, answer(body))
        reply = content.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        if status != 200 and self.server.retry_after is not None:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments: Any) -> None:
        pass


def completion(text: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def answer(body: dict[str, Any]) -> str:
    """Explains by the first marked piece, and finds active what holds it (or, of marks, what is in the explanation)."""
    if len(body["messages"]) == 1:
        return completion("an answer")
    system, user = (message["content"] for message in body["messages"])
    if system == prompts.EXPLAIN:
        return completion(f"the <b>token</b> {re.search(r'<<([^>]*)>>', user)[1]}")  # type: ignore[index]
    texts = re.findall(r"^\d+\. ", user, re.MULTILINE)
    return completion(json.dumps([1] * len(texts)))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


ASKED = [Request([{"role": "user", "content": f"question {i}"}], 5) for i in range(3)]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited before each further try (none before the first one, without Retry-After)."""
    seconds: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time", SimpleNamespace(sleep=seconds.append, time=time.time))
    return seconds


def test_passing_failures_are_tried_again_and_answers_are_kept(
    server: Server, tmp_path: Path, pauses: list[float]
) -> None:
    server.script = [(429, "slow down"), (500, "oh"), (503, "busy"), (200, completion("first"))]
    client = Client(server.url, "m", tmp_path, 1)
    assert client.ask(ASKED[:1]) == ["first"]
    assert len(pauses) == 2 and 2 <= pauses[0] <= 3 and 4 <= pauses[1] <= 5  # a jitter of at most a second
    asked = len(server.seen)
    assert client.ask(ASKED[:1]) == ["first"] and len(server.seen) == asked  # not paid for twice
    assert server.seen[0] == {"model": "m", "messages": ASKED[0].messages, "max_tokens": 5, "temperature": 0, "seed": 0}
    assert Client(server.url, "other", tmp_path, 1).ask(ASKED[:1]) != ["first"]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", [7]), ("0", []), ("99999", [300]), ("soon", []), ("nan", []), ("-5", []),
     ("Wed, 21 Oct 2099 07:28:00 GMT", [300]), ("Wed, 21 Oct 2015 07:28:00 GMT", [])],
)  # fmt: skip
def test_a_server_says_when_to_try_again(
    server: Server, tmp_path: Path, pauses: list[float], header: str, seconds: list[float]
) -> None:
    server.script, server.retry_after = [(429, "slow down")], header
    assert Client(server.url, "m", tmp_path, 1).ask(ASKED[:1]) and pauses == seconds


def test_a_refusal_does_not_wait_for_what_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.script, server.retry_after = [(503, "later"), (401, "who are you"), (401, "who are you")], "200"
    with pytest.raises(UserError, match=r"explain\.endpoint: http.*: status 401: who are you"):
        Client(server.url, "m", tmp_path, 2).ask(ASKED)
    assert len(server.seen) <= 3  # one each; the first waits for 200 s


def test_a_failure_that_stays_is_told_with_what_the_server_says(
    server: Server, tmp_path: Path, pauses: list[float]
) -> None:
    server.script = [(503, "busy")] * 9
    with pytest.raises(UserError, match=r"explain\.endpoint: http.*: status 503: busy"):
        Client(server.url, "m", tmp_path, 1).ask(ASKED[:1])
    assert len(server.seen) == 6
    server.script = [(200, "not json")]
    with pytest.raises(UserError, match=r"an answer without choices\[0\]\.message\.content"):
        Client(server.url, "m", tmp_path, 1).ask(ASKED[:1])


def test_what_was_answered_before_a_failure_is_kept(server: Server, tmp_path: Path) -> None:
    server.script = [(200, completion("one")), (401, "who are you")]
    client = Client(server.url, "m", tmp_path, 1)
    with pytest.raises(UserError, match=r"explain\.endpoint: http.*: status 401: who are you"):
        client.ask(ASKED)
    server.script = []
    before = len(server.seen)
    assert client.ask(ASKED)[0] == "one"
    assert all(body["messages"] != ASKED[0].messages for body in server.seen[before:])


def test_a_key_is_sent_and_shown_nowhere(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.script = [(403, "the key sk-secret is not mine")]
    with caplog.at_level("DEBUG"), pytest.raises(UserError) as caught:
        Client(server.url, "m", tmp_path, 1).ask(ASKED[:1])
    Client(server.url, "m", tmp_path, 1).ask(ASKED[:1])
    assert server.keys[-1] == "Bearer sk-secret"
    kept = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "secret" not in str(caught.value) + caplog.text + kept


def test_a_reply_without_end_is_cut_and_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_LONGEST", 2**17)
    server.script = [(200, completion("x" * 2**20))]
    with pytest.raises(UserError, match=r"explain\.endpoint: http.*: an answer of more than 131,072 bytes"):
        Client(server.url, "m", tmp_path, 1).ask(ASKED[:1])
    assert len(server.seen) == 1 and not list(tmp_path.iterdir())


def test_no_server_at_all_is_a_clear_error(tmp_path: Path, pauses: list[float]) -> None:
    with pytest.raises(
        UserError, match=r"explain\.endpoint: http://127\.0\.0\.1:9/v1/chat/completions: ConnectionError"
    ):
        Client("http://127.0.0.1:9/v1", "m", tmp_path, 2).ask(ASKED)


def test_the_bound_counts_bytes_and_the_longest_answers() -> None:
    assert tokens([Request([{"role": "user", "content": "ä" * 3}], 7)] * 2) == (2 * (6 + 8), 14)


@pytest.fixture
def on(folder: Path, server: Server) -> Iterator[Server]:  # noqa: F811
    """The stage's knobs, with the server as its endpoint."""
    explain(endpoint=server.url, model="m")
    yield server
    explain()


def explain(**knobs: Any) -> None:
    """Write params.yaml as the stages before `explain` read it, and these knobs."""
    off = {"endpoint": None, "model": None, "per_language": 2, "examples": 2, "scored": 2}
    prices = {"price_in": 0.0, "price_out": 0.0, "max_cost": 0.0}
    set_params(hardware={"parallel": 2}, explain=off | prices | knobs)
    content = json.loads(Path("params.yaml").read_text()) | {"hookpoints": [SAE_AT, WIDE]}
    Path("params.yaml").write_text(json.dumps(content))


def test_the_stage_explains_scores_and_the_browser_shows_it_as_text(on: Server) -> None:
    stage("explain")
    table = pl.read_parquet("data/explain/explanations.parquet")
    chosen = pl.read_parquet("data/scores/features.parquet").filter(pl.col("kind") == "sae", pl.col("rank") <= 2)
    assert (
        table.select("hookpoint", "unit", "language")
        .sort(pl.all())
        .equals(chosen.select("hookpoint", "unit", "language").sort(pl.all()))
    )
    assert table["explanation"].str.starts_with("the <b>token</b>").all()
    # It always says yes: right of all that fire, wrong of all that do not.
    assert set(table["detection"].drop_nulls()) <= {0.5} and table["texts"].sum() > 0
    metrics = json.loads(Path("metrics/explain.json").read_text())
    assert metrics["features"] == len(table)
    assert not list(Path(".scratch").glob("*"))

    frames = {name: pl.read_parquet(f"data/browse/{name}.parquet") for name in browser.COLUMNS}
    params = config.load()
    bare = browser.BrowserInputs(params.languages, params.hookpoints, "tiny", frames)
    told = browser.BrowserInputs(params.languages, params.hookpoints, "tiny", frames | {"explanations": table})
    said = [feature["said"] for feature in browser.content(told)["features"] if "said" in feature]
    assert len(said) == table.select("hookpoint", "unit").n_unique()
    assert "<b>token" not in browser.build(told)
    assert browser.build(bare) == browser.build(
        browser.BrowserInputs(params.languages, params.hookpoints, "tiny", frames | {"explanations": table.clear()})
    )


def test_a_killed_stage_does_not_ask_again(on: Server) -> None:
    on.script = [(200, completion("paid for"))] * 2 + [(400, "no more money")]
    with pytest.raises(UserError, match="status 400: no more money"):
        stage("explain")
    on.script = []
    stage("explain")
    assert "paid for" in pl.read_parquet("data/explain/explanations.parquet")["explanation"].to_list()
    asked = [json.dumps(body, sort_keys=True) for body in on.seen]
    answered_twice = {one for one in asked if asked.count(one) > 1}
    assert len(answered_twice) <= 2  # the refused one, and what was under way beside it


def test_each_language_has_as_many_features_whatever_their_ranks(on: Server) -> None:
    path = Path("data/scores/features.parquet")
    before = pl.read_parquet(path)
    # As with score.per_layer: every layer has a first one.
    before.with_columns(rank=pl.lit(1, before.schema["rank"])).write_parquet(path)
    stage("explain")
    before.write_parquet(path)
    table = pl.read_parquet("data/explain/explanations.parquet")
    owned = dict(before.filter(kind="sae").group_by("language").len().iter_rows())
    assert dict(table.group_by("language").len().iter_rows()) == {name: min(2, n) for name, n in owned.items()}
    assert max(owned.values()) > 2


def test_a_text_that_the_corpus_lacks_is_named(on: Server) -> None:
    path = Path("data/corpus/texts.parquet")
    before = pl.read_parquet(path)
    before.filter(split="eval").write_parquet(path)
    with pytest.raises(UserError, match=r"tokens\.parquet: holds texts that data/corpus/texts\.parquet lacks"):
        stage("explain")
    before.write_parquet(path)


def test_a_long_explanation_is_cut_so_that_the_bound_holds(on: Server) -> None:
    on.script = [(200, completion("ä " * 5000))] * 2
    stage("explain")
    longest = max(len(text.encode()) for text in pl.read_parquet("data/explain/explanations.parquet")["explanation"])
    assert 630 < longest <= 640


def test_too_dear_is_refused_before_the_first_request(on: Server, caplog: pytest.LogCaptureFixture) -> None:
    explain(endpoint=on.url, model="m", price_in=5.0, price_out=20.0, max_cost=0.001)
    with (
        caplog.at_level("INFO"),
        pytest.raises(UserError, match=r"explain\.max_cost: this would cost up to 0\.\d+; allo"),
    ):
        stage("explain")
    assert not on.seen and "tokens sent (one a byte)" in caplog.text


def test_off_it_asks_nothing_and_leaves_an_empty_table(folder: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    explain()
    with caplog.at_level("INFO"):
        stage("explain")
    assert pl.read_parquet("data/explain/explanations.parquet").is_empty()
    assert json.loads(Path("metrics/explain.json").read_text()) == {"features": 0}
    assert "none to explain" in caplog.text
