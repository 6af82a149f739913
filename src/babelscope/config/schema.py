"""The sections of params.yaml, one class each. params.yaml documents every setting."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, field_validator, model_validator

from babelscope.config.values import (
    Amount,
    Devices,
    Factor,
    Hookpoints,
    Inside,
    Languages,
    Name,
    Positive,
    Seed,
    Sha256,
    Share,
    Size,
    Url,
)


class Section(pydantic.BaseModel):
    """A section of params.yaml: no unknown keys, no silent conversions, immutable."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    """Which causal language model, and how it is loaded."""

    source: Literal["package", "huggingface"]
    name: Name
    gguf_file: Inside | None
    sha256: Sha256 | None
    revision: Name | None
    quantization: Literal["8bit", "4bit"] | None
    trust_remote_code: bool


class Dataset(Section):
    """A data set in the Hugging Face hub's format: the name of an entry in `corpus.hub`, or a path with columns."""

    name: (
        Literal["flores-plus", "xnli", "paws-x", "wili-2018", "wikipedia", "fineweb-2", "tatoeba", "clas-bench"] | None
    ) = None
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
                    raise ValueError(f"{key} is missing; needed if no 'name' is given")
            if self.language is None and "{language}" not in (self.subset or ""):
                raise ValueError("language is missing: the column that holds it, or '{language}' in subset")
        return self


