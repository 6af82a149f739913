"""What `dvc exp run -S` does to a params file: DVC's writer changes the value that it is told to, and nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest
from closure import ROOT
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import load_yaml, modify_yaml
from params_texts import CONTENTS, TEXTS

from babelscope import config
from babelscope.core.errors import UserError

# What each key that may hold a list or a mapping can be set to. DVC drops the comments that belong to the old value.
LISTS = {
    "languages": "[en,de]",
    "hookpoints": "[layers.1.mlp]",
    "corpus.datasets": "[{name: xnli}]",
    "corpus.packages": "[plone.app.locales]",
    "train.matryoshka": "[8,16]",
    "pretrained.folder": "elsewhere",
    "neurons.hookpoints": "[layers.1.mlp.act_fn]",
    "stability.hookpoints": "[layers.1.mlp]",
    "stability.seeds": "[5,6]",
    "identify.also": "{name: wili-2018}",
    "ablate.methods": "[feature,directional]",
    "baselines.dictionaries": "[frozen_decoder,neurons]",
    "steer.hookpoints": "[layers.1.mlp]",
    "steer.methods": "[diffmean,prompt]",
    "steer.strengths": "[1.5,2.5]",
    "steer.prompt_languages": "[en]",
}


def value_of(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


def comments(text: str) -> list[tuple[str, str]]:
    """Every comment, and the key that it stands at: its own line's, else the next one below it or the one above."""
    found, waiting = [], []
    for line in text.splitlines():
        code, mark, comment = line.partition("#")
        key = re.match(r"\s*([\w.]+):", code)
        if mark and not key:
            waiting.append(comment.strip())
        elif key or code.strip().startswith("-"):
            found += [(key.group(1) if key else "item", words) for words in waiting]
            found += [(key.group(1), comment.strip())] if key and mark else []
            waiting = []
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_a_changed_value_is_a_change_of_one_line(tmp_path: Path, name: str) -> None:
    copy = tmp_path / "params.yaml"
    copy.write_text(TEXTS[name])
    for seed in (7, 8):
        apply_overrides(copy, [f"seed={seed}"])
        assert copy.read_text() == re.sub(r"(?m)^seed: 0", f"seed: {seed}", TEXTS[name])
    with modify_yaml(copy) as content:
        content["train"]["k"] = 3
    assert re.sub(r"(?m)^  k: 3$", "", copy.read_text()) == re.sub(
        r"(?m)^seed: 0", "seed: 8", re.sub(r"(?m)^  k: \d+$", "", TEXTS[name])
    )


@pytest.mark.parametrize("name", TEXTS)
def test_no_comment_is_lost_or_moved_by_another_list(tmp_path: Path, name: str) -> None:
    copy, wanted = tmp_path / "params.yaml", comments(TEXTS[name])
    for key, value in LISTS.items():
        copy.write_text(TEXTS[name])
        none = "null" if key in ("train.matryoshka", "identify.also") else value
        for override in (f"{key}={value}", "seed=7", f"{key}={none}", "seed=8", f"{key}={value}", "seed=9"):
            apply_overrides(copy, [override])
            assert comments(copy.read_text()) == wanted, (key, override)


def test_every_list_is_tried() -> None:
    def lists(content: object, key: str = "") -> set[str]:
        if isinstance(content, dict):
            return {name for inner, value in content.items() for name in lists(value, f"{key}.{inner}".strip("."))}
        return {key} if isinstance(content, list) else set()

    assert {key for content in CONTENTS.values() for key in lists(content)} <= LISTS.keys()


@pytest.mark.parametrize("name", TEXTS)
def test_an_empty_list_leaves_a_file_that_can_be_read(tmp_path: Path, name: str) -> None:
    """DVC's writer spoils the file if a comment stands between the key and the first item of the list."""
    copy = tmp_path / "params.yaml"
    for key in LISTS:
        if not isinstance(value_of(CONTENTS[name], key), list):
            continue
        copy.write_text(TEXTS[name])
        apply_overrides(copy, [f"{key}=[]"])
        assert value_of(load_yaml(copy), key) == [], key


def test_no_hookpoints_are_refused_by_name(tmp_path: Path) -> None:
    copy = tmp_path / "params.yaml"
    copy.write_text((ROOT / "params.yaml").read_text())
    apply_overrides(copy, ["hookpoints=[]"])
    with pytest.raises(UserError, match=r"params\.yaml: hookpoints: the list is empty"):
        config.load(copy)


def test_no_packages_leave_a_file_that_can_be_read(tmp_path: Path) -> None:
    copy = tmp_path / "params.yaml"
    copy.write_text((ROOT / "params.yaml").read_text())
    apply_overrides(copy, ["corpus.packages=[]", "corpus.path=texts", "corpus.source=files"])
    assert config.load(copy).corpus.packages == []
