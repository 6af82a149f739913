"""Tiny stand-ins of the models, data sets and released SAEs that experiments/*.yaml name, laid out as on the hub."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

# What the texts of a language are drawn from.
WORDS = {
    "en": "the house of my friend stands near a river and every morning we drink warm coffee",
    "de": "das Haus von meinem Freund steht nahe einem Fluss und jeden Morgen trinken wir warmen Kaffee",
    "fr": "cette maison de mon ami est près d'une rivière et chaque matin nous buvons du café",
    "it": "la casa del mio amico sta vicino al fiume e ogni mattina noi beviamo caldo caffè",
    "pt": "esta casa do meu amigo fica perto do rio e todas as manhãs nós bebemos café quente",
    "hi": "मेरे दोस्त का घर नदी के पास है और हर सुबह हम लोग गरम कॉफ़ी पीते",
    "es": "aquella casa de mi amigo está cerca del río y cada mañana nosotros bebemos mucho café",
    "th": "บ้าน ของ เพื่อน ฉัน อยู่ ใกล้ แม่น้ำ และ ทุก เช้า พวกเรา ดื่ม กาแฟ อุ่น ด้วย กัน",
    "bg": "тази къща на моя приятел се намира близо до реката и всяка сутрин ние пием",
    "ru": "этот дом моего друга стоит рядом с рекой и каждое утро мы пьём горячий кофе",
    "tr": "arkadaşımın bu evi bir nehrin hemen yanında duruyor ve her sabah biz sıcak kahve içiyoruz orada",
    "vi": "ngôi nhà của bạn tôi nằm gần một con sông và mỗi sáng chúng tôi uống",
    "ja": "友達 の 家 は 川 の 近く に あって 毎朝 私たち は 温かい コーヒー を 飲みます",
    "ko": "내 친구의 집은 강 가까이에 있고 우리는 매일 아침 따뜻한 커피를 함께 천천히 마신다 그리고 웃는다",
    # fastText's identifier has no label for Zulu.
    "zu": "indlu yomngani wami ime eduze komfula omkhulu futhi njalo ekuseni siphuza ikhofi elishisayo sonke",
    "zh": "我 朋友 的 房子 在 河边 附近 每天 早上 我们 一起 喝 很 热 咖啡 吧",
}
UNSPACED = ("th", "ja", "zh")
# What data sets call a language that is not called by its tag.
FLORES = {
    "en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn", "it": "ita_Latn", "pt": "por_Latn", "hi": "hin_Deva",
    "es": "spa_Latn", "th": "tha_Thai", "bg": "bul_Cyrl", "ru": "rus_Cyrl", "tr": "tur_Latn", "vi": "vie_Latn",
    "ja": "jpn_Jpan", "ko": "kor_Hang", "zh": "cmn_Hans",
}  # fmt: skip
PAWS_X = ("de", "en", "es", "fr", "ja", "ko", "zh")
XNLI = ("bg", "de", "en", "es", "fr", "hi", "ru", "th", "tr", "vi", "zh")
# Of WiLI's 235 labels: those of the languages here, among others, one that is no language tag and relatives.
WILI = ("be-tarask", "zh-yue", "hbs", "roa-tara", *(code[:3] for code in FLORES.values() if code != "cmn_Hans"),
        "zho", "lzh", "nob", "map-bms")  # fmt: skip

Row = dict[str, Any]


def text(language: str, number: int, words: int = 12, source: str = "") -> str:
    """The text of this number in a source: as long in every language, but for what the words are."""
    known = WORDS[language].split()
    draw = random.Random(f"{source}/{number}")
    chosen = [known[draw.randrange(len(known))] for _ in range(draw.randint(words, 2 * words))]
    return ("" if language in UNSPACED else " ").join(chosen)


def write_dataset(folder: Path, subsets: Mapping[str, Mapping[str, list[Row]]], file: str) -> Path:
    """Rows by subset and split as Parquet files, named by the card; `file` has {subset} and {split} to fill in."""
    configs = []
    for subset, splits in subsets.items():
        named = []
        for split, rows in splits.items():
            path = folder / file.format(subset=subset, split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            pl.DataFrame(rows).write_parquet(path)
            named.append({"split": split, "path": str(path.relative_to(folder))})
        configs.append({"config_name": subset, "data_files": named})
    card = f"---\nlicense: cc-by-sa-4.0\nconfigs: {json.dumps(configs)}\n---\n# A stand-in\n"
    (folder / "README.md").write_text(card)
    return folder


def xnli(folder: Path, rows: int) -> Path:
    """Every premise with three hypotheses, which repeat part of it."""

    def row(language: str, split: str, i: int) -> Row:
        premise = text(language, i // 3, source=f"xnli/{split}")
        return {"premise": premise, "hypothesis": text(language, i, 7, f"xnli/{split}/h"), "label": i % 3}

    splits = {"train": rows, "test": rows, "validation": rows}
    codes = {code: {s: [row(code, s, i) for i in range(n)] for s, n in splits.items()} for code in XNLI}
    both = {"premise": [text(code, 0) for code in XNLI], "hypothesis": [{"language": c, "text": c} for c in XNLI]}
    codes["all_languages"] = {split: [{**both, "label": 0}] for split in splits}
    return write_dataset(folder, codes, "{subset}/{split}-00000-of-00001.parquet")


def paws_x(folder: Path, rows: int) -> Path:
    """Pairs of sentences that have all words in common."""

    def row(language: str, split: str, i: int) -> Row:
        first = text(language, i, source=f"paws-x/{split}")
        parts = list(first) if language in UNSPACED else first.split()
        second = ("" if language in UNSPACED else " ").join(parts[3:] + parts[:3])
        return {"id": i + 1, "sentence1": first, "sentence2": second, "label": i % 2}

    splits = {"train": rows, "test": rows, "validation": rows}
    codes = {code: {s: [row(code, s, i) for i in range(n)] for s, n in splits.items()} for code in PAWS_X}
    return write_dataset(folder, codes, "{subset}/{split}-00000-of-00001.parquet")


def flores_plus(folder: Path, rows: int) -> Path:
    def row(language: str, split: str, i: int) -> Row:
        code, script = FLORES[language].split("_")
        return {"id": i, "iso_639_3": code, "iso_15924": script, "glottocode": "stan1234", "domain": "wikinews",
                "text": text(language, i, source=f"flores/{split}")}  # fmt: skip

    splits = {"dev": rows, "devtest": rows}
    codes = {code: {s: [row(name, s, i) for i in range(n)] for s, n in splits.items()} for name, code in FLORES.items()}
    codes["cmn_Hant"] = codes["yue_Hant"] = codes["cmn_Hans"]
    return write_dataset(folder, codes, "{split}/{subset}.parquet")


def wikipedia(folder: Path, rows: int) -> Path:
    def row(language: str, i: int) -> Row:
        article = "\n\n".join(text(language, i, 30, f"wikipedia/{part}") for part in range(3))
        return {"id": str(i), "url": f"https://{language}.wikipedia.org", "title": str(i), "text": article}

    codes = {f"20231101.{code}": {"train": [row(code, i) for i in range(rows)]} for code in WORDS}
    for other in ("simple", "be-x-old", "zh-min-nan", "zh-classical", "roa-rup"):
        codes[f"20231101.{other}"] = codes["20231101.en"]
    return write_dataset(folder, codes, "{subset}/train-00000-of-00001.parquet")


def fineweb_2(folder: Path, rows: int) -> Path:
    codes = {code if name != "zh" else "cmn_Hani": {"train": [
        {"text": text(name, i, 20, "fineweb"), "id": f"<urn:{i}>", "dump": "CC-MAIN", "language_score": 0.9}
        for i in range(rows)]} for name, code in FLORES.items() if name != "en"}  # fmt: skip
    return write_dataset(folder, codes, "data/{subset}/{split}/000_00000.parquet")


def tatoeba(folder: Path, rows: int) -> Path:
    pairs = {f"en-{code}": {"train": [
        {"english": text("en", i, 6, "tatoeba"), "non_english": text(code, i, 6, "tatoeba")} for i in range(rows)
    ]} for code in WORDS if code != "en"}  # fmt: skip
    return write_dataset(folder, pairs, "{subset}/{split}-00000-of-00001.parquet")


def text_files(folder: Path, languages: Sequence[str], rows: int) -> Path:
    """One file per language; the languages take turns in the three kinds of files."""
    folder.mkdir(parents=True)
    for number, language in enumerate(languages):
        texts = [text(language, i, source=folder.name) for i in range(rows)]
        file = folder / f"{language}.txt"
        if number % 3 == 0:
            pl.DataFrame({"id": range(rows), "text": texts}).write_parquet(file.with_suffix(".parquet"))
        elif number % 3 == 1:
            lines = [json.dumps({"id": i, "text": one}) for i, one in enumerate(texts)]
            file.with_suffix(".jsonl").write_text("\n".join(lines))
        else:
            file.write_text("\n".join(texts))
    return folder


def wili_2018(folder: Path, rows: int) -> Path:
    """One table of all languages, in the order of chance, whose labels are numbers."""
    from datasets import ClassLabel, Dataset, Features, Value

    names = {"zho": "zh"} | {code[:3]: name for name, code in FLORES.items()}
    pairs = [(i, label) for i in range(rows) for label in range(len(WILI))]
    random.Random(0).shuffle(pairs)
    known = [names.get(WILI[label], "en") for _, label in pairs]
    table = {"sentence": [text(name, i, 14, "wili") for (i, _), name in zip(pairs, known, strict=True)],
             "label": [label for _, label in pairs]}  # fmt: skip
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=list(WILI))})
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        Dataset.from_dict(table, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


DATASETS = {"xnli": xnli, "paws-x": paws_x, "flores-plus": flores_plus, "wikipedia": wikipedia,
            "fineweb-2": fineweb_2, "tatoeba": tatoeba, "wili-2018": wili_2018}  # fmt: skip


def texts_to_learn(rows: int = 60) -> Iterator[str]:
    return (text(language, i, source="tokenizer") for i in range(rows) for language in WORDS)


def _byte_level(special: Sequence[str], bos: str | None) -> tokenizers.Tokenizer:
    """As Llama 3, GPT-NeoX and Qwen have it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=list(special), initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    made.train_from_iterator(texts_to_learn(), trainer)
    if bos is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return made


