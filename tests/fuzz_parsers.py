"""What our own parsers are fed with: valid content, bent. `python tests/fuzz_parsers.py --minutes 10` feeds them longer.

Each parser gives a result or a `UserError`, within seconds; anything else is reported with the example that did it.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polib
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from safetensors.torch import save

from babelscope import config
from babelscope.activations.store import ActivationStore, write_index, write_shard
from babelscope.corpus import gettext_catalogs, languages, text_files
from babelscope.corpus.messages import running_text
from babelscope.errors import UserError
from babelscope.explain import prompts, scores
from babelscope.explain.client import answer_in
from babelscope.models import hookpoints
from babelscope.report.assets import embedded
from babelscope.sae import checkpoint, formats
from babelscope.tracking import state
from babelscope.tracking.training import flatten

ROOT = Path(__file__).parent.parent
# Seconds for one example, and GiB of memory for all of them, torch and polars themselves included.
SLOW, MOST = 10.0, 6.0
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))

PIECES = ["<b>", "</b>", "<", ">", "</", "%s", "%(name)", "%(", "{", "}", "${", "\x00", "_", "&", "&#", "&amp;", "(", ")",
          "«", "»", "“", "”", ".", " ", "\n", "\u2028", "Wort", "שלום", "字", "%1", "(_A)", "[", "]", "'", "\ud800"]  # fmt: skip
texts = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
    st.tuples(st.sampled_from(PIECES), st.integers(0, 2000)).map(lambda pair: pair[0] * pair[1]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def bent(draw: Callable[..., Any], whole: bytes) -> bytes:
    """Valid content with some bytes changed, some cut out, some repeated, or cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.integers(0, 4)):
            case 0:
                content[place : place + 1] = draw(st.binary(min_size=1, max_size=4))
            case 1:
                del content[place : place + draw(st.integers(1, 64))]
            case 2:
                content[place:place] = content[place : place + draw(st.integers(1, 64))]
            case 3:
                # Offsets and lengths: the largest, and those near the end.
                number = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(whole)]))
                content[place : place + 4] = number.to_bytes(4, "little")
            case _:
                del content[place:]
    return bytes(content)


@st.composite
def altered(draw: Callable[..., Any], whole: Any) -> Any:
    """A JSON-like value in which some values are replaced, and some keys taken out."""
    result = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(0, 3))):
        parent, key = None, None
        node = result
        while isinstance(node, dict | list) and node and (parent is None or draw(st.integers(0, 2))):
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
            parent, node = node, node[key]
        if parent is None:
            return draw(values)
        if draw(st.booleans()):
            parent[key] = draw(values)
        elif isinstance(parent, dict):
            del parent[key]
    return result


class Parser(NamedTuple):
    """What is fed (`given`), and what it is fed to."""

    given: st.SearchStrategy[Any]
    parse: Callable[[Any], object]


