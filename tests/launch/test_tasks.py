"""The task files that come with this program. Run: pytest tests/launch/test_tasks.py"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from datasets import Dataset

from common.errors import UserError
from pipeline.evaluation.task_list import OWN, load_tasks
from tests.helpers.own_tasks import CHOICES, GROUP, ONE, SPELLED, write_own_tasks

PAPERS = {
    "arc_challenge": 25, "arc_hu": 25, "arc_challenge_mt_el": 25, "hellaswag": 10, "hellaswag_hu": 10, "mmlu": 5,
    "m_mmlu_hu": 5, "global_mmlu_full_el": 5, "global_mmlu_full_tr": 5, "belebele_eng_Latn": 5,
    "belebele_hun_Latn": 5, "belebele_ell_Grek": 5, "belebele_tur_Latn": 5,
}  # fmt: skip


def module_of(name: str) -> ModuleType:
    """A file of functions beside the YAML files, imported as lm-eval does."""
    path = next(OWN.rglob(f"{name}.py"))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def members(name: str) -> list[Any]:
    return list(yaml.safe_load((OWN / "papers" / f"{name}.yaml").read_text())["task"])


@pytest.mark.slow
def test_the_papers_list_names_tasks_that_lm_eval_has_with_the_papers_examples() -> None:
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=OWN).task_index
    named = [one for group in members("papers") for one in members(group)]
    shots = {one.get("task") or one["group"]: one["num_fewshot"] for one in named if isinstance(one, dict)}
    assert shots == PAPERS
    assert shots.keys() <= index.keys()
    for one in named:
        if isinstance(one, dict):
            assert index[one.get("task") or one["group"]].kind.name == ("TASK" if "task" in one else "GROUP")
    flores = [one for one in named if isinstance(one, str)]
    assert sorted(flores) == sorted(f"flores_{a}-{b}" for x in ("hu", "el", "tr") for a, b in (("en", x), (x, "en")))
    assert yaml.load((OWN / "papers" / "_flores_yaml").read_text(), Loader=_loader())["num_fewshot"] == 8


def _loader() -> type[yaml.SafeLoader]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return Loader


def test_flores_pairs_sentences_by_their_ids() -> None:
    source = Dataset.from_list([{"id": 2, "text": "b"}, {"id": 1, "text": "a"}, {"id": 3, "text": "c"}])
    target = Dataset.from_list([{"id": 1, "text": "A"}, {"id": 2, "text": "B"}])
    found = module_of("flores").pairs(source, target)
    assert found.to_list() == [{"source_text": "a", "target_text": "A"}, {"source_text": "b", "target_text": "B"}]


def test_the_verse_that_follows_is_among_verses_of_other_chapters_that_are_as_long() -> None:
    chapters = [[f"{chapter}.{verse}" + "x" * (verse % 5) for verse in range(30)] for chapter in range(4)]
    found = module_of("verses").questions(chapters)
    assert found == module_of("verses").questions(chapters)
    assert len(found) == 4 * 4
    assert len({question["answer"] for question in found}) > 1
    for question in found:
        *_, before = question["context"].split("\n")
        true = question["choices"][question["answer"]]
        (chapter,) = [one for one in chapters if before in one]
        assert chapter[chapter.index(before) + 1] == true
        wrong = [one for one in question["choices"] if one != true]
        assert len(wrong) == 3 and not set(wrong) & set(chapter)
        assert all(len(one) == len(true) for one in wrong)
    assert module_of("verses").questions([["a", "b", "c"], ["d"]]) == [], "too short to ask about"


def test_a_verse_that_repeats_is_not_asked_about() -> None:
    twice = [verse for n in range(20) for verse in (f"a{n}", f"a{n}")]
    others = [f"b{n}" for n in range(20)]
    for question in module_of("verses").questions([twice, others]):
        assert question["choices"][question["answer"]] not in question["context"].split("\n")


def test_verses_are_read_from_the_quickstart_s_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "\n".join(f"verse {chapter} {n} line\u2028" for n in range(9))} for chapter in range(3)]
    file = tmp_path / "inputs" / "quran" / "tr.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = load_tasks(["verse_continuation_tr"], 5)
    task = found.tasks["verse_continuation_tr"]
    assert len(task.eval_docs) == 12
    assert task.get_config("num_fewshot") == 0, "the task says so"
    file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1]) + "\n")
    assert load_tasks(["verse_continuation_tr"], None).contents != found.contents


def test_missing_verses_are_one_line_with_the_command_that_fetches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"there is no inputs/quran/tr.jsonl: python -m data_prep.demo --lang"
    ) as caught:
        load_tasks(["verse_continuation_tr"], None)
    assert "\n" not in str(caught.value)


def test_a_folder_s_groups_say_how_their_tasks_are_asked_and_a_file_is_its_task_alone(tmp_path: Path) -> None:
    folder = write_own_tasks(tmp_path / "own")
    group = {"group": GROUP, "task": [{"task": CHOICES, "num_fewshot": 3}, ONE]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    found = load_tasks([str(folder)], None)
    assert list(found.tasks) == [CHOICES, ONE, SPELLED]
    assert not found.groups, "the group has no figure of its own"
    assert found.tasks[CHOICES].get_config("num_fewshot") == 3
    alone = load_tasks([str(folder / f"{CHOICES}.yaml")], None)
    assert alone.tasks.keys() == {CHOICES}
    assert alone.tasks[CHOICES].get_config("num_fewshot") == 1
    assert alone.contents[CHOICES] != found.contents[CHOICES]
    assert load_tasks([str(folder / f"{CHOICES}.yaml")], 3).contents[CHOICES] == found.contents[CHOICES]
