"""What comes from outside runs nothing, writes nowhere else, and learns no password; nor does who reads the outputs."""

import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
import transformers
from closure import ROOT
from mlflow.exceptions import MlflowException
from test_explain import Server, server  # noqa: F401
from test_report_features import inputs as browser_inputs
from test_report_features_browser import visit
from test_tracking import HOOKPOINTS, toy
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from babelscope import config, sae
from babelscope.activations.store import ActivationStore, write_index, write_shard
from babelscope.config import schema
from babelscope.core.endpoint import Client, Request, answer_in
from babelscope.core.errors import UserError
from babelscope.core.redact import SECRETS, redact
from babelscope.corpus import hub, text_files
from babelscope.models import loading
from babelscope.report import browser
from babelscope.sae.training.loop import resumable
from babelscope.sae.training.module import SAETraining
from babelscope.tracking import prune, store, ui

# --- pickles and code


class Planted:
    """What a pickle does when it is opened: it leaves a folder."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (os.environ["PLANTED"],)


# The same as a module that comes with a model or a data set.
CODE = "import os\nos.mkdir(os.environ['PLANTED'])\n"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the folder would be; the fixture makes sure that it would be seen."""
    path = tmp_path / "planted"
    monkeypatch.setenv("PLANTED", str(path))
    pickle.loads(pickle.dumps(Planted()))
    path.rmdir()
    return path


def model_at(folder: Path, trust: bool = False) -> schema.Model:
    known = {
        "source": "huggingface",
        "name": str(folder),
        "gguf_file": None,
        "sha256": None,
        "revision": None,
        "quantization": None,
    }
    return schema.Model(**known, trust_remote_code=trust)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and its tokenizer, as safetensors."""
    folder = tmp_path_factory.mktemp("model")
    llama = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.AutoModelForCausalLM.from_config(llama).save_pretrained(folder)
    words = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def copy(tiny: Path, folder: Path, *without: str) -> Path:
    folder.mkdir()
    for path in tiny.iterdir():
        if path.name not in without:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def bare(path: Path) -> None:
    path.write_bytes(pickle.dumps(Planted()))


def zipped(path: Path) -> None:
    torch.save({"model.embed_tokens.weight": Planted()}, path)


def old(path: Path) -> None:
    torch.save({"model.embed_tokens.weight": Planted()}, path, _use_new_zipfile_serialization=False)


def empty(path: Path) -> None:
    path.write_bytes(b"")


WAYS = [bare, zipped, old, empty]


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_among_a_models_weights_is_refused(
    tiny: Path, tmp_path: Path, planted: Path, way: Callable[[Path], None]
) -> None:
    folder = copy(tiny, tmp_path / "m", "model.safetensors")
    way(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"params\.yaml: model\.name: cannot load the weights of") as caught:
        loading.load_model(model_at(folder), "float32")
    if way is not empty:
        assert "pickled code, which is never run; allowed: weights in safetensors" in str(caught.value)
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")}
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.name: cannot load the weights of"):
        loading.load_model(model_at(folder), "float32")
    assert not planted.exists()


def test_weights_of_torch_that_hold_tensors_alone_are_read(tiny: Path, tmp_path: Path) -> None:
    folder = copy(tiny, tmp_path / "m", "model.safetensors")
    whole = loading.load_model(model_at(tiny), "float32").state_dict()
    torch.save(whole, folder / "pytorch_model.bin")
    read = loading.load_model(model_at(folder), "float32").state_dict()
    assert all(torch.equal(read[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_in_place_of_our_own_files_is_refused(
    tmp_path: Path, planted: Path, way: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints, activations and SAEs: folders that others may share, or that come with a `dvc pull`."""
    checkpoint = tmp_path / "checkpoint.pt"
    way(checkpoint)
    assert resumable(checkpoint, SAETraining(config.load(ROOT / "params.yaml").train, steps=1, seed=0), "auto") is None
    assert "checkpoint.pt: damaged; training starts from step 0" in caplog.text
    write_shard(tmp_path / "store", 0, torch.ones(3, 2))
    write_index(tmp_path / "store", [3], 2, "float32", "m", "layers.0")
    way(tmp_path / "store/shard-00000.safetensors")
    with pytest.raises(UserError, match="missing or corrupt shard"):
        ActivationStore(tmp_path / "store")
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae/cfg.json").write_text(json.dumps({"architecture": "topk", "k": 2}))
    way(tmp_path / "sae/sae_weights.safetensors")
    with pytest.raises(UserError, match="not a readable file of SAELens"):
        sae.load(tmp_path / "sae")
    (tmp_path / "scope").mkdir()
    way(tmp_path / "scope/params.npz")
    with pytest.raises(UserError, match="not a readable file of Gemma Scope"):
        sae.load(tmp_path / "scope")
    (tmp_path / "texts").mkdir()
    way(tmp_path / "texts/de.parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        text_files._table(tmp_path / "texts/de.parquet", "de")
    assert not planted.exists()


def test_nothing_of_ours_opens_a_pickle() -> None:
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "stages").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pickle\.loads?\(|read_pickle|joblib|allow_pickle=True|weights_only=False", text), path
        loads = text.count("torch.load(") + text.count("ckpt_path=")  # Lightning's Trainer loads, too
        assert loads == text.count("weights_only=True"), path
        assert text.count("np.load(") == text.count("allow_pickle=False"), path
        assert not re.search(r"(?<![.\w])(eval|exec)\(|shell=True|yaml\.load\(", text), path


def card(folder: Path, file: str) -> None:
    files = [{"config_name": "de", "data_files": [{"split": "train", "path": file}]}]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(files)}\n---\n")


