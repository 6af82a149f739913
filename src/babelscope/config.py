"""`params.yaml` as typed, validated models: one class per section, every knob documented in `params.yaml` itself."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from babelscope.errors import UserError, nearest

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(min_length=1)]


_HOOKPOINT = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")


def _checked(names: list[str], form: re.Pattern[str]) -> list[str]:
    for name in names:
        if not form.fullmatch(name):
            raise ValueError(f"{name!r} does not have the form {form.pattern}")
        if names.count(name) > 1:
            raise ValueError(f"{name!r} stands twice")
    return names


class Section(pydantic.BaseModel):
    """A section of params.yaml: no unknown keys, no silent conversions, immutable."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    """Which causal language model, and how it is loaded."""

    source: Literal["package", "huggingface"]
    name: Name
    gguf_file: str | None
    revision: str | None
    quantization: Literal["8bit", "4bit"] | None
    trust_remote_code: bool


class Dataset(Section):
    """A data set in the Hugging Face hub's format: a ready-made entry of `corpus.hub`, or one that is spelled out."""

    name: Literal["flores-plus", "xnli", "paws-x", "wili-2018", "wikipedia", "fineweb-2", "tatoeba"] | None = None
    path: Name | None = None
    revision: Name | None = None
    subset: Name | None = None
    splits: Annotated[list[Name], Field(min_length=1)] | None = None
    text: Annotated[list[Name], Field(min_length=1)] | None = None
    language: Name | None = None
    group: Name | None = None
    rows: Positive | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Dataset":
        if self.name is None:
            for key in ("path", "splits", "text"):
                if getattr(self, key) is None:
                    raise ValueError(f"{key} is missing; needed where no ready-made 'name' is given")
            if self.language is None and "{language}" not in (self.subset or ""):
                raise ValueError("language is missing: the column that holds it, or '{language}' in subset")
        return self


class Corpus(Section):
    """Where the texts come from and how many of them are taken."""

    source: Literal["gettext", "files", "huggingface"]
    datasets: list[Dataset]
    package: str | None
    path: str | None
    domain: str | None
    source_language: str
    lid: Share | None
    min_characters: Positive
    max_tokens: Annotated[int, Field(ge=2)]
    train_tokens: Positive
    eval_tokens: Positive

    @model_validator(mode="after")
    def _one_place(self) -> "Corpus":
        if self.source == "files" and self.path is None:
            raise ValueError("corpus.path: the source 'files' needs a folder")
        if self.source == "huggingface" and not self.datasets:
            raise ValueError("corpus.datasets: the source 'huggingface' needs at least one, such as '- name: xnli'")
        if self.source == "gettext" and (self.package is None) == (self.path is None):
            raise ValueError("corpus.package: the source 'gettext' needs either 'package' or 'path', the other null")
        return self


class Extract(Section):
    """The forward pass whose activations are stored."""

    dtype: Literal["float32", "bfloat16", "float16"]
    store_dtype: Literal["float16", "bfloat16", "int8"]
    batch_tokens: Positive


class Train(Section):
    """One SAE per hookpoint."""

    source: Literal["stored", "stream", "pretrained"]
    activation: Literal["topk", "batchtopk", "jumprelu", "relu"]
    latents: Positive
    k: Positive
    matryoshka: list[Positive] | None
    transcode: bool
    tokens: Positive
    batch: Positive
    learning_rate: Annotated[float, Field(gt=0.0)] | None
    warmup: Share
    decay: Share
    encoder_scale: Annotated[float, Field(gt=0.0)]
    aux_k_coefficient: Annotated[float, Field(ge=0.0)]
    dead_after: Positive | None
    log_every: Positive
    checkpoint_seconds: Annotated[float, Field(ge=0.0)]

    @model_validator(mode="after")
    def _fits(self) -> "Train":
        if self.k > self.latents:
            raise ValueError(f"train.k: {self.k} active latents of only {self.latents} (train.latents)")
        widths = self.matryoshka or []
        if self.matryoshka is not None and (not widths or widths != sorted(set(widths)) or widths[-1] >= self.latents):
            raise ValueError(
                f"train.matryoshka: expected ascending widths below {self.latents} (train.latents), or null"
            )
        if widths and self.activation not in ("topk", "batchtopk"):
            raise ValueError(f"train.matryoshka: for 'topk' and 'batchtopk' only, not for {self.activation!r}")
        return self


