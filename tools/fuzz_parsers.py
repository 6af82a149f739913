"""`python tools/fuzz_parsers.py --minutes 10`: feed damaged and hostile input to every parser of this project.

Each must return a result or raise a `UserError` that names the file, within seconds. Inputs are valid examples with
bytes flipped, cut, repeated and replaced, or with values inside JSON and YAML changed. An input that breaks a parser is
printed with its seed: `--seed N --target NAME --rounds 1` repeats it.
"""

import argparse
import io
import json
import logging
import math
import random
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import numpy as np
import polars as pl
import polib
import torch
from closure import ROOT
from safetensors.torch import save as safetensors_bytes

from babelscope import config
from babelscope.activations.store import ActivationStore, write_index, write_shard
from babelscope.config.schema import Corpus
from babelscope.core.endpoint import answer_in, verdicts
from babelscope.core.errors import UserError
from babelscope.core.files import read_json, read_table
from babelscope.core.resume import read_part
from babelscope.corpus import gettext_catalogs, text_files
from babelscope.corpus.languages import require
from babelscope.corpus.messages import running_text
from babelscope.models.hookpoints import layer_of
from babelscope.sae import checkpoint
from babelscope.tracking import state

Target = Callable[[random.Random, Path], object]
SLOW = 20.0  # seconds that an input may take

NASTY = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"{", b"}", b"[" * 500, b'"', b"\\", b"\n", b"\r\n",
    b"null", b"NaN", b"Infinity", b"1e999", b"-1", b"0", b"9" * 400, b"true", b"../../../etc/passwd", b"\\ud800",
    b"%s%n", b"\x04", b"PK\x03\x04", b"\x80\x04cos\nsystem\n", struct.pack("<Q", 2**63), struct.pack("<I", 2**32 - 1),
    b"<script>",
]  # fmt: skip
VALUES = [
    None, True, -1, 0, 1, 2**63, 10**30, 1e308, math.nan, "", "x", "\0", "../x", "\ud800", [], {}, [[]],
    {"a": {"b": 1}}, [1.5],
]  # fmt: skip


