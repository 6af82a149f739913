"""The whole of params.yaml as one model, and the checks that concern several of its sections."""

from collections.abc import Iterator

from pydantic import field_validator, model_validator

from babelscope.config import schema
from babelscope.config.values import Hookpoints, Languages, Seed
from babelscope.core.errors import nearest


class Config(schema.Section):
    """The whole of params.yaml."""

    languages: Languages
    hookpoints: Hookpoints
    seed: Seed
    model: schema.Model
    corpus: schema.Corpus
    extract: schema.Extract
    train: schema.Train
    pretrained: schema.Pretrained
    encode: schema.Encode
    quality: schema.Quality
    score: schema.Score
    neurons: schema.Neurons
    stability: schema.Stability
    sharing: schema.Sharing
    switching: schema.Switching
    identify: schema.Identify
    ablate: schema.Ablate
    baselines: schema.Baselines
    script: schema.Script
    steer: schema.Steer
    browse: schema.Browse
    explain: schema.Explain
    track: schema.Track
    hardware: schema.Hardware

    @field_validator("languages", "hookpoints")
    @classmethod
    def _at_least_one(cls, names: list[str]) -> list[str]:
        if not names:
            raise ValueError("the list is empty; at least one is needed")
        return names

    @model_validator(mode="after")
    def _sections_fit(self) -> "Config":
        checks = (_neurons, _ablate, _sources, _stability, _baselines, _script, _steer, _hardware, _languages)
        if problem := next((problem for check in checks for problem in check(self)), None):
            raise ValueError(problem)
        return self


def _neurons(params: Config) -> Iterator[str]:
    names = params.neurons.hookpoints
    for name in names:
        if name in params.hookpoints:
            yield (
                f"neurons.hookpoints: {name!r} is also one of hookpoints, where the units are an SAE's latents; "
                "allowed: any other, such as layers.6.mlp.act_fn"
            )
    if "neuron" in params.ablate.methods and not names:
        yield (
            "ablate.methods: 'neuron' sets neurons to 0, but neurons.hookpoints is empty; "
            "allowed without neurons: feature, mean, swap, directional, additive"
        )


def _ablate(params: Config) -> Iterator[str]:
    if params.ablate.rank_tokens and "feature" not in params.ablate.methods:
        yield (
            f"ablate.rank_tokens: {params.ablate.rank_tokens} tokens rank the features for the method 'feature', which "
            "is not one of ablate.methods; allowed without it: 0"
        )


def _sources(params: Config) -> Iterator[str]:
    for name in params.hookpoints if params.train.transcode else ():
        if name.endswith(".input"):
            yield (
                f"hookpoints: {name!r} is the input of a module, and a transcoder (train.transcode) writes to the "
                f"output of one; allowed: {name.removesuffix('.input')!r}"
            )
    if params.train.transcode and (wrong := [m for m in ("feature", "mean", "swap") if m in params.ablate.methods]):
        yield (
            f"ablate.methods: {wrong[0]!r} needs SAEs that read the hookpoint itself, but transcoders "
            "(train.transcode) read the input of its module; allowed with them: directional, additive, neuron"
        )
    if params.train.source == "pretrained":
        if params.pretrained.name is None:
            yield "pretrained.name: train.source 'pretrained' needs a local folder or a hub id"
        folders = params.pretrained.folder
        for name in params.hookpoints if isinstance(folders, dict) else ():
            if name not in folders:
                yield f"pretrained.folder: no folder for {name!r}, one of hookpoints"
    if params.train.source == "stream" and params.extract.store_dtype == "int8":
        yield (
            "extract.store_dtype: 'int8' saves disk, and train.source 'stream' stores nothing; "
            "allowed with it: float16, bfloat16"
        )
    if params.train.source == "stream" and params.corpus.train_languages is not None:
        yield (
            "corpus.train_languages: train.source 'stream' trains and counts in one pass over all languages; "
            "allowed with it: null"
        )
    if params.train.source == "stream" and params.sharing.groups:
        yield "sharing.groups: it reads stored activations, and train.source 'stream' stores none; allowed with it: 0"
    if params.train.source == "stream" and params.explain.endpoint is not None:
        yield (
            "explain.endpoint: explanations need stored activations, and train.source 'stream' stores "
            "none; allowed with it: null"
        )