def scripted(folder: Path) -> None:
    (folder / f"{folder.name}.py").write_text(CODE)
    pl.DataFrame({"text": ["ein Satz"]}).write_parquet(folder / "train.parquet")


def pickled(folder: Path) -> None:
    bare(folder / "train.pkl")
    card(folder, "train.pkl")


def web(folder: Path) -> None:
    with tarfile.open(folder / "train.tar", "w") as archive:
        for ending in ("pkl", "pickle", "pyd", "pth", "npy"):
            bare(folder / "one")
            archive.add(folder / "one", f"a.{ending}")
    card(folder, "train.tar")


@pytest.mark.parametrize("way", [scripted, pickled, web])
def test_a_data_set_runs_nothing(
    tmp_path: Path, planted: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[Path], None]
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    way(folder)
    section = schema.Dataset(path=str(folder), subset="{language}", splits=["train"], text=["text"])
    with pytest.raises(UserError, match=r"params\.yaml: corpus\.datasets: path: cannot read"):
        hub.read([section], ["de"])
    assert not planted.exists()


def with_code(folder: Path) -> None:
    """Model and tokenizer of classes that come with them."""
    for name, changes in {
        "config.json": {
            "model_type": "planted", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
        },
        "tokenizer_config.json": {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "own.T"]}},
    }.items():  # fmt: skip
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(content))
    (folder / "own.py").write_text(
        "import os\nos.makedirs(os.environ['PLANTED'], exist_ok=True)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig):\n    model_type = 'planted'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )


def test_a_models_own_code_runs_with_the_flag_alone(tiny: Path, tmp_path: Path, planted: Path) -> None:
    folder = copy(tiny, tmp_path / "m")
    with_code(folder)
    loads = (loading.load_tokenizer, loading.load_skeleton, lambda section: loading.load_model(section, "float32"))
    for load in loads:
        with pytest.raises(UserError, match=r"own, which runs only if model\.trust_remote_code is true"):
            load(model_at(folder))
        assert not planted.exists()
    assert type(loads[2](model_at(folder, trust=True))).__name__ == "M" and planted.exists()


def test_code_beside_a_model_that_transformers_knows_is_left_alone(tiny: Path, tmp_path: Path, planted: Path) -> None:
    folder = copy(tiny, tmp_path / "m")
    with_code(folder)
    content = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(content))
    assert type(loading.load_model(model_at(folder), "float32")).__name__ == "LlamaForCausalLM"
    assert not planted.exists()