def written(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _catalog() -> polib.POFile:
    catalog = polib.POFile()
    catalog.metadata = {"Content-Type": "text/plain; charset=UTF-8", "Plural-Forms": "nplurals=2; plural=n != 1;"}
    for number in range(4):
        catalog.append(
            polib.POEntry(msgid=f"<b>Message</b> {number} %s", msgstr=f"Nachricht {number} «x»", msgctxt="c")
        )
    catalog.append(polib.POEntry(msgid="one", msgid_plural="many", msgstr_plural={0: "eins", 1: "viele"}))
    return catalog


def catalog(suffix: str) -> Callable[[bytes], object]:
    def parse(content: bytes) -> object:
        folder = written(f"catalogs-{suffix}/de.{suffix}", content).parent
        section = {"source": "gettext", "package": None, "path": str(folder), "domain": None}
        params = config.Corpus.model_validate(PARAMS["corpus"] | section)
        frame = gettext_catalogs.read(params, ["de"])
        for text in frame["text"]:
            one_line(text)
        return frame

    return parse


def one_line(text: str) -> str:
    assert "\x00" not in text and text == " ".join(text.split()), text
    return text


def table(suffix: str) -> Callable[[bytes], object]:
    def parse(content: bytes) -> object:
        frame = text_files._table(written(f"texts/de.{suffix}", content), "de")
        assert frame.columns == ["language", "group", "text"] and not frame["text"].null_count()
        frame.write_ipc(FOLDER / "table.arrow")  # lone surrogates would not go through
        return frame

    return parse


def released(kind: formats.Format) -> Callable[[tuple[Any, bytes]], object]:
    def parse(files: tuple[Any, bytes]) -> object:
        settings_, weights = files
        folder = FOLDER / kind.name.replace("/", "-")
        written(f"{folder.name}/{kind.weights}", weights)
        if kind.settings:
            written(f"{folder.name}/{kind.settings}", json.dumps(settings_).encode())
        sae = checkpoint.load(folder)
        return sae(torch.zeros(2, sae.d_in))

    return parse


def _numpy(tensors: dict[str, torch.Tensor]) -> bytes:
    path = FOLDER / "whole.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    return path.read_bytes()


def _torch(tensors: dict[str, torch.Tensor]) -> bytes:
    path = FOLDER / "whole.pt"
    torch.save(tensors, path)
    return path.read_bytes()


def _releases() -> dict[str, Parser]:
    n, d = 6, 4
    ones = torch.ones
    ours = {"W_enc": ones(d, n), "W_dec": ones(n, d), "b_enc": ones(n), "b_dec": ones(d)}
    linear = {"encoder.weight": ones(n, d), "encoder.bias": ones(n), "b_dec": ones(d)}
    wide = linear | {"decoder.weight": ones(d, n), "threshold": torch.tensor(0.5), "k": torch.tensor(2)}
    llama = {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "jump_relu_threshold": 0.1,
             "dataset_average_activation_norm": {"in": 2.0, "out": 3.0}, "use_decoder_bias": True,
             "sparsity_include_decoder_norm": True, "hook_point_in": "a", "hook_point_out": "b"}  # fmt: skip
    saelens = {"architecture": "topk", "k": 2, "d_in": d, "d_sae": n, "apply_b_dec_to_input": False,
               "rescale_acts_by_decoder_norm": True, "normalize_activations": "none"}  # fmt: skip
    files: list[tuple[formats.Format, Any, bytes]] = [
        (formats.SAELENS, saelens, save(ours)),
        (formats.SPARSIFY, {"activation": "topk", "k": 2, "transcode": False}, save(linear | {"W_dec": ones(n, d)})),
        (formats.GEMMA_SCOPE, {}, _numpy(ours | {"threshold": ones(n)})),
        (formats.LLAMA_SCOPE, llama, save(wide | {"decoder.bias": ones(d)})),
        (formats.DICTIONARY_LEARNING, {"trainer": {"dict_class": "BatchTopKSAE"}}, _torch(wide)),
    ]
    return {
        f"released {kind.name}": Parser(
            st.tuples(altered(config_) if config_ else st.just({}), st.one_of(st.just(weights), bent(weights))),
            released(kind),
        )
        for kind, config_, weights in files
    }


def _store(content: tuple[Any, bytes]) -> object:
    index, shard = content
    written("store/index.json", json.dumps(index).encode())
    store = ActivationStore(written("store/shard-00000.safetensors", shard).parent)
    return [chunk.sum() for _, chunk in store.chunks(3)], store.gather(torch.arange(store.rows))


def _stored(quantised: bool) -> tuple[Any, bytes]:
    folder = FOLDER / "whole"
    write_shard(folder, 0, torch.ones(5, 4, dtype=torch.float16), quantised=quantised)
    write_index(folder, [5], 4, "float16", "tiny", "layers.0")
    return json.loads((folder / "index.json").read_text()), (folder / "shard-00000.safetensors").read_bytes()


def _stores() -> dict[str, Parser]:
    both = [_stored(quantised) for quantised in (False, True)]
    strategy = st.one_of(*(st.tuples(altered(index), st.just(shard) | bent(shard)) for index, shard in both))
    return {"activation store": Parser(strategy, _store)}


def _lock(content: Any) -> object:
    written("pipeline/dvc.lock", content if isinstance(content, bytes) else json.dumps(content).encode())
    written("pipeline/dvc.yaml", (ROOT / "dvc.yaml").read_bytes())
    return state.read(FOLDER / "pipeline", PARAMS)


def _yaml(content: bytes) -> object:
    return config.parse(config.read_yaml(written("params.yaml", content)))


def _verdicts(content: tuple[str, int]) -> object:
    found = prompts.verdicts(*content)
    assert found is None or len(found) == content[1]
    return scores.balanced_accuracy([True, False] * content[1], [*(found or [None] * content[1])] * 2)


def _answer(content: bytes) -> object:
    found = answer_in(content)
    return None if found is None else found.encode()


def _marked(content: list[tuple[str, bool]]) -> object:
    pieces, on = [piece for piece, _ in content], [mark for _, mark in content]
    text = prompts.marked(pieces, on)
    assert len(text) == len("".join(pieces)) + 4 * text.count("<<") or "<" in "".join(pieces) or ">" in "".join(pieces)
    return scores.fuzzed(on, [0])


def _match(content: tuple[list[str], list[str]]) -> object:
    return languages.match(*content, "source"), [languages.normalise(name) for name in content[0]]


def _embedded(content: Any) -> object:
    page_text = embedded(content)
    assert not set("<>&\u2028\u2029") & set(page_text)
    return page_text


PARAMS = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
_LOCK = YAML(typ="safe", pure=True).load((ROOT / "dvc.lock").read_text(encoding="utf-8"))
_CATALOG = _catalog()
_tags = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["de", "pt_BR.UTF-8", "sr@latin", "zho_Hans", "cmn_Hani", "no", "deu", "en-x-a", "@", "-", "_"]),
)
_lines = b'{"text": "ein Satz", "id": 3}\n{"text": "noch einer \\ud83d", "group": "g"}\n\n'
_reply = b'{"choices": [{"message": {"role": "assistant", "content": "A sentence \\ud800 [0, 1]."}}]}'