class Corpus(Section):
    """Where the texts come from, and how many are used."""

    source: Literal["gettext", "files", "huggingface"]
    datasets: list[Dataset]
    packages: list[Name]
    path: Name | None
    domain: Inside | None
    source_language: Name
    lid: Share | None
    min_characters: Size
    max_tokens: Annotated[Size, Field(ge=2)]
    train_tokens: Positive
    eval_tokens: Positive
    train_languages: Annotated[Languages, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> "Corpus":
        if self.source == "files" and self.path is None:
            raise ValueError("corpus.path: the source 'files' needs a folder")
        if self.source == "huggingface" and not self.datasets:
            raise ValueError("corpus.datasets: the source 'huggingface' needs at least one, such as '- name: xnli'")
        if self.source == "gettext" and bool(self.packages) == (self.path is not None):
            raise ValueError("corpus.packages: the source 'gettext' needs either packages or a path: 'packages: []' "
                             "with a path, 'path:' null with packages")  # fmt: skip
        if len(set(self.packages)) < len(self.packages):
            raise ValueError("corpus.packages: a package is listed twice")
        return self


def distinct(what: str) -> Callable[[list[Any]], list[Any]]:
    """A validator that refuses a list with the same item twice; `what` names an item in the message."""

    def check(names: list[Any]) -> list[Any]:
        if len(set(names)) < len(names):
            raise ValueError(f"a {what} is listed twice")
        return names

    return check


class Extract(Section):
    """The forward pass whose activations are stored."""

    dtype: Literal["float32", "bfloat16", "float16"]
    store_dtype: Literal["float16", "bfloat16", "int8"]
    batch_tokens: Size


class Train(Section):
    """One SAE per hookpoint."""

    source: Literal["stored", "stream", "pretrained"]
    activation: Literal["topk", "batchtopk", "jumprelu", "relu"]
    latents: Size
    k: Size
    matryoshka: list[Positive] | None
    transcode: bool
    tokens: Positive
    batch: Size
    learning_rate: Factor | None
    warmup: Share
    decay: Share
    encoder_scale: Factor
    aux_k_coefficient: Amount
    weight_decay: Amount
    dead_after: Positive | None
    frozen: Literal["decoder", "encoder"] | None = None
    log_every: Positive

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
    """Released SAEs instead of trained ones."""

    name: Name | None
    revision: Name | None
    folder: Inside | dict[str, Inside]

    @field_validator("name", "folder")
    @classmethod
    def _a_template(cls, template: str | dict[str, str] | None) -> str | dict[str, str] | None:
        fields = re.findall(r"{([^}]*)}", template) if isinstance(template, str) else []
        if unknown := sorted(set(fields) - {"hookpoint", "layer"}):
            raise ValueError(f"{{{unknown[0]}}} is unknown; allowed: {{hookpoint}}, {{layer}}")
        return template

    def place_of(self, hookpoint: str, layer: int) -> tuple[str, str]:
        """The repository or folder of a hookpoint's SAE, and the folder or file in it."""
        folder = self.folder[hookpoint] if isinstance(self.folder, dict) else self.folder
        name, folder = (
            template.replace("{hookpoint}", hookpoint).replace("{layer}", str(layer))
            for template in (self.name or "", folder)
        )
        return name, folder


class Encode(Section):
    """Counting the firings of every latent."""

    chunk_tokens: Size


class Quality(Section):
    """Loss recovered with the reconstructions spliced into the forward pass."""

    tokens: Positive | None


class Score(Section):
    """SAE-LAPE (Andrylie et al. 2025, arXiv 2507.11230)."""

    example_rate: Share
    token_rate: Share
    ratio: Annotated[float, Field(gt=0.0, le=1.0)]
    members: Positive
    max_entropy: Annotated[float, Field(ge=0.0, le=100.0)] | None
    random_tokens: Annotated[int, Field(ge=0, le=2**26)]
    same_language: bool
    order: Literal["entropy", "probability"]
    top: Positive | None
    per_layer: bool

    @property
    def selection(self) -> dict[str, Any]:
        """The arguments of `features.sae_lape`."""
        return self.model_dump(exclude={"random_tokens"})


class Neurons(Section):
    """LAPE for the model's own neurons (Tang et al. 2024, arXiv 2402.16438)."""

    hookpoints: Hookpoints
    quantile: Share
    top_rate: Share


class Stability(Section):
    """SAEs of some hookpoints from other seeds, which show which features are found again."""

    hookpoints: Hookpoints
    seeds: Annotated[list[Seed], Field(min_length=1)]
    cosine: Annotated[float, Field(gt=0.0, le=1.0)]

    _distinct = field_validator("seeds")(distinct("seed"))


class Sharing(Section):
    """Latents that fire on a text and on its translations."""

    groups: Annotated[int, Field(ge=0, le=2**26)]


class Switching(Section):
    """Sentences that switch from one language to another."""

    groups: Annotated[int, Field(ge=0, le=2**26)]


class Ablate(Section):
    """Removing one language's features and measuring what it costs every language."""

    methods: Annotated[
        list[Literal["feature", "mean", "swap", "directional", "additive", "neuron"]], Field(min_length=1)
    ]
    additive_factor: Annotated[float, Field(ge=-1e6, le=1e6)]
    control_draws: Annotated[int, Field(ge=0, le=10_000)]
    script_draws: Annotated[int, Field(ge=0, le=10_000)]
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_tokens: Size
    by_layer: bool
    tokens: Positive | None
    others_tokens: Positive | None
    kl_every: Annotated[int, Field(ge=0, le=2**40)]
    rank_tokens: Annotated[int, Field(ge=0, le=2**40)]
    bootstrap: Annotated[int, Field(gt=0, le=1_000_000)]

    _distinct = field_validator("methods")(distinct("method"))


def primary_method(methods: Sequence[str]) -> str:
    """The ablation method of the headline, the pictures and the tables: `feature` if it is used, else the first."""
    return "feature" if "feature" in methods or not methods else methods[0]


class Identify(Section):
    """Language identification by the selected units, compared with fastText."""

    also: Name | Dataset | None
    also_texts: Size


class Baselines(Section):
    """Directions, frozen dictionaries and neurons, next to the language features of one hookpoint."""

    dictionaries: list[Literal["frozen_decoder", "frozen_encoder", "random_model", "neurons"]]
    ablation_tokens: Annotated[int, Field(ge=0, le=2**26)]

    _distinct = field_validator("dictionaries")(distinct("dictionary"))


class Script(Section):
    """Romanised and shuffled texts, which tell features of a language from those of its script."""

    tokens: Annotated[int, Field(ge=0, le=2**26)]
    ablation_tokens: Annotated[int, Field(ge=0, le=2**26)]


SteeringMethod = Literal[
    "diffmean", "pca", "probe", "features", "features-1", "features-2", "features-5", "sae-diffmean", "neurons",
    "prompt",
]  # fmt: skip


class Steer(Section):
    """Vectors that make the model answer in a language, compared on prompts in other languages."""

    hookpoints: Hookpoints | None
    methods: Annotated[list[SteeringMethod], Field(min_length=1)]
    tokens: Positive
    strengths: Annotated[list[Factor], Field(min_length=1)]
    prompt_languages: Annotated[Languages, Field(min_length=1)]
    prompts: Size
    prompts_from: Name | Dataset | None
    prompt_tokens: Annotated[Size, Field(ge=2)]
    copies: Annotated[int, Field(ge=1, le=100)]
    new_tokens: Annotated[Size, Field(ge=2)]
    sampled: Annotated[int, Field(ge=0, le=2**26)]
    temperature: Amount
    bootstrap: Annotated[int, Field(gt=0, le=1_000_000)]
    relevance: Literal["encoder", "endpoint"]
    removal: Name | None
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_rows: Size

    _distinct = field_validator("methods")(distinct("method"))


class Browse(Section):
    """The feature browser: how much it shows of every feature."""

    texts: Size
    tokens: Size
    ablated: Annotated[int, Field(ge=0, le=2**26)]
    ablation_texts: Annotated[int, Field(ge=0, le=2**26)]
    train_tokens: Size | None
    selected: Size | None
    shared: Annotated[int, Field(ge=0, le=2**26)] | None


class Explain(Section):
    """Descriptions of features by a language model behind an OpenAI-compatible endpoint."""

    endpoint: Url | None
    model: Name | None
    per_language: Size
    examples: Size
    scored: Size
    price_in: Amount
    price_out: Amount
    max_cost: Amount

    @model_validator(mode="after")
    def _whole(self) -> "Explain":
        if self.endpoint is not None and self.model is None:
            raise ValueError("explain.model: the endpoint needs the name of a model")
        return self


class Track(Section):
    """Where the runs go in MLflow."""

    experiment: Name
    live_after: Amount


class Hardware(Section):
    """Settings that change the speed, never the results; no stage depends on them."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    devices: Devices
    num_nodes: Annotated[int, Field(gt=0, le=65536)]
    strategy: Name
    threads: Annotated[int, Field(ge=0, le=4096)]
    checkpoint_seconds: Amount
    parallel: Annotated[int, Field(gt=0, le=1000)]

    @field_validator("strategy")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ("auto", "ddp", "fsdp"):
            raise ValueError(
                f"{name!r}; allowed: auto, ddp, fsdp. Others split rows of weights (deepspeed, model_parallel), which "
                "the SAE's own gradients do not support, or cannot start a stage script (ddp_spawn)"
            )
        return name
