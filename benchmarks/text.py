"""Real text in twenty-one languages for benchmarks: the help pages of an office suite, from Debian's packages."""

import json
from pathlib import Path

from common.files import write_text
from data_prep.demo import download
from data_prep.demo.extract import help_page

# About 100 MB of .jsonl; Latin, Greek, Cyrillic, Devanagari, Chinese, Japanese and Korean script.
LANGUAGES = (
    *("cs", "da", "de", "el", "en-us", "es", "fi", "fr", "hi", "hu", "it"),
    *("ja", "ko", "nl", "pl", "pt-br", "ru", "sv", "tr", "vi", "zh-cn"),
)


def fetch_text(folder: Path) -> list[Path]:
    """One .jsonl a language, with the fields text and page; what is there already is not fetched again."""
    downloads = folder / ".downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    paths = []
    for language in LANGUAGES:
        path = folder / f"{language}.jsonl"
        if not path.is_file():
            deb = download.fetch_deb(downloads, f"libreoffice-help-{language}")
            pages = (help_page(name, html) for name, html in download.read_deb(deb, ".html"))
            rows = [{"text": "\n".join(page[1]), "page": page[0]} for page in pages if page is not None and page[1]]
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            deb.unlink()
        paths.append(path)
    return paths