class Pretrained(Section):
    """Released SAEs in place of trained ones."""

    name: Name | None
    revision: Name | None
    folder: Name | dict[str, Name]

    @field_validator("folder")
    @classmethod
    def _a_template(cls, folder: str | dict[str, str]) -> str | dict[str, str]:
        fields = re.findall(r"{([^}]*)}", folder) if isinstance(folder, str) else []
        if unknown := sorted(set(fields) - {"hookpoint", "layer"}):
            raise ValueError(f"{{{unknown[0]}}} is nothing to fill in; allowed: {{hookpoint}}, {{layer}}")
        return folder

    def folder_of(self, hookpoint: str, layer: int) -> str:
        """Where the SAE of a hookpoint lies below `name`."""
        if isinstance(self.folder, dict):
            return self.folder[hookpoint]
        return self.folder.replace("{hookpoint}", hookpoint).replace("{layer}", str(layer))


class Encode(Section):
    """Counting the firings of every latent."""

    chunk_tokens: Positive


class Quality(Section):
    """Loss recovered with the reconstructions spliced into the forward pass."""

    tokens: Positive | None


class Score(Section):
    """SAE-LAPE (METHODS: Andrylie et al. 2025)."""

    example_rate: Share
    token_rate: Share
    ratio: Annotated[float, Field(gt=0.0, le=1.0)]
    members: Positive
    same_language: bool
    order: Literal["entropy", "probability"]
    top: Positive | None
    per_layer: bool


class Neurons(Section):
    """LAPE for the model's own neurons (METHODS: Tang et al. 2024)."""

    hookpoints: list[Name]
    quantile: Share
    top_rate: Share

    @field_validator("hookpoints")
    @classmethod
    def _a_set(cls, names: list[str]) -> list[str]:
        return _checked(names, _HOOKPOINT)


class Stability(Section):
    """Second SAEs of some hookpoints, from another seed, to see which features come again."""

    hookpoints: list[Name]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    cosine: Annotated[float, Field(gt=0.0, le=1.0)]

    @field_validator("hookpoints")
    @classmethod
    def _a_set(cls, names: list[str]) -> list[str]:
        return _checked(names, _HOOKPOINT)


