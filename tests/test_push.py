"""`babelscope push` against a server that answers as the hub's API does, and what SAELens' layout gives back."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from closure import ROOT
from test_compare import dictionary

from babelscope import cli, config
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.release import card, push
from babelscope.sae.checkpoint import load, save

NAMES, TOKEN = ["layers.1.mlp", "layers.2.mlp"], "hf_" + "a" * 34


class Hub(ThreadingHTTPServer):
    """Repositories as files by name; weights go through LFS, as on the hub."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self.answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            hub.created.append(asked)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            hub.repos.setdefault(name, {})
            return self.answer({"url": f"{hub.address}/{name}", "name": name, "id": "1"})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [{**one, "actions": {"upload": {"href": f"{hub.address}/upload/{one['oid']}"}}}
                       for one in json.loads(body)["objects"]]  # fmt: skip
            return self.answer({"transfer": "basic", "objects": objects})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [{"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                      "shouldIgnore": False, "oid": None} for one in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        if "/commit/" in path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    hub.commits.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    hub.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    hub.repos[name][entry["value"]["path"]] = hub.objects[entry["value"]["oid"]]
            return self.answer({"commitUrl": f"{hub.address}/{name}/commit/1", "commitOid": "1", "success": True})
        self.answer({"error": f"{path}: not known here"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    content = config.read_yaml(ROOT / "params.yaml")
    content |= {"hookpoints": NAMES, "languages": ["en", "pt-BR", "zh-CN"]}
    content["steer"] |= {"hookpoints": [], "prompt_languages": ["en"]}
    content["stability"]["hookpoints"] = []
    Path("params.yaml").write_text(json.dumps(content))
    for seed, name in enumerate(NAMES):
        save(dictionary(seed), Path("data/sae") / name, {"model_name": "m", "hook_name": name})
        (Path("data/sae") / name / "history.csv").write_text("step\n")
    for folder in ("data/scores", "data/corpus", "metrics"):
        Path(folder).mkdir(parents=True)
    pl.DataFrame({"kind": "sae", "hookpoint": NAMES, "unit": [3, 4], "language": "en"}).write_parquet(
        "data/scores/features.parquet"
    )
    entries = [{"path": "gettext:polars", "revision": None, "license": None},
               {"path": "openlanguagedata/flores_plus", "revision": "abc", "license": "cc-by-sa-4.0"}]  # fmt: skip
    Path("data/corpus/sources.json").write_text(json.dumps({"sources": entries}))
    for name, figures in {
        "train.layers.1.mlp": {"fvu": 0.1234, "l0": 8.0, "dead_share": 0.01},
        "quality": {"loss_recovered/layers.1.mlp": 0.9},
        "score": {"features": 12, "features/en": 5, "effective_languages_median": 1.9},
        "ablate": {"own": 1.2, "dnll_own/en": 0.25},
    }.items():
        Path(f"metrics/{name}.json").write_text(json.dumps(figures))
    return tmp_path


def test_the_saes_are_uploaded_with_a_card_and_load_to_the_same(
    hub: Hub, repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["push", "me/saes", "--private", "--license", "apache-2.0"])
    assert capsys.readouterr().out == f"{hub.address}/me/saes\n"
    [created] = hub.created
    assert created.get("private") or created.get("visibility") == "private"
    assert hub.commits == ["Upload SAEs by babelscope push"]
    files = hub.repos["me/saes"]
    assert set(files) == {"README.md", "features.csv"} | {
        f"{name}/{file}" for name in NAMES for file in ("cfg.json", "sae_weights.safetensors")
    }
    for name, content in files.items():
        path = repo / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    for seed, name in enumerate(NAMES):
        torch.testing.assert_close(load(repo / "downloaded", name)(x), dictionary(seed)(x))
    _, front, body = files["README.md"].decode().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "saelens" and metadata["license"] == "apache-2.0"
    assert metadata["language"] == ["en", "pt", "zh"] and "base_model" not in metadata
    assert 'SAE.from_pretrained("me/saes", "layers.1.mlp")' in body
    assert "| layers.1.mlp | 0.123 | 8.0 | 1.0" in body and "| layers.2.mlp | – | – | – | – |" in body
    assert "| en | 5 | +0.250 |" in body and "| openlanguagedata/flores_plus | abc | cc-by-sa-4.0 |" in body
    assert "| gettext:polars | – | MIT" in body and "no git repository" in body


def test_one_hookpoint_is_written_to_a_folder_to_look_at(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["push", "me/saes", "layers.2.mlp", "--folder", "out"])
    assert capsys.readouterr().out == "out\n"
    written = {path.relative_to(repo / "out").as_posix() for path in (repo / "out").rglob("*") if path.is_file()}
    assert written == {"README.md", "features.csv", "layers.2.mlp/cfg.json",
                       "layers.2.mlp/sae_weights.safetensors"}  # fmt: skip
    assert (repo / "out/features.csv").read_text() == "kind,hookpoint,unit,language\nsae,layers.2.mlp,4,en\n"
    assert "No licence was stated" in (repo / "out/README.md").read_text()


def test_sae_lens_is_named_what_it_loads(repo: Path) -> None:
    """The card names `from_pretrained(release, sae_id)` of a repository, which reads `<sae_id>/cfg.json`."""
    text = card.build("me/saes", NAMES, None, config.load(), Paths())
    assert text.index("library_name: saelens") < text.index("# saes: sparse autoencoders")


def test_a_hub_model_is_named_as_the_base(repo: Path) -> None:
    params = config.load()
    model = params.model.model_copy(update={"source": "huggingface", "name": "google/gemma-3-270m"})
    text = card.build("me/saes", NAMES, None, params.model_copy(update={"model": model}), Paths())
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "google/gemma-3-270m"
    Path("google/gemma-3-270m").mkdir(parents=True)  # a folder of this name is what the stages load
    text = card.build("me/saes", NAMES, None, params.model_copy(update={"model": model}), Paths())
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])


def test_what_the_hub_refuses_is_one_message(hub: Hub, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, paths = config.load(), Paths()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"me/saes: the hub refuses \(.*401.*`hf auth login`"):
        push.main("me/saes", [], False, None, None)
    assert hub.repos == {}
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push.main("me/saes", [], False, None, None)
    with pytest.raises(UserError, match="layers.9.mlp: no such SAE in data/sae; allowed: layers.1.mlp, layers.2.mlp"):
        push.check(["layers.9.mlp"], params, paths)
    text = Path("params.yaml").read_text().replace('"source": "stored"', '"source": "pretrained"')
    Path("params.yaml").write_text(text.replace('"pretrained": {"name": null', '"pretrained": {"name": "me/released"'))
    with pytest.raises(UserError, match="train.source: the SAEs are a copy of me/released"):
        push.main("me/saes", [], False, None, None)
