"""params.yaml: bad input gives one clear message that names the key; good input keeps its meaning."""

import copy
import json
import re
import runpy

import pytest
from closure import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from babelscope import config
from babelscope.config.values import local_name
from babelscope.core.errors import UserError

DEFAULT = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())


def changed(key, value):
    content = copy.deepcopy(DEFAULT)
    place = content
    *path, last = key.split(".")
    for part in path:
        place = place[part]
    place[last] = value
    return content


def test_the_default_is_valid_and_nothing_is_converted_silently():
    params = config.parse(copy.deepcopy(DEFAULT))
    assert params.model_dump() == DEFAULT


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.k", "32", "train.k: input should be a valid integer, got '32'"),
        ("train.k", True, "train.k: input should be a valid integer, got True"),
        ("train.k", 9999, "train.k: 9999 active latents of only 1152"),
        ("train.kk", 3, "train.kk: unknown key; allowed: .*did you mean 'k'"),
        ("train.learning_rate", 0, "train.learning_rate: input should be greater than 0"),
        ("train.activation", "gelu", "train.activation: input should be 'topk', 'batchtopk', 'jumprelu' or 'relu'"),
        ("train.matryoshka", [64, 64], "train.matryoshka: expected ascending widths below 1152"),
        ("train.matryoshka", [9999], "train.matryoshka: expected ascending widths below 1152"),
        (
            "train.transcode",
            True,
            "ablate.methods: 'feature' needs SAEs that read .* allowed with them: directional",
        ),
        ("ablate.methods", ["feature", "feature"], "ablate.methods: a method is listed twice"),
        ("steer.strengths", [], "steer.strengths: list should have at least 1 item"),
        ("extract.dtype", "int8", "extract.dtype: input should be 'float32', 'bfloat16' or 'float16', got 'int8'"),
        ("hardware.strategy", "deepspeed", "hardware.strategy: 'deepspeed'; allowed: auto, ddp, fsdp"),
        ("hardware.strategy", "ddp_spawn", "hardware.strategy: 'ddp_spawn'; allowed: auto, ddp, fsdp"),
        ("score.ratio", 1.5, "score.ratio: input should be less than or equal to 1"),
        (
            "stability.hookpoints",
            ["layers.14.post_feedforward_layernorn"],
            "stability.hookpoints: 'layers.14.post_feedforward_layernorn' is not one of hookpoints; .*did you",
        ),
        (
            "stability.hookpoints",
            ["layers.14.post_feedforward_layernorm"] * 2,
            "stability.hookpoints: 'layers.14.post_feedforward_layernorm' is listed twice",
        ),
        ("stability.seeds", [7, 0], "stability.seeds: 0 is also the seed of the first training; choose another"),
        ("stability.seeds", [7, 7], "stability.seeds: a seed is listed twice"),
        ("stability.seeds", [], "stability.seeds: "),
        ("stability.cosine", 1.5, "stability.cosine: input should be less than or equal to 1"),
        (
            "train.source",
            "stream",
            r"stability.hookpoints: .* train.source 'stream' stores none; .* an empty list, \[\]",
        ),
        ("sharing.groups", -1, "sharing.groups: input should be greater than or equal to 0"),
        ("switching.groups", 1.5, "switching.groups: input should be a valid integer"),
        ("score.members", 99, "score.members: 99 of only 15 languages"),
        ("score.max_entropy", -0.5, "score.max_entropy: input should be greater than or equal to 0"),
        ("languages", [], "languages: the list is empty"),
        ("languages", ["en", "en"], "languages: 'en' is listed twice"),
        ("languages", ["en", "../x"], r"languages: '../x' is not a language code"),
        ("languages", ["en", False], "languages.1: input should be a valid string, got False"),
        (
            "hookpoints",
            ["layers.5.post_feedforward_layernorm", "layers.5.post_feedforward_layernorm"],
            "hookpoints: 'layers.5.post_feedforward_layernorm' is listed twice",
        ),
        ("hookpoints", ["../../etc"], "hookpoints: '../../etc' is not a path"),
        ("neurons.hookpoints", ["a b"], "neurons.hookpoints: 'a b' is not a path"),
        ("neurons.hookpoints", ["h.1.mlp.act", "h.1.mlp.act"], "neurons.hookpoints: 'h.1.mlp.act' is listed twice"),
        (
            "neurons.hookpoints",
            ["layers.5.post_feedforward_layernorm"],
            "neurons.hookpoints: 'layers.5.post_feedforward_layernorm' is also one of hookpoints",
        ),
        ("neurons.top_rate", 2.0, "neurons.top_rate: input should be less than or equal to 1"),
        ("ablate.methods", ["neuron"], "ablate.methods: 'neuron' sets neurons to 0, but neurons.hookpoints is empty"),
        ("corpus.packages", ["gramps", "gramps"], "corpus.packages: a package is listed twice"),
        ("corpus.path", "x", "corpus.packages: the source 'gettext' needs either"),
        ("seed", -1, "seed: input should be greater than or equal to 0"),
        ("traim", {}, r"traim: unknown key; nearest: train\b"),
        ("steer.prompt_languages", ["nl"], "steer.prompt_languages: 'nl' is not one of languages; allowed: en, de"),
        ("hardware.devices", 3, "train.batch: 1024 does not divide among 3 devices .* a multiple of 3"),
        ("hardware.num_nodes", 5, "train.batch: 1024 does not divide among 5 devices"),
        ("train.checkpoint_seconds", 30, "train.checkpoint_seconds: unknown key"),
        ("train", None, "train: input should be a valid dictionary or instance of Train, got None"),
    ],
)
def test_every_mistake_names_its_key(key, value, message):
    with pytest.raises(UserError, match=rf"^params.yaml: {message}"):
        config.parse(changed(key, value))