PARSERS: dict[str, Parser] = {
    "gettext .mo": Parser(st.binary(max_size=200) | bent(_CATALOG.to_binary()), catalog("mo")),
    "gettext .po": Parser(st.binary(max_size=200) | bent(str(_CATALOG).encode()), catalog("po")),
    "running text": Parser(texts, lambda text: one_line(running_text(text))),
    "texts .jsonl": Parser(st.binary(max_size=200) | bent(_lines), table("jsonl")),
    "texts .txt": Parser(st.binary(max_size=200) | bent("ein Satz\nשלום\n".encode()), table("txt")),
    **_releases(),
    **_stores(),
    "verdicts": Parser(
        st.tuples(
            texts | bent(b"texts [1] to [3]: [0, 1, 1]").map(lambda b: b.decode(errors="replace")), st.integers(1, 5)
        ),
        _verdicts,
    ),
    "answer of an endpoint": Parser(
        st.binary(max_size=100) | bent(_reply) | altered(json.loads(_reply)).map(lambda v: json.dumps(v).encode()),
        _answer,
    ),
    "marks": Parser(st.lists(st.tuples(texts, st.booleans()), max_size=12), _marked),
    "dvc.lock": Parser(
        bent((ROOT / "dvc.lock").read_bytes()[:1500])
        | altered({"stages": {k: _LOCK["stages"][k] for k in list(_LOCK["stages"])[:6]}}),
        _lock,
    ),
    "params.yaml as text": Parser(bent((ROOT / "params.yaml").read_bytes()[:2500]), _yaml),
    "params.yaml as values": Parser(altered(PARAMS), config.parse),
    "flat params": Parser(st.dictionaries(st.text(max_size=8), values, max_size=4), flatten),
    "hookpoint names": Parser(texts, hookpoints.layer_of),
    "languages": Parser(st.tuples(st.lists(_tags, max_size=4), st.lists(_tags, max_size=6)), _match),
    "nearest language": Parser(
        st.tuples(_tags, st.lists(_tags, max_size=6)), lambda pair: languages.nearest_tag(*pair)
    ),
    "JSON in a page": Parser(texts | st.dictionaries(texts, st.lists(texts, max_size=3), max_size=3), _embedded),
}


def feed(name: str, examples: int, start: int) -> int:
    """Feed one parser; returns how many examples it took. What it must not raise is raised, with the smallest example."""
    parser, count = PARSERS[name], 0

    @seed(start)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate, Phase.shrink])  # fmt: skip
    @given(parser.given)
    def run(content: Any) -> None:
        nonlocal count
        count += 1
        before = time.process_time()
        try:
            parser.parse(content)
        except UserError as error:
            assert str(error).strip()
        took = time.process_time() - before
        assert took < SLOW, f"{took:.0f} s"

    run()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert used < MOST, f"{name}: {used:.1f} GiB"
    return count


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=10.0)
    arguments.add_argument("--only", choices=PARSERS)
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    totals, failed = dict.fromkeys([chosen.only] if chosen.only else PARSERS, 0), []
    end, turn = time.monotonic() + 60 * chosen.minutes, 0
    while time.monotonic() < end:
        for name in totals:
            if name in failed or time.monotonic() > end:
                continue
            try:
                totals[name] += feed(name, 200, turn)
            except BaseException as error:
                failed.append(name)
                print(f"--- {name}: {type(error).__name__}: {error}\n{getattr(error, '__notes__', '')}", flush=True)
                if isinstance(error, KeyboardInterrupt):
                    raise
        turn += 1
    for name, count in totals.items():
        print(f"{name:32} {count:8,} examples{'  FAILED' if name in failed else ''}")
    print(
        f"{'all':32} {sum(totals.values()):8,} examples, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
