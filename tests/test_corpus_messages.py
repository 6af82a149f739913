import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babelscope.corpus.messages import running_text


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("<b>Making a Site</b><br/>You can <i>easily</i> export.", "Making a Site You can easily export."),
        ("%(name)s was born in %(place)s%(endnotes)s.", "was born in."),
        ("He married %(spouse)s on %(date)s, and died.", "He married on, and died."),
        ("%(male_name)sは%(month_year)sに生まれました%(endnotes)s。", "はに生まれました。"),
        ("Could not open %s: %d of %5.1f%% done", "Could not open: of done"),
        ("Translated to %(share)s\u202f%%, 5%% left", "Translated to, 5% left"),
        ("Use {{branch}} for the branch, ``%s`` is `wlu`", "Use for the branch, is `wlu`"),
        ("Set LC_MESSAGES", "Set LC MESSAGES"),
        ("Sure, 100% of them; 50%now", "Sure, 100% of them; 50%now"),
        ("{number_of} children of {name:>5} and ${other} or %{last}", "children of and or"),
        ("Elapsed: %.2fs in %1$s or %1", "Elapsed: s in or"),
        ("_Open the Fami&ly tree", "Open the Family tree"),
        ("ファイルを開く(_O)...", "ファイルを開く..."),
        ("AT&amp;T &lt;substring&gt; &quot;x&quot;", 'ATT substring "x"'),
        ("Matches <текст> in a note", "Matches текст in a note"),
        ("<link href='x'>Docs</link> and <guilabel>Tools</guilabel>", "Docs and Tools"),
        ('File "%s" (%d) is gone', "File is gone"),
        ("first line\n\tsecond\r\nthird", "first line second third"),
        ("Edit_a_note_in_Gramps", "Edit a note in Gramps"),
        ("if a < b and c > d", "if a < b and c > d"),
        ("%s", ""),
        ("", ""),
    ],
)
def test_markup_and_placeholders_leave_clean_words(message: str, words: str) -> None:
    assert running_text(message) == words


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_any_message_gives_one_trimmed_line(message: str) -> None:
    text = running_text(message)
    assert text == " ".join(text.split())
    assert "\x00" not in text and "_" not in text


@pytest.mark.parametrize(
    "piece",
    [
        "</b>",
        "%s",
        "\x00",
        " ",
        " \x00",
        '"\x00',
        "{0}",
        "%1",
        "0",
        "(",
        "<b ",
        "<",
        "&",
        "&#0",
        "a",
        "%(a",
        "(\x00",
        "`",
        "`\x00",
        "{{",
        "{{a}}",
        "A_",
    ],
)
def test_the_time_grows_with_the_length_alone(piece: str) -> None:
    for begin in ("", "<b", "%", "%(", "(", "x\x00", "&#"):  # "</b>" 2,000 times took 13 s, four times as many an hour
        message = begin + piece * (200_000 // len(piece))
        before = time.process_time()
        running_text(message)
        assert time.process_time() - before < 2