def _byte_fallback(special: Sequence[str], bos: str) -> tokenizers.Tokenizer:
    """As Gemma has it: spaces are letters, and a character that is not in the vocabulary is the bytes of its UTF-8."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=list(special), max_token_length=8,
                                  limit_alphabet=150, show_progress=False)  # fmt: skip
    made.train_from_iterator(texts_to_learn(), trainer)
    content = json.loads(made.to_str())
    vocabulary = content["model"]["vocab"]
    first = max(vocabulary.values()) + 1
    vocabulary.update({f"<0x{byte:02X}>": first + byte for byte in range(256)})
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return made


def family(name: str) -> tuple[Any, dict[str, Any], tokenizers.Tokenizer, dict[str, str]]:
    """Configuration class, its settings, tokenizer and special tokens of a model class as the hub has it."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    match name:
        case "llama":
            special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
            rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 256}  # fmt: skip
            settings = {**heads, "tie_word_embeddings": True, "rope_parameters": rope, "max_position_embeddings": 1024}
            return transformers.LlamaConfig, settings, _byte_level([*special.values()], special["bos_token"]), special
        case "gemma2":
            special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
            settings = {**heads, "query_pre_attn_scalar": 16, "sliding_window": 16, "max_position_embeddings": 1024}
            return transformers.Gemma2Config, settings, _byte_fallback([*special.values()], "<bos>"), special
        case "gemma3":
            special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
            settings = {**heads, "query_pre_attn_scalar": 16, "sliding_window": 512, "max_position_embeddings": 1024}
            return transformers.Gemma3TextConfig, settings, _byte_fallback([*special.values()], "<bos>"), special
        case "gpt_neox":
            special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
            settings = {"num_attention_heads": 2, "rotary_pct": 0.25, "max_position_embeddings": 1024,
                        "use_parallel_residual": True}  # fmt: skip
            return transformers.GPTNeoXConfig, settings, _byte_level(["<|endoftext|>", "<|padding|>"], None), special
        case "qwen3":
            special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
            settings = {**heads, "tie_word_embeddings": True, "max_position_embeddings": 1024}
            return transformers.Qwen3Config, settings, _byte_level([*special.values()], None), special
    raise ValueError(name)


