"""No pickle and no foreign code is run, nothing is written outside, no secret is told."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import test_sae_training as training
import torch
import transformers
from closure import ROOT
from safetensors.torch import save_file

from babelscope import config
from babelscope.config import Dataset, Model
from babelscope.corpus import hub, text_files
from babelscope.errors import UserError, without_secrets
from babelscope.files import read_part, read_table
from babelscope.models import loading
from babelscope.sae import checkpoint


class Planted:
    """Whoever unpickles this makes a file `opened` in the working folder."""

    def __reduce__(self):
        return os.system, ("touch opened",)


@pytest.fixture(autouse=True)
def trap(tmp_path, monkeypatch):
    """Fails a test in which something planted has run."""
    monkeypatch.chdir(tmp_path)
    yield
    if (tmp_path / "may-run").exists():
        return
    assert not (tmp_path / "opened").exists(), "foreign code was run"


def planted(path: Path, *, as_torch: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if as_torch:
        torch.save({"module": Planted(), "weight": Planted()}, path)
    else:
        path.write_bytes(pickle.dumps(Planted()))
    return path


def test_the_trap_works(tmp_path):
    pickle.loads(planted(tmp_path / "x").read_bytes())
    assert (tmp_path / "opened").exists()
    (tmp_path / "opened").unlink()


@pytest.mark.parametrize("as_torch", [False, True])
def test_a_pickle_for_a_checkpoint(tmp_path, as_torch):
    planted(tmp_path / "state.pt", as_torch=as_torch)
    *_, sae = training.run(tmp_path)
    assert sae.latents == training.SETTINGS.latents  # trained from the start


@pytest.mark.parametrize("name", ["ae.pt", "params.npz", "sae_weights.safetensors", "sae.safetensors", "cfg.json"])
@pytest.mark.parametrize("as_torch", [False, True])
def test_a_pickle_for_an_sae(tmp_path, name, as_torch):
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    save_file({"W_enc": torch.ones(2, 4)}, tmp_path / "sae_weights.safetensors") if name == "cfg.json" else None
    planted(tmp_path / name, as_torch=as_torch)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("as_torch", [False, True])
def test_a_pickle_for_a_table_or_a_part(tmp_path, as_torch):
    for name in ("texts.parquet", "en.parquet"):
        planted(tmp_path / "corpus" / name, as_torch=as_torch)
    with pytest.raises(UserError, match="texts.parquet"):
        read_table(tmp_path / "corpus" / "texts.parquet")
    with pytest.raises(UserError, match="parquet"):
        section = config.load(ROOT / "params.yaml").corpus.model_copy(update={"path": str(tmp_path / "corpus")})
        text_files.read(section, ["en"])
    assert read_part(planted(tmp_path / "from-000000.safetensors", as_torch=as_torch)) is None


MODEL = Model(
    source="huggingface", name="model", gguf_file=None, revision=None, quantization=None, trust_remote_code=False
)
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 8,
    "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize("as_torch", [False, True])
def test_a_pickle_for_the_weights_of_a_model(tmp_path, as_torch):
    planted(tmp_path / "model" / "pytorch_model.bin", as_torch=as_torch)
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(
        UserError, match="model.name: cannot load the weights of 'model': a pickle of more than tensors"
    ):
        loading.load_model(MODEL, "float32")


CODE = """
import os
os.system("touch opened")
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "foreign"
class Net(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A model whose class comes with it."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "model"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).save_pretrained(folder)
    auto = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Net"}
    described = json.loads((folder / "config.json").read_text()) | {"model_type": "foreign", "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "foreign.py").write_text(CODE)
    return folder


@pytest.mark.parametrize("load", [loading.load_skeleton, lambda section: loading.load_model(section, "float32")])
def test_code_that_comes_with_a_model_is_run_only_where_the_user_says_so(tmp_path, foreign, load):
    with pytest.raises(UserError, match="trust_remote_code"):
        load(MODEL)
    assert not (tmp_path / "opened").exists()
    (tmp_path / "may-run").touch()
    load(MODEL.model_copy(update={"trust_remote_code": True}))
    assert (tmp_path / "opened").exists()


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "foreign.py").write_text(CODE)
    described = {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["foreign.Foreign", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="model.trust_remote_code: 'model' comes with code"):
        loading.load_tokenizer(MODEL)


def test_code_that_comes_with_a_data_set_is_not_run(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "texts.py").write_text(CODE)
    planted(folder / "train.pkl")
    section = Dataset(path=str(folder), splits=["train"], text=["text"], language="language")
    with pytest.raises(UserError, match="params.yaml: corpus.datasets: "):
        hub.read([section], ["en"])


def test_no_module_of_ours_opens_pickles_or_builds_commands_for_a_shell():
    text = {path: path.read_text() for folder in ("src", "stages") for path in (ROOT / folder).rglob("*.py")}
    for word in (
        "pickle.load",
        "allow_pickle=True",
        "weights_only=False",
        "shell=True",
        "os.system(",
        "eval(",
        "exec(",
    ):
        found = [str(path) for path, code in text.items() if word in code.replace(".eval(", "")]
        assert not found, word
    loads = [line for code in text.values() for line in code.splitlines() if "torch.load(" in line]
    assert loads and all("weights_only=True" in line for line in loads)


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


def test_secrets_are_taken_out_of_text(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-12345678")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")
    told = without_secrets(
        "Bearer hf_abcdefgh sk-12345678 http://me:hunter22@host:5000/api postgresql://u:p%40x@db/m hunter22"
    )
    assert (
        told == "Bearer <HF_TOKEN> <OPENAI_API_KEY> http://host:5000/api postgresql://db/m <MLFLOW_TRACKING_PASSWORD>"
    )
    assert without_secrets("no secret: https://example.org/a@b") == "no secret: https://example.org/a@b"


@pytest.mark.parametrize("how", ["raise UserError(text)", "logging.getLogger('x').warning(text)"])
def test_a_stage_tells_no_secret(tmp_path, how):
    program = (
        "import logging\nfrom babelscope import stage\nfrom babelscope.errors import UserError\n"
        f"text = 'GET http://me:hunter22@host failed with sk-12345678'\ndef main():\n    {how}\nstage.run(main)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OPENAI_API_KEY": "sk-12345678"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "GET http://host failed with <OPENAI_API_KEY>" in done.stderr