def test_without_a_second_training_its_seed_and_the_source_are_free():
    content = changed("stability.hookpoints", [])
    content["stability"]["seeds"] = [content["seed"]]
    content["train"]["source"] = "stream"
    assert config.parse(content).stability.hookpoints == []


@pytest.mark.parametrize(
    ("key", "value", "others", "message"),
    [
        ("identify.also", "texts/of/mine", {}, "identify.also: no folder 'texts/of/mine'"),
        ("identify.also", {"path": "./mine", "splits": ["a"], "text": ["t"], "language": "l"}, {},
         "identify.also.path: no folder './mine'"),
        ("pretrained.name", "~/no/saes", {"train.source": "pretrained", "stability.hookpoints": []},
         "pretrained.name: no folder '~/no/saes'"),
    ],
)  # fmt: skip
def test_a_folder_that_a_late_stage_reads_is_looked_for_by_the_first(
    key, value, others, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    content = changed(key, value)
    for other, setting in others.items():
        section, _, name = other.partition(".")
        content[section][name] = setting
    (tmp_path / "params.yaml").write_text(json.dumps(content))  # which is YAML, too
    monkeypatch.setattr("sys.argv", ["train", content["hookpoints"][0]])
    for stage in ("sample", "extract", "stream", "train"):
        with pytest.raises(UserError, match=rf"^params.yaml: {message}"):
            runpy.run_path(str(ROOT / f"stages/{stage}.py"))["main"]()


def test_a_folder_is_called_by_its_last_part_and_a_hub_id_by_all_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/tiny").mkdir(parents=True)
    for name in (str(tmp_path / "models/tiny"), "models/tiny", "./models/tiny", "/gone/by/now/tiny", "~/no/such/tiny"):
        assert local_name(name) == "tiny"
    assert local_name("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"


def test_names_of_the_hub_and_what_is_not_read_are_no_folders():
    for key, value in (("identify.also", {"name": "wili-2018"}), ("pretrained.name", "./not/read")):
        config.check_folders(config.parse(changed(key, value)))
    content = changed("train.source", "pretrained")
    content["pretrained"]["name"], content["stability"]["hookpoints"] = "owner/saes", []
    config.check_folders(config.parse(content))


def test_int8_is_for_stored_activations():
    content = changed("train.source", "stream")
    content["stability"]["hookpoints"] = []
    content["extract"]["store_dtype"] = "int8"
    with pytest.raises(UserError, match=r"^params.yaml: extract.store_dtype: 'int8' .*'stream' .* float16, bfloat16"):
        config.parse(content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.source", "stream", r"corpus.train_languages: train.source 'stream' .*; allowed with it: null"),
        (
            "baselines.dictionaries",
            ["neurons"],
            r"baselines.dictionaries: 'neurons' .*: frozen_decoder, frozen_encoder",
        ),
        ("corpus.train_languages", [], "corpus.train_languages: "),
    ],
)
def test_languages_that_train_need_stored_activations(key, value, message):
    content = changed("corpus.train_languages", ["en", "de"])
    config.parse(content)
    section, _, name = key.partition(".")
    content[section][name] = value
    content["stability"]["hookpoints"] = [] if value == "stream" else content["stability"]["hookpoints"]
    with pytest.raises(UserError, match=f"^params.yaml: {message}"):
        config.parse(content)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ablate.rank_tokens": 60, "ablate.methods": ["mean", "swap"]},
         "ablate.rank_tokens: 60 tokens rank .* 'feature', which is not one of ablate.methods; allowed without it: 0"),
        ({"baselines.ablation_tokens": 60, "stability.hookpoints": []},
         "baselines.ablation_tokens: .* stability.hookpoints is empty; allowed with it: 0"),
        ({"script.ablation_tokens": 60, "script.tokens": 0},
         "script.ablation_tokens: 60, but with script.tokens 0 the stage measures nothing; set"),
    ],
)  # fmt: skip
def test_tokens_that_nothing_would_be_measured_on_are_refused(values, message):
    content = changed("seed", 0)
    for key, value in values.items():
        section, _, name = key.partition(".")
        content[section][name] = value
    with pytest.raises(UserError, match=rf"^params.yaml: {message}"):
        config.parse(content)
    (section, _, name), _ = (key.partition(".") for key in values)
    content[section][name] = 0
    config.parse(content)