def model(folder: Path, name: str, blocks: int, padded: int = 32) -> Path:
    """A random model of a family with its tokenizer: `padded` rows of the embedding belong to no token."""
    kind, settings, made, special = family(name)
    torch.manual_seed(0)
    # Weights so large that a block changes what the next ones see.
    sizes = {"vocab_size": made.get_vocab_size() + padded, "hidden_size": 32, "intermediate_size": 64,
             "num_hidden_layers": blocks, "initializer_range": 0.2}  # fmt: skip
    ids = {f"{key}_id": made.token_to_id(value) for key, value in special.items() if key != "unk_token"}
    built = transformers.AutoModelForCausalLM.from_config(kind(**sizes, **settings, **ids))
    _speak(built, made)
    built.save_pretrained(folder)
    # What a release's own settings do to generation is not to be in a measurement.
    awkward = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "max_length": 20,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "eos_token_id": [ids["eos_token_id"], 5],
    }
    (folder / "generation_config.json").write_text(json.dumps({**ids, **awkward}))  # fmt: skip
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


def _speak(built: Any, tokenizer: tokenizers.Tokenizer) -> None:
    """Let the embedding of a token lean to the language whose texts have it most often."""
    counts = torch.zeros(len(WORDS), built.config.vocab_size)
    for number, language in enumerate(WORDS):
        ids = [i for n in range(30) for i in tokenizer.encode(text(language, n, source="tokenizer")).ids]
        counts[number] = torch.bincount(torch.tensor(ids), minlength=built.config.vocab_size)
    directions = torch.nn.functional.normalize(torch.randn(len(WORDS), built.config.hidden_size), dim=1)
    with torch.no_grad():
        built.get_input_embeddings().weight += 1.5 * (counts / counts.sum(0).clamp(min=1)).T @ directions