# --- paths


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "layers.0/../../x", "..", "a b", "x; touch y", "$(y)", "-x", "a\nb"]
)
@pytest.mark.parametrize("key", ["hookpoints", "languages", "neurons", "stability"])
def test_names_that_become_paths_and_arguments_are_refused(name: str, key: str) -> None:
    content = config.read_yaml(ROOT / "params.yaml")
    content[key] = [name] if key in ("hookpoints", "languages") else content[key] | {"hookpoints": [name]}
    with pytest.raises(UserError, match=rf"params\.yaml: {key}"):
        config.parse(content)


@pytest.mark.parametrize("name", ["../../../../outside", "/tmp/outside", "..", "a/../../b", "a\\b", "名 3.2"])
def test_an_experiments_artifacts_lie_in_one_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = (tmp_path / "mlruns" / store.folder_of(name)).resolve()
    assert made.parent == (tmp_path / "mlruns").resolve()
    assert store.folder_of("babelscope") == "babelscope" and store.folder_of("llama-3.2 1b") == "llama-3.2 1b"


@pytest.mark.parametrize("path", ["../victim", "/victim", "data", "src/babelscope", "data/../../victim", "."])
def test_prune_deletes_outputs_alone(path: str, tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    lock.write_text(json.dumps({"stages": {"train@layers.9": {"outs": [{"path": path}]}}}))
    with pytest.raises(UserError, match=r"dvc\.lock: .* is not below data/ or metrics/ and is not deleted"):
        prune.stale(lock, ["layers.1"], [])
    lock.write_text(json.dumps({"stages": {"train@layers.9": {"outs": [{"path": "data/sae/layers.9"}]}}}))
    assert prune.stale(lock, ["layers.1"], []) == [Path("data/sae/layers.9")] and not prune.stale(
        lock, ["layers.9"], []
    )


def test_paths_that_lead_out_of_their_folder_are_refused():
    content = config.read_yaml(ROOT / "params.yaml")
    cases = [
        ({"hookpoints": ["../../x"]}, "hookpoints"), ({"hookpoints": ["layers/0"]}, "hookpoints"),
        ({"languages": ["../en"]}, "languages"), ({"languages": ["/en"]}, "languages"),
        ({"model": content["model"] | {"gguf_file": "../other.gguf"}}, "model.gguf_file"),
        ({"model": content["model"] | {"gguf_file": "/etc/passwd"}}, "model.gguf_file"),
        ({"corpus": content["corpus"] | {"domain": "../../x"}}, "corpus.domain"),
        ({"pretrained": content["pretrained"] | {"folder": "../{hookpoint}"}}, "pretrained.folder"),
        ({"pretrained": content["pretrained"] | {"folder": {"layers.6.mlp": "/x"}}}, "pretrained.folder"),
    ]  # fmt: skip
    for changes, key in cases:
        with pytest.raises(UserError, match=rf"^params.yaml: {key}"):
            config.parse(content | changes)


# --- secrets

CANARY = "canary7f3e"


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values = {name: f"{CANARY}-{name.lower()}" for name in SECRETS}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


def test_redact_by_hand(canaries: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a")  # shorter than any key, and part of many words
    token = canaries["HF_TOKEN"]
    said = f"at https://me:{CANARY}@host:5000/a?b=c#d, postgresql://u:p%40{CANARY}@db/x, ssh://git@host {token}"
    assert redact(said) == "at https://host:5000/a?b=c#d, postgresql://db/x, ssh://host ***"
    assert redact(f"http://me:p@{CANARY}@host") == "http://host"  # the last @ ends it
    for text in ("see a@b.org", "http://host/p@th", "http://host/?q=a@b", "10:30 @ home"):
        assert redact(text) == text


def files_of(folder: Path) -> dict[str, bytes]:
    kept = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {str(path): path.read_bytes() for path in kept if path != folder / ".dvc/config"}


def test_secrets_are_nowhere_in_what_a_run_leaves_or_says(tmp_path: Path, canaries: dict[str, str]) -> None:
    repo = toy(tmp_path / "repo")
    repo.set("hookpoints", HOOKPOINTS[:1])
    url = f"https://me:{CANARY}@example.org/x"
    repo.run("git", "remote", "add", "origin", f"{url}.git")
    repo.dvc("remote", "add", "--default", "there", url)
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(f"{CANARY}-cached")
    secret = {name: value for name, value in canaries.items() if not name.startswith("MLFLOW")}
    mlflow = {name: value for name, value in canaries.items() if name.startswith("MLFLOW")}
    secret |= {"HF_HOME": str(home), "AWS_ACCESS_KEY_ID": f"{CANARY}-id", "MLFLOW_TRACKING_USERNAME": f"{CANARY}-user"}
    said = repo.dvc("repro", **secret, **mlflow)
    assert len(repo.runs()) == 2 and "track: state" in said
    # A server that is not there, whose address holds the password.
    address = f"http://me:{CANARY}@127.0.0.1:9"
    commands = ([str(ROOT / "tests/toy_pipeline.py"), "train", HOOKPOINTS[0]], [str(ROOT / "stages/track.py")])
    mlflow |= {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    down = "".join(repo.run(sys.executable, *command, **secret, **mlflow) for command in commands)
    assert down.count("cannot log to http://127.0.0.1:9") == 2 and "Traceback" not in down
    assert CANARY not in said + down
    left = files_of(repo.folder)
    assert any(path.endswith("mlflow.db") for path in left) and any("mlruns" in path for path in left)
    assert [path for path, content in left.items() if CANARY.encode() in content] == []


def test_mlflow_names_the_address_with_its_password_and_we_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{CANARY}@127.0.0.1:9")
    for name in ("MAX_RETRIES", "TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")
    with pytest.raises(MlflowException) as raised:
        store.open_store("e")
    assert CANARY in str(raised.value)
    assert CANARY not in store.first_line(raised.value) + store.shown()


def test_passwords_in_params_and_tags_do_not_reach_mlflow(canaries: dict[str, str]) -> None:
    class Kept:
        def create_run(self, *given: Any, **named: Any) -> Any:
            self.given = [given, named]
            return SimpleNamespace(info=SimpleNamespace(run_id="1"))

        def log_batch(self, *given: Any, **named: Any) -> None:
            self.given += [given, [(param.key, param.value) for param in named["params"]]]

    params = {"model.name": f"https://me:{CANARY}@host/m", "pretrained.name": canaries["HF_TOKEN"]}
    opened = store.Store(Kept(), "0")
    opened.create(f"http://me:{CANARY}@host", params, {"a": f"http://me:{CANARY}@host"})
    assert "https://host/m" in str(opened.client.given) and CANARY not in str(opened.client.given)


def test_the_printed_address_of_the_pages_holds_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{CANARY}@mlflow.example.org")
    monkeypatch.setattr(store, "open_store", lambda experiment: store.Store(None, "7"))
    assert ui.ui_url("e").startswith("https://mlflow.example.org/#/experiments/7")


@pytest.mark.parametrize("how", ["error", "log", "exception"])
def test_what_a_stage_says_holds_no_password(how: str, canaries: dict[str, str]) -> None:
    raised = {
        "error": "raise UserError(said)",
        "log": "logging.getLogger('any').warning(said)",
        "exception": "raise ValueError(said)",
    }
    body = f"said = 'http://me:{CANARY}@host and ' + os.environ['HF_TOKEN']\n    {raised[how]}"
    heads = "import logging, os\nfrom babelscope.core import stage\nfrom babelscope.core.errors import UserError\n"
    code = f"{heads}def main():\n    {body}\nstage.run(main)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.returncode == (how != "log") and "http://host and ***" in done.stderr
    assert CANARY not in done.stderr + done.stdout


def test_an_endpoint_with_a_password_or_key_is_refused(canaries: dict[str, str]) -> None:
    content = config.read_yaml(ROOT / "params.yaml")
    for address in (f"http://me:{CANARY}@host/v1", f"http://host/v1?key={canaries['OPENAI_API_KEY']}", "ftp://host"):
        changed = content["explain"] | {"endpoint": address, "model": "m"}
        with pytest.raises(UserError, match=r"params\.yaml: explain\.endpoint: expected a URL") as said:
            config.parse(content | {"explain": changed})
        assert CANARY not in str(said.value)


@pytest.mark.parametrize("key", ["sk-\u201cquoted\u201d", "sk-one\nsk-two"])
def test_a_key_that_cannot_be_sent_is_named_and_not_shown(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY: holds characters that cannot be sent") as said:
        Client("http://127.0.0.1:9/v1", "m", tmp_path, 1)
    assert "sk-" not in str(said.value)


def test_not_even_a_piece_of_a_key_is_quoted(
    server: Server,  # noqa: F811
    tmp_path: Path,
    canaries: dict[str, str],
) -> None:
    server.script = [(403, "x" * 190 + canaries["OPENAI_API_KEY"])]  # the message is cut at 200
    with pytest.raises(UserError) as said:
        Client(server.url, "m", tmp_path, 1).ask([Request([{"role": "user", "content": "?"}], 5)])
    assert "canary" not in str(said.value)


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ('{"choices": [{"message": {"content": "a \\ud800 b"}}]}', "a  b"),
        ('{"choices": [{"message": {"content": null}}]}', ""),
        ("[" * 100_000, None),
        ('{"choices": []}', None),
        ("[]", None),
        ("\x80", None),
    ],
)
def test_an_answer_is_text_that_can_be_written_or_none(content: str, read: str | None) -> None:
    assert answer_in(content.encode("latin-1")) == read


# --- pages

HOSTILE = [
    "<script>window.hacked = 1</script>", "</script><script>window.hacked = 1</script>", "<!-- <script>",
    "<img src=x onerror='window.hacked = 1'>", "{{ 7 * 7 }}{% for x in y %}", "' onmouseover='window.hacked = 1",
    '" autofocus onfocus="window.hacked = 1', "javascript:window.hacked=1", "\u2028window.hacked = 1\u2029",
    "<svg/onload=window.hacked=1>", "[x](javascript:window.hacked=1)", "${window.hacked = 1}", "\x00\x1b[31m", "]]>",
]  # fmt: skip


def hostile_browser() -> browser.BrowserInputs:
    """The feature browser's example, every text, token, name and explanation in it hostile."""
    given = browser_inputs()
    frames = dict(given.frames)
    bad = pl.Series(HOSTILE)
    texts = frames["texts"]
    pieces = [[HOSTILE[(row + at) % len(HOSTILE)] for at in range(len(p))] for row, p in enumerate(texts["pieces"])]
    frames["texts"] = texts.with_columns(pieces=pl.Series(pieces))
    tokens = frames["tokens"]
    frames["tokens"] = tokens.with_columns(token=bad.gather([i % len(bad) for i in range(len(tokens))]))
    keys = frames["features"].select("hookpoint", "layer", "unit")
    frames["explanations"] = keys.with_columns(
        language=pl.lit("en"), explanation=bad.gather([i % len(bad) for i in range(len(keys))]),
        detection=pl.lit(0.5), fuzzing=pl.lit(0.5), texts=pl.lit(4),
    )  # fmt: skip
    return browser.BrowserInputs(given.languages, given.hookpoints, HOSTILE[1], frames)


def scripts(html: str) -> list[str]:
    return re.findall(r"<script\b[^>]*>", html, re.IGNORECASE)


def test_a_hostile_corpus_endpoint_and_name_run_nothing_in_the_feature_browser(chromium: Any, tmp_path: Path) -> None:
    html = browser.build(hostile_browser())
    assert scripts(html) == scripts(browser.build(browser_inputs()))
    file = tmp_path / "features.html"
    file.write_text(html, encoding="utf-8")
    page = visit(chromium, file)
    for _ in range(8):
        page.keyboard.press("ArrowDown")
        for word in page.locator("#feature *").all()[:3]:
            word.hover(force=True)
    assert page.evaluate("window.hacked") is None and page.noticed == []
    assert page.locator("img, svg[onload], [onerror], [onmouseover], [onfocus], a[href^=javascript]").count() == 0
    page.close()
