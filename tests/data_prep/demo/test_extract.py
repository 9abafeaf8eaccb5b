"""Run: pytest tests/data_prep/demo/test_extract.py"""

import pytest

from data_prep.demo.extract import clean_rows, declaration_rows, help_page, is_prose_in, quran_rows

PATH = "./usr/share/libreoffice/help/el/text/swriter/01/03120000.html"
HELP = """<html><body><header><p>LibreOffice 7.4 Βοήθεια για όλους εσάς εδώ</p></header>
<div id="DisplayArea">
<h1>Διάταξη   ιστού</h1>
<script>var x = "<p>όχι</p>";</script>
<p>Εμφανίζει το <span class="avis">έγγραφο</span>, όπως<br>θα φαίνεται&nbsp;στον περιηγητή.</p>
<ul><li><p>Μέσα σε λίστα</p></li><li>Χωρίς παράγραφο</li></ul>
<pre>Sub Main</pre><p><code class="bascode">Print 1</code></p>
</div>
<footer><p>This page is: /text/swriter/01/03120000.xhp</p></footer></body></html>"""


def test_a_help_page_is_named_without_its_language_and_gives_the_paragraphs_of_its_text() -> None:
    assert help_page(PATH, HELP.encode()) == (
        "text/swriter/01/03120000",
        [
            "Διάταξη ιστού",
            "Εμφανίζει το έγγραφο, όπως θα φαίνεται στον περιηγητή.",
            "Μέσα σε λίστα",
            "Χωρίς παράγραφο",
        ],
    )


def test_translations_of_a_page_share_its_name() -> None:
    english = help_page(PATH.replace("/el/", "/en-US/"), HELP.encode())
    greek = help_page(PATH, HELP.encode())
    assert english is not None and greek is not None
    assert english[0] == greek[0]


def test_what_is_not_a_page_of_the_help_text_is_left_out() -> None:
    assert help_page("./usr/share/libreoffice/help/el/noscript.html", HELP.encode()) is None
    assert help_page("./usr/share/libreoffice/help/index.html", HELP.encode()) is None
    assert help_page(PATH, b"<html><body><p>no display area</p></body></html>") == ("text/swriter/01/03120000", [])


def test_text_is_brought_to_nfc() -> None:
    page = help_page(PATH, "<div id='DisplayArea'><p>e\u0301 ο\u0301</p></div>".encode())
    assert page == ("text/swriter/01/03120000", ["\u00e9 \u03cc"])


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "Opens a dialog where you can choose a file."),
        ("el", "Ανοίγει έναν διάλογο του LibreOffice Writer για αρχεία."),
        ("hu", "Megnyit egy párbeszédablakot, ahol kiválaszthatja a fájlt."),
        ("tr", "Bir dosya seçebileceğiniz bir iletişim kutusu açar."),
        ("hi", "एक संवाद खोलता है जहाँ आप फ़ाइल चुन सकते हैं।"),
        ("zh", "打开一个对话框，您可以在其中选择一个文件。"),
    ],
)
def test_prose_is_told_from_english(language: str, text: str) -> None:
    assert is_prose_in(text, language)
    assert not is_prose_in(" ".join(text.split()[:3])[:14], language), "too short to be prose"
    if language != "en":
        assert not is_prose_in("Opens a dialog where you can choose a file.", language)


def test_hungarian_is_not_english() -> None:
    assert not is_prose_in("Megnyit egy párbeszédablakot, ahol kiválaszthatja a fájlt.", "en")


def test_rows_leave_out_english_leftovers_repetitions_and_empty_pages() -> None:
    note = "Αυτή η σημείωση εμφανίζεται σε κάθε σελίδα."
    one = "Η πρώτη σελίδα εξηγεί τα αρχεία του υπολογιστή."
    two = "Η δεύτερη σελίδα εξηγεί τις εικόνες του εγγράφου."
    left = "Ελληνικό κείμενο που το έχει και το αγγλικό πακέτο."
    pages = [
        ("text/b", [note, two, "This paragraph was never translated into Greek."]),
        ("text/a", [note, one, left]),
        ("text/c", [note, "Λίγο"]),
    ]
    assert list(clean_rows(pages, "el", frozenset({left}))) == [
        {"text": f"{note}\n{one}", "page": "text/a", "language": "el"},
        {"text": two, "page": "text/b", "language": "el"},
    ]


def test_the_declaration_gives_a_row_an_article_and_one_for_the_preamble() -> None:
    html = """<html><body><h1>Declaration</h1><header><h2>Preamble</h2><p>Whereas a,</p><p>whereas b.</p></header>
    <article data-number="1"><h2>Article 1</h2><p>All are born\n free.</p></article>
    <article data-number="2"><h2>Article 2</h2><ol><li><p>First.</p></li><li><p>Second.</p></li></ol></article>
    <article data-number="3"><h2>Article 3</h2></article></body></html>"""
    assert list(declaration_rows(html.encode(), "en")) == [
        {"text": "Whereas a,\nwhereas b.", "page": "preamble", "language": "en"},
        {"text": "All are born free.", "page": "article-1", "language": "en"},
        {"text": "First.\nSecond.", "page": "article-2", "language": "en"},
    ]


def test_a_chapter_is_a_row_with_a_line_per_verse() -> None:
    verses = [
        {"id": 1, "text": "…", "translation": "In  the\u00a0beginning"},
        {"id": 2, "text": "…", "translation": "two"},
    ]
    rows = list(quran_rows([{"id": 7, "verses": verses}, {"id": 8, "verses": verses[1:]}], "en"))
    assert rows == [
        {"text": "In the beginning\ntwo", "page": "chapter-7", "language": "en"},
        {"text": "two", "page": "chapter-8", "language": "en"},
    ]