def _stability(params: Config) -> Iterator[str]:
    chosen = params.stability.hookpoints
    reasons = {
        "stream": "a second training reads stored activations, and train.source 'stream' stores none",
        "pretrained": "train.source 'pretrained' trains nothing that could be trained again",
    }
    if chosen and params.train.source in reasons:
        yield f"stability.hookpoints: {reasons[params.train.source]}; allowed with it: an empty list, []"
    for name in chosen:
        if name not in params.hookpoints:
            yield f"stability.hookpoints: {name!r} is not one of hookpoints; {nearest(name, params.hookpoints)}"
    if chosen and params.seed in params.stability.seeds:
        yield f"stability.seeds: {params.seed} is also the seed of the first training; choose another"


def _baselines(params: Config) -> Iterator[str]:
    if params.baselines.dictionaries and not params.stability.hookpoints:
        yield "baselines.dictionaries: they need a hookpoint, and stability.hookpoints is empty; allowed with it: []"
    if params.baselines.ablation_tokens and not params.stability.hookpoints:
        yield (
            "baselines.ablation_tokens: the removal needs a hookpoint, and stability.hookpoints is empty; "
            "allowed with it: 0"
        )
    if params.baselines.dictionaries and params.train.transcode:
        yield "baselines.dictionaries: for SAEs only, not for transcoders (train.transcode); allowed with them: []"

    own = [name for name in params.baselines.dictionaries if name in ("neurons", "random_model")]
    if own and set(params.languages) - set(params.corpus.train_languages or params.languages):
        yield (
            f"baselines.dictionaries: {own[0]!r} reads the model anew, but only the texts that train SAEs; "
            "allowed with languages that corpus.train_languages lacks: frozen_decoder, frozen_encoder"
        )


def _script(params: Config) -> Iterator[str]:
    if params.script.ablation_tokens and not params.script.tokens:
        yield (
            f"script.ablation_tokens: {params.script.ablation_tokens}, but with script.tokens 0 the stage measures "
            "nothing; set script.tokens above 0, or script.ablation_tokens to 0"
        )


def _hardware(params: Config) -> Iterator[str]:
    if params.hardware.strategy == "fsdp" and params.model.quantization is not None:
        yield (
            f"hardware.strategy: 'fsdp' cannot shard weights in {params.model.quantization} (model.quantization); "
            "allowed with them: auto, ddp"
        )
    wanted = params.hardware.devices
    count = wanted if isinstance(wanted, int) else len(wanted) if isinstance(wanted, list) else 1  # auto: unknown
    devices = count * params.hardware.num_nodes
    if params.train.source != "pretrained" and params.train.batch % devices:
        yield (
            f"train.batch: {params.train.batch} does not divide among {devices} devices (hardware.devices times "
            f"hardware.num_nodes); allowed: a multiple of {devices}"
        )


def _steer(params: Config) -> Iterator[str]:
    section = params.steer
    named = [("prompt_languages", name) for name in section.prompt_languages]
    for key, name in [*named, *([] if section.removal is None else [("removal", section.removal)])]:
        if name not in params.languages:
            yield f"steer.{key}: {name!r} is not one of languages; allowed: {', '.join(params.languages)}"
    for name in section.hookpoints or ():
        if name not in params.hookpoints:
            yield f"steer.hookpoints: {name!r} is not one of hookpoints; {nearest(name, params.hookpoints)}"
    if section.relevance == "endpoint" and params.explain.endpoint is None:
        yield "steer.relevance: 'endpoint' asks explain.endpoint, which is null; allowed without it: encoder"
    if "neurons" in section.methods and not params.neurons.hookpoints:
        yield "steer.methods: 'neurons' steers by neurons, but neurons.hookpoints is empty; allowed: any other method"


def _languages(params: Config) -> Iterator[str]:
    if params.score.members > len(params.languages):
        yield f"score.members: {params.score.members} of only {len(params.languages)} languages"
