"""Files of the demo's packages to clean rows of text.

They are LibreOffice's help, the Universal Declaration of Human Rights, and translations of the Quran.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import lxml.html

Row = dict[str, str]
Page = tuple[str, list[str]]  # (page's name without the language, its paragraphs)

MIN_WORDS = 5
MIN_CHARACTERS_WITHOUT_SPACES = 15  # Chinese writes no spaces: characters stand in for words
SCRIPTS = {
    "el": (re.compile("[\u0370-\u03ff\u1f00-\u1fff]"), 0.6),
    "hi": (re.compile("[\u0900-\u097f]"), 0.6),
    "zh": (re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"), 0.5),
}
NOT_PROSE = "//script | //style | //nav | //pre | //code[contains(@class, 'bascode')]"
BLOCKS = "p", "h1", "h2", "h3", "li", "dd"


def clean(text: str) -> str:
    """NFC, every run of white space one space, none at the ends."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def html_paragraphs(html: bytes, area: str) -> list[str]:
    """Cleaned text of every innermost block (p, h1-h3, li, dd) inside the element that XPath `area` finds."""
    found = lxml.html.document_fromstring(html, parser=lxml.html.HTMLParser(encoding="utf-8")).xpath(area)
    if not found:
        return []
    for element in found[0].xpath(NOT_PROSE):
        element.drop_tree()
    for line_break in found[0].iter("br"):
        line_break.tail = " " + (line_break.tail or "")
    blocks = (b for b in found[0].iter(*BLOCKS) if next(b.iterdescendants("p", "li"), None) is None)
    return [text for block in blocks if (text := clean(block.text_content()))]


def help_page(path: str, html: bytes) -> Page | None:
    """A page of LibreOffice's help from its path in the Debian package; None for what is not a help page.

    The page's name is its path below the language's folder, so that translations of one page share it.
    """
    match = re.search(r"/libreoffice/help/[^/]+/(text/.+)\.html$", path)
    if match is None:
        return None
    return match[1], html_paragraphs(html, "//*[@id='DisplayArea']")


@cache
def _classifier(*languages: str) -> Callable[[str], str]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(languages))
    return lambda text: identifier.classify(text)[0]


def is_prose_in(text: str, language: str) -> bool:
    """Whether a paragraph is long enough to be prose and is in `language`.

    Judged by the share of its letters in the language's script where that tells it from English, else by language
    identification between English and `language`.
    """
    too_short = len(text) < MIN_CHARACTERS_WITHOUT_SPACES if language == "zh" else len(text.split()) < MIN_WORDS
    if too_short:
        return False
    if language in SCRIPTS:
        script, least = SCRIPTS[language]
        inside = len(script.findall(text))
        outside = sum(map(str.isalpha, script.sub("", text)))
        return inside > 0 and inside / (inside + outside) >= least
    others = ("es", "hu") if language == "en" else (language,)
    return _classifier("en", *others)(text) == language


def clean_rows(pages: Iterable[Page], language: str, english: frozenset[str] = frozenset()) -> Iterator[Row]:
    """One row a page, in the order of page names.

    Dropped are paragraphs that equal an English one (`english`: never translated), are in another language, or have
    been seen on an earlier page (so that boilerplate does not repeat), and pages that this leaves empty.
    """
    seen: set[str] = set()
    for name, paragraphs in sorted(pages):
        kept = []
        for paragraph in paragraphs:
            if paragraph in seen or paragraph in english or not is_prose_in(paragraph, language):
                continue
            seen.add(paragraph)
            kept.append(paragraph)
        if kept:
            yield {"text": "\n".join(kept), "page": name, "language": language}


def declaration_rows(html: bytes, language: str) -> Iterator[Row]:
    """The preamble and the articles of the Universal Declaration of Human Rights: one row each, without headings."""
    root = lxml.html.document_fromstring(html, parser=lxml.html.HTMLParser(encoding="utf-8"))
    for part in root.xpath("//body/header | //article[@data-number]"):
        page = "preamble" if part.tag == "header" else f"article-{part.get('data-number')}"
        paragraphs = [text for p in part.iter("p") if (text := clean(p.text_content()))]
        if paragraphs:
            yield {"text": "\n".join(paragraphs), "page": page, "language": language}


def quran_rows(chapters: list[dict[str, Any]], language: str) -> Iterator[Row]:
    """A row per chapter of quran-json, a line per verse of its translation."""
    for chapter in chapters:
        verses = (clean(verse["translation"]) for verse in chapter["verses"])
        yield {"text": "\n".join(verses), "page": f"chapter-{chapter['id']}", "language": language}