def damage(draw: random.Random, content: bytes) -> bytes:
    """One to four changes of the bytes."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randint(0, len(found))
        match draw.randrange(6):
            case 0 if found:
                found[place % len(found)] ^= 1 << draw.randrange(8)
            case 1:
                del found[place:]
            case 2:
                del found[place : place + draw.randint(1, 64)]
            case 3:
                found[place:place] = draw.choice(NASTY)
            case 4:
                found[place : place + 8] = draw.choice(NASTY)
            case 5:
                found[place:place] = found[draw.randint(0, len(found)) :][: draw.randint(1, 200)]
    return bytes(found)


def twist(draw: random.Random, content: object) -> object:
    """The same structure with one of its values or keys changed."""
    if isinstance(content, dict) and content and draw.random() < 0.9:
        key = draw.choice(sorted(content))
        changed = {name: value for name, value in content.items() if name != key or draw.random() < 0.9}
        return changed | ({key: twist(draw, content[key])} if key in changed else {})
    if isinstance(content, list) and content and draw.random() < 0.9:
        place = draw.randrange(len(content))
        return [*content[:place], twist(draw, content[place]), *content[place + 1 :]]
    return draw.choice(VALUES)


def dumped(content: object) -> bytes:
    return json.dumps(content).encode()


def section(folder: Path, source: str) -> Corpus:
    return Corpus(
        source=source, datasets=[], packages=[], path=str(folder), domain=None, source_language="en", lid=None,
        min_characters=1, max_tokens=16, train_tokens=100, eval_tokens=10,
    )  # fmt: skip


def _catalog(binary: bool) -> bytes:
    catalog = polib.POFile()
    catalog.metadata = {"Content-Type": "text/plain; charset=utf-8"}
    for number in range(4):
        catalog.append(polib.POEntry(msgid=f"The file <b>%s</b> number {number}", msgstr=f"Die Datei Nummer {number}"))
    catalog.append(polib.POEntry(msgid="one", msgid_plural="many", msgstr_plural={0: "eins", 1: "viele"}))
    return catalog.to_binary() if binary else str(catalog).encode()


CATALOGS = {"mo": _catalog(True), "po": _catalog(False)}


def gettext(draw: random.Random, folder: Path) -> object:
    kind = draw.choice(sorted(CATALOGS))
    (folder / f"de.{kind}").write_bytes(damage(draw, CATALOGS[kind]))
    return gettext_catalogs.read(section(folder, "gettext"), ["en", "de"])


def _table() -> bytes:
    out = io.BytesIO()
    pl.DataFrame({"text": ["a b", "c d"] * 9, "language": ["de", "en"] * 9, "id": range(18)}).write_parquet(out)
    return out.getvalue()


ROWS = [{"text": "a\u2028b", "id": 1}, {"text": "c", "group": "x", "language": "de"}]
TEXTS = {
    "de.jsonl": b"\n".join(map(dumped, ROWS)), "de.txt": "ä b\nc\n".encode(), "de.parquet": _table(),
    "texts.parquet": _table(),
    "texts.jsonl": b"\n".join(dumped(row | {"language": "de"}) for row in ROWS),
}  # fmt: skip


def texts(draw: random.Random, folder: Path) -> object:
    name = draw.choice(sorted(TEXTS))
    if name.endswith("jsonl") and draw.random() < 0.5:
        content = b"\n".join(dumped(twist(draw, row)) for row in ROWS)
    else:
        content = damage(draw, TEXTS[name])
    (folder / name).write_bytes(content)
    return text_files.read(str(folder), ["de"])


D, N = 4, 8
W = {"W_enc": torch.ones(D, N), "W_dec": torch.ones(N, D), "b_enc": torch.ones(N), "b_dec": torch.ones(D),
     "threshold": torch.ones(N)}  # fmt: skip
LINEAR = {"encoder.weight": torch.ones(N, D), "encoder.bias": W["b_enc"]}
SPARSIFY = LINEAR | {"W_dec": W["W_dec"], "b_dec": W["b_dec"]}
LLAMA = LINEAR | {"decoder.weight": W["W_enc"], "decoder.bias": W["b_dec"]}
ARRAYS = {name: value.numpy() for name, value in W.items()}


def _npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, **ARRAYS)
    return out.getvalue()


def _pt() -> bytes:
    out = io.BytesIO()
    torch.save(LINEAR | {"decoder.weight": W["W_enc"], "b_dec": W["b_dec"], "k": torch.tensor(2)}, out)
    return out.getvalue()


RELEASES: dict[str, dict[str, object]] = {
    "saelens": {
        "cfg.json": {"architecture": "topk", "d_in": D, "d_sae": N, "k": 2, "apply_b_dec_to_input": True,
                     "normalize_activations": "none", "rescale_acts_by_decoder_norm": True},
        "sae_weights.safetensors": safetensors_bytes(W),
    },
    "jumprelu": {"cfg.json": {"architecture": "jumprelu"}, "sae_weights.safetensors": safetensors_bytes(W)},
    "sparsify": {"cfg.json": {"activation": "topk", "k": 2}, "sae.safetensors": safetensors_bytes(SPARSIFY)},
    "gemma": {"params.npz": _npz()},
    "llama": {
        "hyperparams.json": {"act_fn": "jumprelu", "jump_relu_threshold": 0.4, "norm_activation": "dataset-wise",
                             "dataset_average_activation_norm": {"in": 6.25, "out": 6.25}, "hook_point_in": "a",
                             "hook_point_out": "a"},
        "checkpoints/final.safetensors": safetensors_bytes(LLAMA),
    },
    "dictionary": {"config.json": {"trainer": {"dict_class": "AutoEncoderTopK"}}, "ae.pt": _pt()},
}  # fmt: skip


def release(draw: random.Random, folder: Path) -> object:
    files = RELEASES[draw.choice(sorted(RELEASES))]
    hurt = draw.choice(sorted(files))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name == hurt:
            whole = content if isinstance(content, bytes) else dumped(content)
            is_twisted = not isinstance(content, bytes) and draw.random() < 0.7
            (folder / name).write_bytes(dumped(twist(draw, content)) if is_twisted else damage(draw, whole))
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else dumped(content))
    sae = checkpoint.load(folder)
    return sae.decode(*sae.encode(torch.ones(3, sae.d_in)))


PARAMS = (ROOT / "params.yaml").read_bytes()


def params(draw: random.Random, folder: Path) -> object:
    (folder / "params.yaml").write_bytes(damage(draw, PARAMS))
    return config.load(folder / "params.yaml")


LOCK = {
    "schema": "2.0",
    "stages": {
        "train@layers.0": {
            "cmd": "x",
            "deps": [{"path": "a", "hash": "md5", "md5": "0" * 32}],
            "params": {"params.yaml": {"train.k": 4}},
            "outs": [{"path": "data/sae/layers.0", "md5": "0" * 32 + ".dir"}],
        }
    },
}


def lock(draw: random.Random, folder: Path) -> object:
    (folder / "dvc.yaml").write_text("stages: {train: {matrix: {hookpoint: '${hookpoints}'}, cmd: x}}")
    (folder / "dvc.lock").write_bytes(dumped(twist(draw, LOCK)) if draw.random() < 0.6 else damage(draw, dumped(LOCK)))
    return state.read(folder, {"hookpoints": ["layers.0"], "train": {"k": 4, "source": "stored"}})


def store(draw: random.Random, folder: Path) -> object:
    write_shard(folder, 0, torch.ones(6, 4, dtype=torch.float16), quantised=draw.random() < 0.5)
    write_index(folder, [6], 4, "float16", "m", "h")
    hurt = draw.choice(sorted(folder.iterdir()))
    content = hurt.read_bytes()
    is_twisted = hurt.suffix == ".json" and draw.random() < 0.7
    hurt.write_bytes(dumped(twist(draw, json.loads(content))) if is_twisted else damage(draw, content))
    opened = ActivationStore(folder)
    return opened.gather(torch.arange(opened.rows)) if opened.rows < 1000 else None


def tables(draw: random.Random, folder: Path) -> object:
    (folder / "a.parquet").write_bytes(damage(draw, TEXTS["de.parquet"]))
    (folder / "a.json").write_bytes(damage(draw, dumped(LOCK)))
    (folder / "a.safetensors").write_bytes(damage(draw, safetensors_bytes(W)))
    read_part(folder / "a.safetensors")
    if draw.random() < 0.5:
        return read_json(folder / "a.json")
    return read_table(folder / "a.parquet")


REPLY = {"choices": [{"message": {"content": "[1, 0] \ud800"}}]}


def reply(draw: random.Random, folder: Path) -> object:
    content = dumped(twist(draw, REPLY)) if draw.random() < 0.6 else damage(draw, dumped(REPLY))
    answer = answer_in(content)
    assert answer is None or answer.encode() is not None
    return verdicts(answer or "", 2)


def words(draw: random.Random, folder: Path) -> object:
    """Functions that accept any text and never fail."""
    text = damage(draw, draw.choice([b"[1, 0, 1]", b"layers.12.mlp", b"zh-Hant_TW.UTF-8@latin"])).decode(
        "utf-8", "replace"
    )
    answer = verdicts(text, 3)
    assert answer is None or len(answer) == 3
    assert layer_of(text) >= 0
    require([text], {"x": {"de", "pt_BR", text[::-1], "sr@latin"}})


MARKUP = ["<b>", "</b>", "<b ", "</", "%s", "%(a)", "%(", "%0", "{0}", "{", "${", "\0", " \0", '"\0', "(\0", "_", "&",
          "&#", "&amp;", "(", ")", "«", "»", '"', "'", ".", " ", "\n", "\u2028", "Wort", "字", "%1", "(_A)",
          "0", "\ud800"]  # fmt: skip


def messages(draw: random.Random, folder: Path) -> object:
    """Markup and placeholders in any order, or one of them again and again."""
    if draw.random() < 0.2:
        message = draw.choice(MARKUP) + draw.choice(MARKUP) * draw.randrange(20_000)
    else:
        message = "".join(draw.choices(MARKUP, k=draw.randrange(40)))
    text = running_text(message)
    assert "\0" not in text and text == " ".join(text.split())
    return text


TARGETS: dict[str, Target] = {
    target.__name__: target for target in (gettext, texts, release, params, lock, store, tables, reply, words, messages)
}


def fuzz(name: str, seed: int) -> bool:
    """Try one input; returns whether it was refused. Errors other than `UserError` are raised."""
    with tempfile.TemporaryDirectory() as temporary:
        start = time.monotonic()
        try:
            TARGETS[name](random.Random(f"{name} {seed}"), Path(temporary))
            refused = False
        except UserError as error:
            assert str(error).strip() and "Traceback" not in str(error)
            refused = True
        took = time.monotonic() - start
    assert took < SLOW, f"{took:.0f} s"
    return refused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    names, end = arguments.target or sorted(TARGETS), time.monotonic() + 60 * arguments.minutes
    done, refused, broken = dict.fromkeys(names, 0), dict.fromkeys(names, 0), set()
    seed = arguments.seed
    while time.monotonic() < end and seed - arguments.seed < arguments.rounds:
        for name in names:
            done[name] += 1
            try:
                refused[name] += fuzz(name, seed)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                where = traceback.extract_tb(error.__traceback__)[-1]
                key = (name, type(error).__name__, where.filename, where.lineno)
                if key not in broken:
                    broken.add(key)
                    print(f"--seed {seed} --target {name}: {type(error).__name__}: {str(error)[:200]!r}", flush=True)
                    print(
                        "   ",
                        *(f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)),
                    )
        seed += 1
    for name in names:
        print(f"{name:10s} {done[name]:8,d} inputs, {refused[name]:8,d} refused")
    print(f"{sum(done.values()):,} inputs, {len(broken)} places broke")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
