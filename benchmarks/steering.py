"""`python benchmarks/steering.py`: what bounds the score of steering, on `COUNT` prompts of the training split.

- `translations`: human translations of the prompts, cut as answers are, in place of answers. Their relevance is that of
  a perfect answer to this judge.
- `own language`: the model without a vector, prompted in the language itself. No vector is needed there, so this score
  is a ceiling for this model, this form of prompt and this length of answers.
- `alone` and `less`: DiffMean at `steer.hookpoints`, as the language's vector alone and less that of the prompt's
  language, at the best of `steer.strengths` for each language (chosen on the same prompts, so both are too high).
"""

import statistics as average

import polars as pl
import race
import torch

from babelscope import config
from babelscope.core.files import read_table
from babelscope.core.paths import Paths
from babelscope.corpus import lid
from babelscope.models import hardware, loading, matmul
from babelscope.models.tokens import content_ids, tokenize_corpus
from babelscope.models.top_tokens import TopTokens
from babelscope.steering import generation, judge, prompts, vectors
from babelscope.steering.run import hookpoints_of

COUNT = 16
Ids = list[list[int]]


def main() -> None:
    params, corpus = config.load(), read_table(Paths().texts).filter(split="train").sort("text_id")
    section, languages, batch = params.steer, params.languages, params.extract.batch_tokens
    model = loading.load_model(params.model, section.dtype).to(hardware.prepare(params.hardware))
    matmul.use_in(model)
    tokenizer, top, identifier = loading.load_tokenizer(params.model), TopTokens(model), lid.FastText()
    label = {name: code for code, name in identifier.match(languages)[0].items()}
    places = [vectors.place_of(name) for name in hookpoints_of(params)]
    encoder = judge.encoder_place(model, places[0])
    train = tokenize_corpus(tokenizer, corpus, params.corpus.max_tokens)
    rows, codes = vectors.collect(model, train, languages, [*{*places, encoder}], section.tokens, batch)
    mean = dict(zip(languages, vectors.means(rows[encoder], codes, len(languages)), strict=True))
    source = section.prompt_languages[0]
    lines = prompts.Lines(tokenizer, section.prompt_tokens)

    def asked_in(language: str) -> list[prompts.Prompt]:
        # The stage develops on the first texts.
        return prompts.choose(lines, corpus, [language], 2 * COUNT, "corpus.train_tokens")[language][COUNT:]

    def relevance(asked: list[prompts.Prompt], ids: Ids, named: list[str | None]) -> float:
        found = [
            judge.centred(judge.embed(model, encoder, some, asked[0].special, batch), of, mean)
            for some, of in ((ids, named), ([list(p.content) for p in asked], [p.language for p in asked]))
        ]
        own = torch.arange(len(asked))
        return float(judge.relevant(*found, own, judge.pools([len(asked)])).float().mean())

    def score(asked: list[prompts.Prompt], language: str, place: str, added: torch.Tensor | None) -> tuple[float, ...]:
        """Harmonic mean, forcing and relevance."""
        ids = generation.generate(
            top, [p.ids for p in asked], {} if added is None else {place: generation.Change(added.unsqueeze(0))},
            special=len(asked[0].special), new_tokens=section.new_tokens, temperature=[0.0] * len(asked),
            seeds=[[0]] * len(asked),
        )  # fmt: skip
        predicted = identifier.predict(tokenizer.batch_decode(ids, skip_special_tokens=True))["predicted"].to_list()
        names = {code: name for name, code in label.items()}
        forced = predicted.count(label[language]) / len(asked)
        about = relevance(asked, ids.tolist(), [names.get(code) for code in predicted])
        return 2 * forced * about / max(forced + about, 1e-12), forced, about

    asked, found = asked_in(source), list[tuple[str, str, float, float, float]]()
    for language in [name for name in label if name not in section.prompt_languages]:
        translated = corpus.filter(language=language).unique("group", keep="first", maintain_order=True)
        pairs = corpus.filter(language=source).unique("group", keep="first").join(translated, on="group", suffix="_to")
        known = lines.prompts(pairs.sort("text_id"))[: 4 * COUNT]
        text = dict(pairs.select("group", "text_to").iter_rows())
        ids = [some[: section.new_tokens] for some in content_ids(tokenizer, [text[p.group] for p in known])]
        about = relevance(known, ids, [language] * len(known)) if len(known) >= prompts.CHOICES else float("nan")
        found.append(("translations", language, 2 * about / (1 + about), 1.0, about))
        found.append(("own language", language, *score(asked_in(language), language, "", None)))
        for place in places:
            table = dict(
                zip(languages, vectors.directions("diffmean", rows[place], codes, len(languages)), strict=True)
            )
            for name, vector in (("alone", table[language]), ("less", table[language] - table[source])):
                best = max(score(asked, language, place, strength * vector) for strength in section.strengths)
                found.append((f"{name} {place}", language, *best))
        print("  ".join(f"{case} {name} {h:.2f}" for case, name, h, _, _ in found if name == language), flush=True)
    names = ["case", "language", "harmonic mean", "forcing", "relevance"]
    table = pl.DataFrame(found, schema=names, orient="row").filter(pl.col("relevance").is_not_nan())
    records = []
    for (case,), own in table.group_by("case", maintain_order=True):
        values = {name: average.fmean(own[name]) for name in names[2:]}
        print(f"{case}: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()))
        records += [race.record(str(case), name, round(value, 3), "share") for name, value in values.items()]
    race.write("steering", records)


if __name__ == "__main__":
    main()