def test_several_mistakes_are_told_at_once():
    content = changed("train.k", None)
    del content["seed"]
    with pytest.raises(UserError) as error:
        config.parse(content)
    assert "seed: the key is missing" in str(error.value) and "train.k" in str(error.value)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([f"{s}.{k}" for s, v in DEFAULT.items() if isinstance(v, dict) for k in v] + list(DEFAULT)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_is_accepted_or_refused_with_its_key(key, value):
    try:
        config.parse(changed(key, value))
    except UserError as error:
        # Keys that contradict one another are refused at one of them, and the other is named.
        assert f"params.yaml: {key.split('.')[0]}" in str(error) or "corpus" in str(error) or key in str(error)


def test_yaml_1_2(tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("- de\n", "- no\n")
    text = re.sub(r"  learning_rate: [\d.]+\n", "  learning_rate: 1e-3\n", text)
    (tmp_path / "params.yaml").write_text(text)
    params = config.load(tmp_path / "params.yaml")
    assert params.languages[1] == "no" and params.train.learning_rate == 0.001


@pytest.mark.parametrize("text", ["a: [1", "- a", "", "a: 1\na: 2", "\x00"])
def test_what_is_no_params_file_is_refused(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=r"params\.yaml"):
        config.load(tmp_path / "params.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="params.yaml: no such file"):
        config.load(tmp_path / "params.yaml")


def test_a_stage_is_told_which_hookpoints_there_are():
    path, hookpoint = ROOT / "params.yaml", "layers.5.post_feedforward_layernorm"
    assert config.load_at_hookpoint(["train.py", hookpoint], path) == (config.load(path), hookpoint)
    for wrong in (["train.py"], ["train.py", "layers.7.mlp"]):
        with pytest.raises(UserError, match=rf"one of params.yaml's hookpoints: {hookpoint}, "):
            config.load_at_hookpoint(wrong, path)
    hookpoint = "layers.14.post_feedforward_layernorm"
    assert config.load_at_seed(["retrain.py", hookpoint, "1000"], path) == (config.load(path), hookpoint, 1000)
    for wrong in (["retrain.py", hookpoint], ["retrain.py", hookpoint, "1"], ["retrain.py", hookpoint, "1000", "2"]):
        with pytest.raises(UserError, match=r"HOOKPOINT SEED, one of params.yaml's stability.seeds: 1000"):
            config.load_at_seed(wrong, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", {**DEFAULT["model"], "source": "huggingface", "name": "my/data", "gguf_file": None}),
        ("corpus.path", "my/data"),
        ("corpus.datasets", [{"name": "xnli"}, {"name": "xnli", "path": "my/data"}]),
        ("identify.also", "my/data"),
        ("identify.also", {"name": "wili-2018", "path": "my/data"}),
        ("pretrained.name", "my/data"),
    ],
)
def test_what_a_temporary_copy_of_the_repository_lacks_is_named(tmp_path, monkeypatch, key, value):
    main, copy_ = tmp_path / "main", tmp_path / "main/.dvc/tmp/exps/x"
    (main / "my/data").mkdir(parents=True)
    copy_.mkdir(parents=True)
    content = changed(key, value) if "." in key else {**DEFAULT, key: value}
    if key == "corpus.path":
        content["corpus"]["source"] = "files"
    for folder in (main, copy_):
        (folder / "params.yaml").write_text(json.dumps(content))
    monkeypatch.setenv("DVC_ROOT", str(main))
    assert config.load(main / "params.yaml") == config.parse(content)
    with pytest.raises(UserError) as raised:
        config.load(copy_ / "params.yaml")
    assert "'my/data' is missing in the temporary copy" in str(raised.value) and key in str(raised.value)
    assert f"Write the absolute path, {main / 'my/data'}; or track it" in str(raised.value)
    (copy_ / "my/data").mkdir(parents=True)
    assert config.load(copy_ / "params.yaml") == config.parse(content)


def test_a_home_of_nobody_is_a_folder_that_does_not_exist():
    content = copy.deepcopy(DEFAULT) | {"identify": {**DEFAULT["identify"], "also": "~nobody-of-this-name/texts"}}
    with pytest.raises(UserError, match="identify.also: no folder '~nobody-of-this-name/texts'"):
        config.check_folders(config.parse(content))
