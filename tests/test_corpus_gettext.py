from pathlib import Path

import polib
import pytest

from babelscope.config.schema import Corpus
from babelscope.core.errors import UserError
from babelscope.corpus import gettext_catalogs


def section(**changes: object) -> Corpus:
    values = dict(source="gettext", packages=[], path=None, domain=None, source_language="en", datasets=[],
                  lid=None, min_characters=1,
                  max_tokens=64, train_tokens=100, eval_tokens=10)  # fmt: skip
    return Corpus.model_validate(values | changes)


def catalog(**translations: str) -> polib.POFile:
    po = polib.POFile()
    po.metadata = {"Content-Type": "text/plain; charset=UTF-8", "Language": "xx"}
    for msgid, msgstr in translations.items():
        po.append(polib.POEntry(msgid=msgid.replace("_", " "), msgstr=msgstr))
    return po


def install(root: Path, language: str, po: polib.POFile, domain: str = "app", suffix: str = "mo") -> Path:
    path = root / language / "LC_MESSAGES" / f"{domain}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    (po.save_as_mofile if suffix == "mo" else po.save)(str(path))
    return path


def pairs(root: Path, languages: list[str], **changes: object) -> set[tuple[str, str]]:
    frame = gettext_catalogs.read(section(path=str(root), **changes), languages)
    return set(frame.select("language", "text").iter_rows())


@pytest.fixture
def locale(tmp_path: Path) -> Path:
    root = tmp_path / "catalogs"
    install(root, "pt_BR", catalog(One_house="Uma casa", Only_here="Apenas aqui", Gramps="Gramps", Empty=""))
    install(root, "de", catalog(One_house="Ein Haus"))
    install(root, "fr", catalog(French_only="Seulement en français"))
    return root


def test_bcp47_finds_posix_folders_and_english_is_the_translated_message_ids(locale: Path) -> None:
    assert pairs(locale, ["pt-BR", "en"]) == {
        ("pt-BR", "Uma casa"),
        ("pt-BR", "Apenas aqui"),
        ("en", "One house"),
        ("en", "Only here"),
    }
    assert pairs(locale, ["en", "de"]) == {("de", "Ein Haus"), ("en", "One house")}
    assert ("en", "French only") in pairs(locale, ["en"])


def test_columns_source_and_spelling(locale: Path) -> None:
    frame = gettext_catalogs.read(section(path=str(locale)), ["pt_br", "de"])
    assert frame.columns == ["language", "group", "source", "text"]
    assert frame["source"].unique().to_list() == ["gettext:catalogs"]
    assert set(frame["language"]) == {"pt_br", "de"}


def test_translations_and_variants_of_one_sentence_share_a_group(tmp_path: Path) -> None:
    de, ru = catalog(), catalog()
    de.append(polib.POEntry(msgid="%(male)s was born.", msgstr="%(male)s wurde geboren."))
    de.append(polib.POEntry(msgid="Open", msgctxt="door", msgstr="Offen"))
    ru.append(polib.POEntry(msgid="%(female)s Was born", msgstr="Она родилась"))
    ru.append(polib.POEntry(msgid="Open", msgctxt="file", msgstr="Открыть"))
    install(tmp_path, "de", de)
    install(tmp_path, "ru", ru)
    frame = gettext_catalogs.read(section(path=str(tmp_path)), ["de", "ru", "en"])
    group = dict(frame.select("text", "group").iter_rows())
    assert group["wurde geboren."] == group["Она родилась"] == group["was born."]
    assert group["Offen"] == group["Открыть"] == group["Open"] != group["was born."]


@pytest.mark.parametrize("suffix", ["mo", "po"])
def test_plural_entries_give_their_last_form(tmp_path: Path, suffix: str) -> None:
    po = catalog()
    forms = {0: "%d файл", 1: "%d файла", 2: "%d файлов"}
    po.append(polib.POEntry(msgid="%d file", msgid_plural="%d files", msgstr_plural=forms))
    install(tmp_path, "ru", po, suffix=suffix)
    assert pairs(tmp_path, ["en", "ru"]) == {("ru", "файлов"), ("en", "files")}


def test_fuzzy_obsolete_and_credit_entries_of_a_po_file_are_dropped(tmp_path: Path) -> None:
    po = catalog(Good_message="Gute Nachricht")
    po.append(polib.POEntry(msgid="Fuzzy one", msgstr="Ungewiss", flags=["fuzzy"]))
    po.append(polib.POEntry(msgid="Old one", msgstr="Veraltet", obsolete=True))
    po.append(polib.POEntry(msgid="translator-credits", msgstr="Erika Mustermann"))
    po.save(str(tmp_path / "de.po"))
    assert pairs(tmp_path, ["de", "en"], domain="ignored-for-flat-files") == {
        ("de", "Gute Nachricht"),
        ("en", "Good message"),
    }


