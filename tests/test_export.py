"""`babelscope export`: what is written where, what is refused, and what the tools themselves make of it."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import stand_ins
import torch
import transformers
import yaml
from closure import ROOT
from peers import in_its_environment
from safetensors.torch import load_file

from babelscope import cli, config
from babelscope.bridges import circuit_tracer, lm_eval, sparsify
from babelscope.core.errors import UserError
from babelscope.models import hookpoints
from babelscope.sae.autoencoder import SAE
from babelscope.sae.checkpoint import load, save
from babelscope.steering import vectors


def example(k: int | None = 3) -> SAE:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape, generator=draw) for shape in ((12, 5), (12, 5), (12,), (5,))]
    return SAE(*weights, k, threshold=None if k else torch.rand(12, generator=draw))


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("layers.1.mlp", "layers.2.mlp"):
        save(example(), Path("data/sae") / name, {"model_name": "m", "hook_name": name})
    return tmp_path


def test_every_sae_or_those_named_are_exported_and_load_to_the_same(repo: Path) -> None:
    sparsify.main(Path("out"), [])
    sparsify.main(Path("some"), ["layers.2.mlp"])
    assert {path.name for path in (repo / "out").iterdir()} == {"layers.1.mlp", "layers.2.mlp"}
    assert {path.name for path in (repo / "some").iterdir()} == {"layers.2.mlp"}
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(load(repo / "out", "layers.1.mlp")(x), example()(x), rtol=0, atol=1e-6)


def test_where_there_is_nothing_to_export_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data/sae: no SAEs; `dvc repro` trains them"):
        sparsify.main(Path("out"), [])


def test_an_unknown_hookpoint_and_a_threshold_are_refused(repo: Path) -> None:
    with pytest.raises(UserError, match="data/sae/layers.3.mlp: no such folder; allowed: layers.1.mlp, layers.2.mlp"):
        sparsify.main(Path("out"), ["layers.3.mlp"])
    save(example(None), Path("data/sae/layers.1.mlp"), {"model_name": "m", "hook_name": "h"})
    with pytest.raises(UserError, match="layers.1.mlp: sparsify has no JumpReLU, BatchTopK or ReLU SAEs"):
        sparsify.main(Path("out"), ["layers.1.mlp"])


def transcoder(k: int | None, seed: int = 0) -> SAE:
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.randn(*shape, generator=draw) for shape in ((64, 16), (64, 16), (64,), (16,))]
    threshold = None if k else torch.rand(64, generator=draw)
    b_in, skip = torch.randn(16, generator=draw), torch.randn(16, 16, generator=draw)
    return SAE(*weights, k, threshold=threshold, b_in=b_in, W_skip=skip)


def set_of(hookpoints: list[str], k: int | None) -> None:
    for number, name in enumerate(hookpoints):
        save(transcoder(k, number), Path("data/sae") / name, {"model_name": "m", "hook_name": name})


@pytest.fixture
def tracer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    content = config.read_yaml(ROOT / "params.yaml")
    content["model"]["name"] = "me/tiny"
    (tmp_path / "params.yaml").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("k", [4, None])
def test_transcoders_are_a_set_of_circuit_tracer_and_load_to_the_same(tracer: Path, k: int | None) -> None:
    names = ["layers.0.post_feedforward_layernorm", "layers.1.post_feedforward_layernorm"]
    set_of(names, k)
    cli.main(["export", "exported", "--format", "circuit-tracer"])
    settings = yaml.safe_load((tracer / "exported/config.yaml").read_text())
    assert settings == {
        "model_kind": "transcoder_set", "model_name": "me/tiny", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    } | ({"activation": "topk"} if k else {})  # fmt: skip
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    for number in range(2):
        mine, again = transcoder(k, number), load(tracer / "exported", f"layer_{number}.safetensors")
        assert again.k == k and again.is_transcoder
        torch.testing.assert_close(again(x), mine(x), rtol=1e-5, atol=1e-4)


def test_what_circuit_tracer_cannot_hold_is_refused(tracer: Path, repo: Path) -> None:
    with pytest.raises(UserError, match=r"every block from 0 on, of the MLP .* these are: layers.1.mlp, layers.2.mlp"):
        circuit_tracer.main(Path("out"), [])
    for others in (["layers.0.mlp", "layers.1.post_feedforward_layernorm"], ["layers.0"]):
        set_of(others, 4)
        with pytest.raises(UserError, match="one transcoder of every block from 0 on"):
            circuit_tracer.main(Path("out"), others)
    save(example(), Path("data/sae/layers.0.mlp"), {"model_name": "m", "hook_name": "h"})
    with pytest.raises(UserError, match="layers.0.mlp: no transcoder with d_in = d; circuit-tracer needs `tr"):
        circuit_tracer.main(Path("out"), ["layers.0.mlp"])
    assert not (tracer / "out").exists()


VECTORS = {"diffmean": {"layers.1": ("de", "fr")}, "features": {"layers.1.post_feedforward_layernorm": ("de",)},
           "neurons": {"layers.1.mlp.down_proj.input": ("de",)}}  # fmt: skip


def write_vectors(folder: Path, d: int) -> vectors.Vectors:
    """What `steer` writes, with vectors that are not of length 1."""
    draw = torch.Generator().manual_seed(3)
    found = {method: {place: {language: 3 * torch.randn(d, generator=draw) for language in languages}
                      for place, languages in places.items()} for method, places in VECTORS.items()}  # fmt: skip
    vectors.write(folder, found)
    settings = {method: {language: {"hookpoint": place, "strength": 1.5} for place, languages in places.items()
                         for language in languages} for method, places in VECTORS.items()}  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    return found


def test_a_file_per_language_says_what_lm_eval_adds_and_takes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="settings.json"):
        lm_eval.main(Path("steered"), [])
    found = write_vectors(Path("data/vectors"), 6)
    cli.main(["export", "steered", "--format", "lm-eval"])
    files = {str(path.relative_to("steered")) for path in Path("steered").rglob("*.pt")}
    kinds = ("amplified", "removed")
    assert files == {f"{one}.{kind}.pt" for one in ("diffmean/de", "diffmean/fr", "features/de") for kind in kinds}
    assert "layers.1.mlp.down_proj.input: lm-eval cannot change the input of a module, so neurons" in caplog.text
    for kind, coefficient in (("amplified", 1.5), ("removed", -1.0)):
        content = torch.load(f"steered/diffmean/fr.{kind}.pt", weights_only=True)
        [(place, entry)] = content.items()
        assert place == "layers.1" and entry.pop("steering_vector").equal(found["diffmean"]["layers.1"]["fr"])
        assert entry == {"steering_coefficient": coefficient, "action": "add", "bias": None, "head_index": None}
    before = {path: path.read_bytes() for path in Path("steered").rglob("*.pt")}
    lm_eval.main(Path("again"), [])
    assert all(Path("again", *path.parts[1:]).read_bytes() == content for path, content in before.items())
    with pytest.raises(UserError, match="lm-eval: `steer` chooses the hookpoint of each vector"):
        lm_eval.main(Path("steered"), ["layers.1"])


# The model's logits with each file, and an accuracy that lm-eval's own evaluation of a task of several choices gives.
LM_EVAL_SIDE = """
import json, sys
from pathlib import Path
import lm_eval, torch
from lm_eval.models.hf_steered import SteeredModel
from safetensors.torch import save_file

