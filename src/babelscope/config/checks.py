"""The whole of params.yaml as one model: what its sections must have to do with each other."""

from pydantic import field_validator, model_validator

from babelscope.config.schema import (
    Ablate,
    Browse,
    Corpus,
    Encode,
    Explain,
    Extract,
    Hardware,
    Identify,
    Model,
    Neurons,
    Pretrained,
    Quality,
    Score,
    Section,
    Stability,
    Steer,
    Track,
    Train,
)
from babelscope.config.values import Hookpoints, Languages, Seed
from babelscope.core.errors import nearest


class Config(Section):
    """The whole of params.yaml."""

    languages: Languages
    hookpoints: Hookpoints
    seed: Seed
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
    def _at_least_one(cls, names: list[str]) -> list[str]:
        if not names:
            raise ValueError("the list is empty; at least one is needed")
        return names

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
    def _prompts_fit(self) -> "Config":
        if self.steer.prompt_language not in self.languages:
            raise ValueError(
                f"steer.prompt_language: {self.steer.prompt_language!r} is not one of languages; "
                f"allowed: {', '.join(self.languages)}"
            )
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> "Config":
        wanted = self.hardware.devices
        count = wanted if isinstance(wanted, int) else len(wanted) if isinstance(wanted, list) else 1  # auto: unknown
        devices = count * self.hardware.num_nodes
        if self.train.source != "pretrained" and self.train.batch % devices:
            raise ValueError(
                f"train.batch: {self.train.batch} does not divide among {devices} devices (hardware.devices times "
                f"hardware.num_nodes); allowed: a multiple of {devices}"
            )
        return self

    @model_validator(mode="after")
    def _members_fit(self) -> "Config":
        if self.score.members > len(self.languages):
            raise ValueError(f"score.members: {self.score.members} of only {len(self.languages)} languages")
        return self