def test_a_catalog_is_read_once_where_its_source_lies_beside_it(tmp_path: Path) -> None:
    install(tmp_path, "de", catalog(One="Eins"))
    install(tmp_path, "de", catalog(One="Eins", Two="Zwei, noch nicht übersetzt"), suffix="po")
    frame = gettext_catalogs.read(section(path=str(tmp_path)), ["de"])
    assert frame["text"].to_list() == ["Eins"]


def test_a_domain_restricts_the_catalogs(tmp_path: Path) -> None:
    install(tmp_path, "de", catalog(One="Eins"), domain="app")
    install(tmp_path, "de", catalog(Two="Zwei"), domain="other")
    assert pairs(tmp_path, ["de"], domain="other") == {("de", "Zwei")}
    assert pairs(tmp_path, ["de"]) == {("de", "Eins"), ("de", "Zwei")}
    with pytest.raises(UserError, match=r"corpus\.domain: .* no domain 'apps'.*app, other"):
        pairs(tmp_path, ["de"], domain="apps")


def test_an_unknown_language_names_those_on_offer(locale: Path) -> None:
    with pytest.raises(UserError, match=r"languages: gettext:catalogs has no 'pt-PT'; it offers: de, en, fr, pt-BR"):
        pairs(locale, ["de", "pt-PT"])
    with pytest.raises(UserError, match="'pt-BR' and 'pt_BR' are the same language"):
        pairs(locale, ["pt-BR", "pt_BR"])


def test_the_texts_of_several_packages_are_put_together(packages: None, caplog: pytest.LogCaptureFixture) -> None:
    both = section(packages=["bees", "cranes"])
    frame = gettext_catalogs.read(both, ["en", "zh-CN", "fi"])
    assert sorted(frame.select("language", "source", "text").unique().iter_rows()) == [
        ("en", "gettext:bees", "One hive"), ("en", "gettext:bees", "The end"),
        ("en", "gettext:cranes", "The end"), ("en", "gettext:cranes", "Two legs"),
        ("fi", "gettext:bees", "Loppu"),
        ("zh-CN", "gettext:bees", "一个蜂巢"), ("zh-CN", "gettext:cranes", "两条腿"),
        ("zh-CN", "gettext:cranes", "结束"),
    ]  # fmt: skip
    group = dict(frame.select("text", "group").iter_rows())
    assert group["The end"] == group["Loppu"] == group["结束"]
    assert caplog.messages == ["gettext:cranes has no messages in fi"]
    with pytest.raises(UserError, match="gettext:bees and gettext:cranes have no 'nn'; they offer: en, fi, zh-"):
        gettext_catalogs.read(both, ["en", "nn"])
    with pytest.raises(UserError, match=r"corpus\.domain: 'cranes' has no domain 'bees'"):
        gettext_catalogs.read(section(packages=["bees", "cranes"], domain="bees"), ["en", "fi"])


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two installed packages with catalogs: `bees` (fi, zh_CN) and `cranes` (zh_Hans, and an empty fi)."""
    install(tmp_path / "bees", "fi", catalog(The_end="Loppu"), domain="bees")
    install(tmp_path / "bees", "zh_CN", catalog(One_hive="一个蜂巢"), domain="bees")
    install(tmp_path / "cranes", "zh_Hans", catalog(Two_legs="两条腿", The_end="结束"))
    install(tmp_path / "cranes", "fi", catalog(The_end=""))
    for name in ("bees", "cranes"):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        files = [str(path.relative_to(tmp_path)) for path in (tmp_path / name).rglob("*.mo")]
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(str(tmp_path))


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.packages: no installed package 'no-such-package-anywhere'"):
        gettext_catalogs.read(section(packages=["no-such-package-anywhere"]), ["de"])
    with pytest.raises(UserError, match=r"corpus\.packages: 'polars' holds no catalogs"):
        gettext_catalogs.read(section(packages=["polars"]), ["de"])
    with pytest.raises(UserError, match=r"corpus\.path: no folder"):
        pairs(tmp_path / "nowhere", ["de"])
    with pytest.raises(UserError, match=r"corpus\.path: .* holds no catalogs"):
        pairs(tmp_path, ["de"])


def test_damaged_catalogs_are_named(locale: Path) -> None:
    path = locale / "de" / "LC_MESSAGES" / "app.mo"
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"not a catalog",
        whole[:20],
        whole[: len(whole) // 2],
        whole[:8] + b"\xff" * (len(whole) - 8),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"app\.mo: not a readable gettext catalog"):
            pairs(locale, ["de"])
    po = locale / "fr.po"
    for text in (b'msgid "open\nnonsense', b"\x00\xff\xfe binary"):
        po.write_bytes(text)
        with pytest.raises(UserError, match=r"fr\.po: not a readable gettext catalog"):
            pairs(locale, ["fr"])


def test_damage_to_a_language_that_is_not_asked_for_does_not_matter(locale: Path) -> None:
    (locale / "de" / "LC_MESSAGES" / "app.mo").write_bytes(b"damaged")
    assert ("fr", "Seulement en français") in pairs(locale, ["fr"])