folder, ids = Path(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
results = {}
for name in ("diffmean/de.amplified", "diffmean/fr.removed", "features/de.removed"):
    path = folder / "steered" / f"{name}.pt"
    model = SteeredModel(str(folder / "model"), str(path), device="cpu", dtype="float32", batch_size=1)
    with torch.no_grad():
        results[name] = model._model_call(ids).contiguous()
files = {"data_files": {"test": str(folder / "task.jsonl")}}
task = {"task": "choices", "dataset_path": "json", "dataset_kwargs": files,
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}
found = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
results["acc"] = torch.tensor(found["results"]["choices"]["acc,none"], dtype=torch.float32)
save_file(results, folder / "results.safetensors")
"""


def test_lm_eval_steers_as_the_stage_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stand_ins.model(tmp_path / "model", "gemma3", 3)
    found = write_vectors(Path("data/vectors"), 32)
    lm_eval.main(Path("steered"), [])
    questions = [{"question": stand_ins.text("en", n), "choices": [stand_ins.text(name, n) for name in ("en", "de")],
                  "answer": n % 2} for n in range(6)]  # fmt: skip
    Path("task.jsonl").write_text("\n".join(map(json.dumps, questions)))
    ids = [[2, 11, 12, 13, 14, 15, 16, 17]]
    results = in_its_environment("lm-eval", LM_EVAL_SIDE, tmp_path, ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for file, logits in results.items():
        if file == "acc":
            assert 0 <= float(logits) <= 1
            continue
        method, language, kind = re.fullmatch(r"(\w+)/(\w+)\.(\w+)", file).groups()  # type: ignore[union-attr]
        [place] = VECTORS[method]
        vector = (1.5 if kind == "amplified" else -1) * found[method][place][language]
        with torch.no_grad(), hookpoints.editing(model, {place: partial(torch.add, vector)}):
            expected = model(input_ids=torch.tensor(ids)).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(results) == 4


# Version 0.5.0 has the activation TopK, but reads no TopK files: its classes are given the tensors.
TRACER_SIDE = """
import json, os, sys
from pathlib import Path
import torch
from circuit_tracer.transcoder.activation_functions import TopK
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from safetensors.torch import load_file, save_file
import yaml

folder, x, results = Path(sys.argv[1]), None, {}
x = load_file(folder / "x.safetensors")["16"]
os.environ["CIRCUIT_TRACER_CACHE_DIR"] = str(folder)
traced, settings = load_transcoder_from_hub("jumprelu", device=torch.device("cpu"))
assert traced.feature_input_hook == "mlp.hook_in" and traced.feature_output_hook == "mlp.hook_out"
layers = {}
for number in range(2):
    tensors = load_file(folder / f"topk/layer_{number}.safetensors")
    k = int(tensors.pop("k"))
    layers[number] = SingleLayerTranscoder(16, 64, TopK(k), number, skip_connection=True, dtype=torch.float32)
    layers[number].load_state_dict(tensors)
try:
    load_transcoder_from_hub("topk", device=torch.device("cpu"))
except RuntimeError as error:  # loudly, since without TopK the numbers would be others
    assert '"k"' in str(error)
made = yaml.safe_load((folder / "topk/config.yaml").read_text())
assert made["activation"] == "topk"
topk = TranscoderSet(layers, made["feature_input_hook"], made["feature_output_hook"])
with torch.no_grad():
    for name, transcoders in (("jumprelu", traced), ("topk", topk)):
        for number, transcoder in enumerate(transcoders):
            results[f"{name}.{number}.z"] = transcoder.encode(x)
            results[f"{name}.{number}.y"] = transcoder(x)
save_file(results, folder / "results.safetensors")
"""


def test_circuit_tracer_loads_a_set(tracer: Path) -> None:
    for name, k in (("jumprelu", None), ("topk", 4)):
        set_of(["layers.0.mlp", "layers.1.mlp"], k)
        circuit_tracer.main(tracer / name, [])
    results = in_its_environment("circuit-tracer", TRACER_SIDE, tracer, None)
    x = load_file(tracer / "x.safetensors")["16"]
    for name, k in (("jumprelu", None), ("topk", 4)):
        for number in range(2):
            mine = transcoder(k, number)
            values, indices = mine.encode(x)
            found = results[f"{name}.{number}.z"]
            dense = torch.zeros_like(found).scatter_add(1, indices, values)
            for ours, theirs in ((dense, found), (mine(x), results[f"{name}.{number}.y"])):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


# The page's lines run with a tiny model in place of the hub's, and with texts of the stand-ins in place of Europarl.
SAEBENCH_SIDE = """
import json, os, sys
from pathlib import Path
os.environ["JAXTYPING_DISABLE"] = "1"  # SAEBench's annotations do not hold in the jaxtyping of today
import torch
import sae_bench.evals.sparse_probing.main as probing
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

folder, (lines, texts) = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.manual_seed(0)
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
sizes = HookedTransformerConfig(n_layers=15, d_model=16, n_ctx=128, d_head=8, n_heads=2, d_mlp=64, act_fn="relu",
                                initializer_range=0.5,
                                d_vocab=len(tokenizer), device="cpu")
model = HookedTransformer(sizes, tokenizer=tokenizer)
probing.HookedTransformer.from_pretrained_no_processing = lambda *_, **__: model
split = lambda first, last: {language: rows[first:last] for language, rows in texts.items()}
probing.dataset_utils.get_multi_label_train_test_data = lambda *_: (split(0, 40), split(40, 60))
exec(lines)
[path] = (folder / "saebench").glob("*.json")
metrics = json.loads(path.read_text())["eval_result_metrics"]
figures = {**{f"llm.{k}": v for k, v in metrics["llm"].items()}, **{f"sae.{k}": v for k, v in metrics["sae"].items()}}
save_file({name: torch.tensor(value) for name, value in figures.items() if value is not None},
          folder / "results.safetensors")
"""


def test_the_lines_of_the_page_run_saebench_on_our_saes(tmp_path: Path) -> None:
    page = (ROOT / "docs/bridges.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    stand_ins.model(tmp_path / "model", "gemma3", 1)
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(64, 16, generator=draw))
    name = "layers.14.post_feedforward_layernorm"
    save(SAE(rows, rows, torch.zeros(64), torch.zeros(16), 8), tmp_path / "data/sae" / name,
         {"model_name": "tiny", "hook_name": name})  # fmt: skip
    # Dutch is not among the languages of the stand-ins.
    texts = {
        language: [stand_ins.text(known, n) for n in range(60)]
        for language, known in zip(("en", "fr", "de", "es", "nl"), ("en", "fr", "de", "es", "tr"), strict=True)
    }
    results = in_its_environment("sae-bench", SAEBENCH_SIDE, tmp_path, [lines, texts])
    found = {name: float(value) for name, value in results.items()}
    assert {"sae.sae_top_1_test_accuracy", "sae.sae_top_2_test_accuracy", "sae.sae_top_5_test_accuracy"} < found.keys()
    assert all(0 <= value <= 1 for value in found.values())
    assert found["llm.llm_test_accuracy"] > 0.6 < found["sae.sae_top_5_test_accuracy"]  # chance: 0.5
