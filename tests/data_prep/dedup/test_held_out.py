"""Run: pytest tests/data_prep/dedup/test_held_out.py"""

from pathlib import Path

import numpy as np
import pytest

from data_prep.dedup.held_out import SHINGLE, CopyIndex, HeldOutRuns, is_held_out
from data_prep.dedup.word_shingles import shingles, word_hashes, words_of

ENGLISH = " ".join(f"word{n} is followed by word{n + 1}" for n in range(60))
CHINESE = "可以指定透视表中的列、行和页面数据字段的其他选项。选择对列或行进行排序所依据的数据字段。将值从小到大排序。"
THAI = "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิต่างมีเหตุผลและมโนธรรม"


def test_the_held_out_share_is_the_fraction() -> None:
    held_out = sum(is_held_out(f"page-{n}", 17, 0.1) for n in range(20_000))
    assert abs(held_out - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5


def test_the_choice_depends_on_the_seed_and_grows_with_the_fraction() -> None:
    pages = [f"page-{n}" for n in range(2000)]
    few = {page for page in pages if is_held_out(page, 17, 0.05)}
    assert few < {page for page in pages if is_held_out(page, 17, 0.1)}
    assert few != {page for page in pages if is_held_out(page, 18, 0.05)}


def test_the_choice_is_the_same_in_every_process_and_version() -> None:
    assert [n for n in range(120) if is_held_out(f"page-{n}", 17, 0.1)] == [
        38,
        49,
        68,
        70,
        71,
        74,
        77,
        85,
        86,
        87,
        89,
        111,
        118,
    ]


def runs(text: str) -> np.ndarray:
    return shingles(word_hashes(text), SHINGLE)


class Copies:
    """An index of a few texts."""

    def __init__(self, folder: Path, threshold: float, *texts: str) -> None:
        CopyIndex.write(folder, [set_of(*texts)])
        self.index = CopyIndex(folder, threshold)

    def __contains__(self, text: str) -> bool:
        return bool(self.index.origins(runs(text)))


def set_of(*texts: str) -> HeldOutRuns:
    """The held-out texts of one set."""
    found = [runs(text) for text in texts]
    return HeldOutRuns(np.concatenate(found), np.array([len(part) for part in found], np.uint32))


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, THAI, "short text"])
def test_a_copy_is_found_in_any_script_without_regard_to_case_and_punctuation(text: str, tmp_path: Path) -> None:
    copies = Copies(tmp_path, 0.8, text)
    assert text in copies
    assert text.upper().replace("。", "!  ") + "." in copies


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, THAI])
def test_a_text_changed_a_little_is_a_copy_and_a_part_of_it_is_not(text: str, tmp_path: Path) -> None:
    copies = Copies(tmp_path, 0.8, text)
    assert text + text[:2] in copies
    assert text[: len(text) // 2] not in copies
    assert text[::-1] not in copies


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, THAI])
def test_a_text_that_contains_a_held_out_one_is_found(text: str, tmp_path: Path) -> None:
    assert "something before " * 50 + text + text[::-1] * 20 in Copies(tmp_path, 0.8, text)


def test_a_short_held_out_text_within_a_long_one_is_not_a_copy(tmp_path: Path) -> None:
    assert "press the button " + ENGLISH not in Copies(tmp_path, 0.8, "press the button")


def test_the_threshold_is_respected(tmp_path: Path) -> None:
    half = " ".join(ENGLISH.split()[: len(ENGLISH.split()) * 6 // 10])
    for threshold, found in ((0.4, True), (0.8, False)):
        assert (half in Copies(tmp_path / str(threshold), threshold, ENGLISH)) is found


def test_runs_shared_with_many_held_out_texts_are_not_added_up(tmp_path: Path) -> None:
    parts = [" ".join(f"{c}{n}" for n in range(30)) for c in "abcdefgh"]
    halves = " ".join(" ".join(part.split()[:15]) for part in parts)
    assert halves not in Copies(tmp_path, 0.8, *parts)


def test_the_sets_are_named_whose_text_is_copied(tmp_path: Path) -> None:
    CopyIndex.write(tmp_path, [set_of(THAI), set_of(ENGLISH, CHINESE), set_of("another text"), set_of(ENGLISH)])
    index = CopyIndex(tmp_path, 0.8)
    assert index.origins(runs(ENGLISH)) == [1, 3]
    assert index.origins(runs(f"{THAI} {CHINESE}")) == [0, 1]
    assert index.origins(runs("nothing of the kind")) == []


def test_an_index_of_nothing_finds_nothing(tmp_path: Path) -> None:
    CopyIndex.write(tmp_path, [])
    assert CopyIndex(tmp_path, 0.8).origins(runs(ENGLISH)) == []


def test_words_are_what_spaces_part_or_characters_where_there_are_none() -> None:
    assert words_of("Ένα, δύο: τρία τέσσερα!") == ["ένα", "δύο", "τρία", "τέσσερα"]
    assert words_of("透视表中。") == ["透", "视", "表", "中"]
    assert words_of("हिन्दी में") == ["हिन्दी", "में"]
    assert words_of(" … ") == []


def test_runs_are_of_neighbouring_words_and_a_shorter_text_is_one() -> None:
    assert len(runs("Ένα, δύο: τρία τέσσερα!")) == 2
    assert np.isin(runs("δύο τρία τέσσερα"), runs("Ένα, δύο: τρία τέσσερα!")).all()
    assert not np.isin(runs("τρία δύο τέσσερα"), runs("Ένα, δύο: τρία τέσσερα!")).any()
    assert len(runs("हिन्दी में")) == 1
    assert len(runs(" … ")) == 0


def test_hashes_are_the_same_in_every_process_and_version() -> None:
    assert [hex(value) for value in runs("one two three four").tolist()] == [
        "0x1a1d900ae236717b",
        "0x3d673799f254ba09",
    ]