class Ablate(Section):
    """Removing one language's features and measuring what it costs every language."""

    methods: Annotated[list[Literal["feature", "directional", "additive", "neuron"]], Field(min_length=1)]
    additive_factor: float
    control_draws: Annotated[int, Field(ge=0)]
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_tokens: Positive
    by_layer: bool
    by_layer_others: bool
    bootstrap: Positive

    @field_validator("methods")
    @classmethod
    def _distinct(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("a method stands twice")
        return names


class Identify(Section):
    """Language identification by the selected units, against fastText."""

    also: Name | Dataset | None
    also_texts: Positive


class Steer(Section):
    """Generation with a language's features amplified."""

    strengths: Annotated[list[Annotated[float, Field(gt=0.0)]], Field(min_length=1)]
    prompt_language: Name
    prompts: Positive
    prompt_tokens: Annotated[int, Field(ge=2)]
    new_tokens: Annotated[int, Field(ge=2)]
    temperature: Annotated[float, Field(ge=0.0)]
    min_distinct: Share
    max_nll: Annotated[float, Field(gt=0.0)]
    control: bool
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_rows: Positive


class Browse(Section):
    """The feature browser: what is shown of every feature."""

    texts: Positive
    tokens: Positive
    ablation_texts: Annotated[int, Field(ge=0)]
    shared: Annotated[int, Field(ge=0)] | None


class Explain(Section):
    """Features in words, by a language model behind an OpenAI-compatible endpoint."""

    endpoint: Annotated[str, Field(pattern=r"https?://.+")] | None
    model: Name | None
    per_language: Positive
    examples: Positive
    scored: Positive
    parallel: Positive
    price_in: Annotated[float, Field(ge=0.0)]
    price_out: Annotated[float, Field(ge=0.0)]
    max_cost: Annotated[float, Field(ge=0.0)]

    @model_validator(mode="after")
    def _whole(self) -> "Explain":
        if self.endpoint is not None and self.model is None:
            raise ValueError("explain.model: the endpoint needs the name of a model")
        return self


class Track(Section):
    """Where the runs go in MLflow."""

    experiment: Name


class Hardware(Section):
    """Knobs that change how fast the results come, never what they are; no stage depends on them."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Positive
    num_nodes: Positive
    strategy: Name
    threads: Annotated[int, Field(ge=0)]

    @field_validator("strategy")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ("auto", "ddp", "fsdp"):
            raise ValueError(
                f"{name!r}; allowed: auto, ddp, fsdp. Lightning's others cut weights across rows (deepspeed, "
                "model_parallel), which the SAE's own gradients do not, or start functions, not stages (ddp_spawn)"
            )
        return name


class Config(Section):
    """The whole of params.yaml."""

    languages: list[Name]
    hookpoints: list[Name]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    model: Model
    corpus: Corpus
    extract: Extract
    train: Train
    pretrained: Pretrained
    encode: Encode
    quality: Quality
    score: Score
    neurons: Neurons
    stability: Stability
    identify: Identify
    ablate: Ablate
    steer: Steer
    browse: Browse
    explain: Explain
    track: Track
    hardware: Hardware

    @field_validator("languages", "hookpoints")
    @classmethod
    def _a_set(cls, names: list[str], info: pydantic.ValidationInfo) -> list[str]:
        if not names:
            raise ValueError("the list is empty; at least one is needed")
        return _checked(names, _LANGUAGE if info.field_name == "languages" else _HOOKPOINT)

    @model_validator(mode="after")
    def _neurons_fit(self) -> "Config":
        names = self.neurons.hookpoints
        both = [name for name in names if name in self.hookpoints]
        if both:
            raise ValueError(
                f"neurons.hookpoints: {both[0]!r} is among hookpoints, too: there the units are an SAE's latents; "
                "allowed: any other, such as layers.6.mlp.act_fn"
            )
        if "neuron" in self.ablate.methods and not names:
            raise ValueError(
                "ablate.methods: 'neuron' sets neurons to 0, and neurons.hookpoints names none; "
                "allowed without them: feature, directional, additive"
            )
        return self

    @model_validator(mode="after")
    def _transcoders_fit(self) -> "Config":
        if self.train.transcode and "feature" in self.ablate.methods:
            raise ValueError(
                "ablate.methods: 'feature' subtracts what an SAE reads off the hookpoint itself, transcoders "
                "(train.transcode) read its module's input; allowed with them: directional, additive, neuron"
            )
        return self

    @model_validator(mode="after")
    def _pretrained_fit(self) -> "Config":
        if self.train.source != "pretrained":
            return self
        if self.pretrained.name is None:
            raise ValueError("pretrained.name: train.source 'pretrained' needs a local folder or a hub id")
        if isinstance(self.pretrained.folder, dict):
            missing = [name for name in self.hookpoints if name not in self.pretrained.folder]
            if missing:
                raise ValueError(f"pretrained.folder: no folder for {missing[0]!r}, one of hookpoints")
        return self

    @model_validator(mode="after")
    def _store_dtype_fits(self) -> "Config":
        if self.extract.store_dtype == "int8" and self.train.source == "stream":
            raise ValueError(
                "extract.store_dtype: 'int8' saves disk, and train.source 'stream' stores nothing; "
                "allowed with it: float16, bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _stability_fits(self) -> "Config":
        chosen = self.stability.hookpoints
        why = {
            "stream": "a second training reads stored activations, and train.source 'stream' stores none",
            "pretrained": "with train.source 'pretrained' nothing is trained that could be trained again",
        }
        if chosen and self.train.source in why:
            raise ValueError(f"stability.hookpoints: {why[self.train.source]}; allowed with it: an empty list, []")
        for name in chosen:
            if name not in self.hookpoints:
                raise ValueError(
                    f"stability.hookpoints: {name!r} is not one of hookpoints; {nearest(name, self.hookpoints)}"
                )
        if chosen and self.stability.seed == self.seed:
            raise ValueError(f"stability.seed: {self.seed} is the seed of the first training, too; choose another")
        return self

    @model_validator(mode="after")
    def _explain_fits(self) -> "Config":
        if self.explain.endpoint is not None and self.train.source == "stream":
            raise ValueError(
                "explain.endpoint: features are explained by stored activations, and train.source 'stream' stores "
                "none; allowed with it: null"
            )
        return self

    @model_validator(mode="after")
    def _strategy_fits(self) -> "Config":
        if self.hardware.strategy == "fsdp" and self.model.quantization is not None:
            raise ValueError(
                f"hardware.strategy: 'fsdp' cannot cut weights in {self.model.quantization} (model.quantization); "
                "allowed with them: auto, ddp"
            )
        return self

    @model_validator(mode="after")
    def _members_fit(self) -> "Config":
        if self.score.members > len(self.languages):
            raise ValueError(f"score.members: {self.score.members} of only {len(self.languages)} languages")
        return self


def _allowed(place: tuple[int | str, ...]) -> list[str]:
    """The keys that the section at `place` may hold."""
    model: Any = Config
    for key in place:
        field = model.model_fields.get(key) if isinstance(key, str) else None
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return []
        model = field.annotation
    return list(model.model_fields)


def _explain(error: Any) -> str:
    place, kind = tuple(error["loc"]), error["type"]
    key = ".".join(str(part) for part in place)
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {nearest(str(place[-1]), _allowed(place[:-1]))}"
    if kind == "missing":
        return f"{key}: the key is missing"
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        # The checks of a whole section name their key themselves.
        return message if re.match(r"[a-z_]+\.[a-z_]+: ", message) else f"{key}: {message}"
    got = error.get("input")
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {got!r:.80}"


def parse(content: Any, source: str = "params.yaml") -> Config:
    """Validate the content of a params file.

    Raises
    ------
    UserError: one message that names `source`, every wrong key and what it may hold.
    """
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected sections such as 'train:', got {type(content).__name__}")
    try:
        return Config.model_validate(content)
    except pydantic.ValidationError as error:
        lines = [f"{source}: {_explain(e)}" for e in error.errors(include_url=False)]
        raise UserError("\n       ".join(lines)) from None


def load(path: Path = Path("params.yaml")) -> Config:
    """Read and validate params.yaml (YAML 1.2: the language code `no` is a string, `1e-3` a number).

    Raises
    ------
    UserError: the file is missing, is not YAML, or holds something that is not allowed.
    """
    return parse(read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file.

    Raises
    ------
    UserError: the file is missing or is not YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the root of the repository") from None
    except (YAMLError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def hookpoint_argument(arguments: list[str], params: Config) -> str:
    """The hookpoint that a stage's command line names.

    Raises
    ------
    UserError: there is none, or params.yaml does not list it.
    """
    allowed = ", ".join(params.hookpoints)
    if len(arguments) != 2 or arguments[1] not in params.hookpoints:
        raise UserError(f"usage: python {arguments[0]} HOOKPOINT, one of params.yaml's hookpoints: {allowed}")
    return arguments[1]
