"""`params.yaml` as a typed, validated model: what its sections have to do with each other, and reading it."""

import os
import sys
from pathlib import Path
from typing import Any

import pydantic
from pydantic import field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from babelscope.errors import UserError, nearest
from babelscope.sections import (
    Ablate,
    Browse,
    Corpus,
    Dataset,
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
from babelscope.values import Hookpoints, Languages, Seed, expanded, explain


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
        devices = self.hardware.devices * self.hardware.num_nodes
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
        lines = [f"{source}: {explain(Config, e)}" for e in error.errors(include_url=False)]
        raise UserError("\n       ".join(lines)) from None


def load(path: Path = Path("params.yaml")) -> Config:
    """Read and validate params.yaml (YAML 1.2: the language code `no` is a string, `1e-3` a number).

    Raises
    ------
    UserError: the file is missing, is not YAML, or holds something that is not allowed; or it is that of a temporary
        copy of the repository (`dvc exp run --temp`, the queue) in which a folder that it names is missing.
    """
    params = parse(read_yaml(path), str(path))
    here, main = path.absolute().parent, os.environ.get("DVC_ROOT")
    for key, name in _folders(params).items():
        if main is not None and name is not None and not (here / name).exists() and (Path(main) / name).exists():
            raise UserError(
                f"{path}: {key}: {name!r} is missing in the temporary copy of the repository in which DVC runs this "
                f"experiment: DVC copies only what git or DVC tracks. Write the absolute path, {Path(main) / name}; or "
                f"track it (git add or dvc add {name}); or leave out --temp and --queue"
            )
    return params


def _folders(params: Config) -> dict[str, str | None]:
    """The values that may be paths of folders, by key."""
    also = params.identify.also
    entries = {f"corpus.datasets.{number}.path": entry.path for number, entry in enumerate(params.corpus.datasets)}
    return entries | {
        "model.name": params.model.name if params.model.source == "huggingface" else None,
        "corpus.path": params.corpus.path,
        "pretrained.name": params.pretrained.name,
        "identify.also": also.path if isinstance(also, Dataset) else also,
    }


def check_folders(params: Config) -> None:
    """Refuse local folders that do not exist and that are read only by stages behind the long ones.

    Raises
    ------
    UserError: names the key and the folder.
    """
    also = params.identify.also
    folders = {"identify.also": also} if isinstance(also, str) else {}
    # These may also be names on the Hugging Face hub.
    names = {"identify.also.path": also.path} if isinstance(also, Dataset) else {}
    if params.train.source == "pretrained":
        names["pretrained.name"] = params.pretrained.name
    folders |= {key: name for key, name in names.items() if name and name.startswith((".", "/", "~"))}
    for key, name in folders.items():
        if not expanded(name).is_dir():
            raise UserError(f"params.yaml: {key}: no folder {name!r}")


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
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:  # a mapping for a key is a TypeError
        reason = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(str(error).split()))
        raise UserError(f"{path}: not valid YAML: {reason}") from None


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


if __name__ == "__main__":  # before DVC reads the file, whose own messages name no key
    try:
        check_folders(load())
    except UserError as wrong:
        sys.exit(f"error: {wrong}")