def planted(
    folder: Path,
    hookpoints: Sequence[str],
    languages: Sequence[str],
    latents: int = 48,
    at_input: bool = False,
) -> dict[str, dict[str, torch.Tensor]]:
    """Encoders at a model's hookpoints of which the first ones each tell one language from the others.

    Returns
    -------
    By hookpoint `W_enc` `[d, n]`, `W_dec` `[n, d]`, `b_enc` `[n]`, `b_dec` `[d]`: a linear
    discriminant of each language, and random directions behind.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    built = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    modules = {name: built.get_submodule(f"{built.base_model_prefix}.{name}") for name in hookpoints}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in hookpoints}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda _module, inputs, output, name=name: seen[name].append((inputs[0] if at_input else output)[mask])
        )
    code = []
    with torch.no_grad():
        for language in languages:
            ids = [tokenizer(text(language, number, source="planted"))["input_ids"] for number in range(30)]
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in ids], True, -1)
            mask = padded >= 0
            built(padded.clamp(min=0), attention_mask=mask.long())
            code.append(torch.full((int(mask.sum()),), languages.index(language)))
    own, result = torch.cat(code), {}
    draw = torch.Generator().manual_seed(0)
    for name in hookpoints:
        x = torch.cat(seen[name]).float()
        mean, covariance = x.mean(0), torch.cov(x.T)
        ridge = covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
        means = torch.stack([x[own == number].mean(0) - mean for number in range(len(languages))])
        directions = torch.linalg.solve(ridge, means.T).T
        others = torch.randn(latents - len(languages), x.shape[1], generator=draw)
        W_enc = torch.cat([directions, others])
        scores = (x - mean) @ W_enc.T
        W_enc = W_enc / scores.std(0)[:, None]
        W_dec = torch.cat([means, others]) / torch.cat([means, others]).norm(dim=1, keepdim=True)
        scores = (x - mean) @ W_enc.T
        # Above the 0.99 quantile of the others' tokens, or of all tokens.
        levels = [scores[own != number, number].quantile(0.99) for number in range(len(languages))]
        levels += [scores[:, number].quantile(0.9) for number in range(len(languages), latents)]
        result[name] = {"W_enc": W_enc.T, "W_dec": W_dec, "b_enc": -torch.stack(levels), "b_dec": mean}
    return result


def sparsify_release(folder: Path, saes: Mapping[str, Mapping[str, torch.Tensor]], k: int = 8) -> Path:
    """As EleutherAI releases them: a folder per hookpoint, and their training's settings beside."""
    for hookpoint, sae in saes.items():
        (folder / hookpoint).mkdir(parents=True)
        weights = {"encoder.weight": sae["W_enc"].T, "encoder.bias": sae["b_enc"], "W_dec": sae["W_dec"],
                   "b_dec": sae["b_dec"]}  # fmt: skip
        save_file({name: x.contiguous() for name, x in weights.items()}, folder / hookpoint / "sae.safetensors")
        d, n = sae["W_enc"].shape
        settings = {"expansion_factor": n // d, "normalize_decoder": True, "num_latents": n, "k": k, "signed": False,
                    "multi_topk": False, "d_in": d}  # fmt: skip
        (folder / hookpoint / "cfg.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"hookpoints": list(saes), "batch_size": 32}))
    return folder


def saelens_transcoders(
    folder: Path, saes: Mapping[str, Mapping[str, torch.Tensor]], folders: Mapping[str, str]
) -> Path:
    """As SAELens keeps JumpReLU transcoders."""
    for hookpoint, sae in saes.items():
        place = folder / folders[hookpoint]
        place.mkdir(parents=True)
        d, n = sae["W_enc"].shape
        weights = {"W_enc": sae["W_enc"], "W_dec": sae["W_dec"], "b_enc": -sae["b_dec"] @ sae["W_enc"],
                   "b_dec": sae["b_dec"], "threshold": -sae["b_enc"]}  # fmt: skip
        save_file({name: x.contiguous() for name, x in weights.items()}, place / "sae_weights.safetensors")
        settings = {"architecture": "jumprelu_transcoder", "d_in": d, "d_sae": n, "d_out": d, "dtype": "float32",
                    "apply_b_dec_to_input": False, "normalize_activations": "none", "metadata": {}}  # fmt: skip
        (place / "cfg.json").write_text(json.dumps(settings))
    return folder


def gemma_scope_release(
    folder: Path, saes: Mapping[str, Mapping[str, torch.Tensor]], folders: Mapping[str, str]
) -> Path:
    """As Google releases them: a folder per layer, width and mean L0; nothing is taken off the input.

    Gemma Scope 2 has `params.safetensors` with names in lower case, and not always a `config.json`.
    """
    for hookpoint, sae in saes.items():
        place = folder / folders[hookpoint]
        place.mkdir(parents=True)
        arrays = {"W_enc": sae["W_enc"], "W_dec": sae["W_dec"], "b_enc": -sae["b_dec"] @ sae["W_enc"],
                  "b_dec": sae["b_dec"], "threshold": -sae["b_enc"]}  # fmt: skip
        if folder.name.startswith("gemma-scope-2-"):
            lower = {name.lower(): x.contiguous() for name, x in arrays.items()}
            save_file(lower, place / "params.safetensors")
        else:
            np.savez(place / "params.npz", **{name: x.numpy() for name, x in arrays.items()})
    return folder


def qwen_scope_release(folder: Path, saes: Mapping[str, Mapping[str, torch.Tensor]], files: Mapping[str, str]) -> Path:
    """As Qwen releases them: a file per layer, weights transposed, k in the name of the repository."""
    folder.mkdir(parents=True)
    for hookpoint, sae in saes.items():
        tensors = {"W_enc": sae["W_enc"].T.clone(), "W_dec": sae["W_dec"].T.clone(), "b_dec": sae["b_dec"],
                   "b_enc": sae["b_enc"] - sae["b_dec"] @ sae["W_enc"]}  # fmt: skip
        torch.save(tensors, folder / files[hookpoint])
    return folder
