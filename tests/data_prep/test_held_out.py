"""Run: pytest tests/data_prep/test_held_out.py"""

import pytest

from data_prep.held_out import NearCopies, is_held_out, shingles

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


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, THAI, "short text"])
def test_a_copy_is_found_in_any_script_without_regard_to_case_and_punctuation(text: str) -> None:
    near_copies = NearCopies(0.8)
    near_copies.add(text)
    assert near_copies.has_near_copy_of(text)
    assert near_copies.has_near_copy_of(text.upper().replace("。", "!  ") + ".")


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, THAI])
def test_a_text_changed_a_little_is_a_near_copy_and_one_changed_much_is_not(text: str) -> None:
    near_copies = NearCopies(0.8)
    near_copies.add(text)
    assert near_copies.has_near_copy_of(text + text[:2])
    assert not near_copies.has_near_copy_of(text[: len(text) // 2])
    assert not near_copies.has_near_copy_of(text + text[::-1])


def test_the_threshold_is_respected() -> None:
    half = " ".join(ENGLISH.split()[: len(ENGLISH.split()) * 6 // 10])
    for threshold, found in ((0.4, True), (0.8, False)):
        near_copies = NearCopies(threshold)
        near_copies.add(ENGLISH)
        assert near_copies.has_near_copy_of(half) is found


def test_a_union_of_many_held_out_texts_is_not_a_near_copy_of_any() -> None:
    near_copies = NearCopies(0.8)
    parts = [" ".join(f"{c}{n}" for n in range(30)) for c in "abcdefgh"]
    for part in parts:
        near_copies.add(part)
    assert not near_copies.has_near_copy_of(" ".join(parts))


def test_shingles_are_words_where_words_have_spaces_and_characters_where_not() -> None:
    assert shingles("Ένα, δύο: τρία τέσσερα!") == {"ένα δύο τρία", "δύο τρία τέσσερα"}
    assert shingles("透视表中。") == {"透 视 表", "视 表 中"}
    assert shingles("हिन्दी में") == {"हिन्दी में"}
    assert shingles(" … ") == set()
