"""How models go on from a run's prompts. Run: pytest tests/distributed/test_continuations.py"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pipeline.model.backbone import load_dense
from pipeline.records.evaluation import Evaluation
from pipeline.records.run_folder import EVALUATION_FILE
from pipeline.run.context import RunContext
from pipeline.run.steps import STEP_NAMES
from tests.distributed.conftest import Pools
from tests.distributed.rounds import Model, run
from tests.distributed.test_staleness import on_rank
from tests.helpers.tiny import parse_run, run_tree

PROMPTS = {"el": "νερό φως πράσινο", "en": "house"}
COUNT = 9


def texts_of(context: RunContext) -> dict[str, dict[str, str]]:
    evaluation = Evaluation.load(context.folder / EVALUATION_FILE)
    assert {one.name: one.prompt for one in evaluation.continuations} == dict(context.run.evaluate.prompts)
    return {one.name: one.texts for one in evaluation.continuations}


def expected_text(context: RunContext, model: Any, prompt: str) -> str:
    """By a plain loop without a cache and without padding, until the text ends."""
    tokenizer, end = AutoTokenizer.from_pretrained(context.dense), context.store.separator_id
    start = [end, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    ids = list(start)
    for _ in range(COUNT):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == end:
            ids.pop()
            break
    return str(tokenizer.decode(ids[1:])).removeprefix(prompt)


@pytest.fixture(scope="module")
def done(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run with prompts, done on two ranks with expert parallelism."""
    parallel = {"ranks": 2, "ep_size": 2, "micro_batch_size": 1}
    evaluate = {"prompts": PROMPTS, "new_tokens": COUNT}
    tree = run_tree(tmp_path_factory.mktemp("prompts"), parallel=parallel, evaluate=evaluate)
    run(pools, tree, 2)
    return tree


def test_each_text_is_that_of_a_plain_loop_of_the_base_model_and_the_last_stage(
    pools: Pools, done: dict[str, Any]
) -> None:
    context = run(pools, done, 2)
    models = {"base": load_dense(context.dense, torch.float32), "stage2": Model.of(context).module}
    expected = {
        name: {label: expected_text(context, model, prompt) for label, model in models.items()}
        for name, prompt in PROMPTS.items()
    }
    assert texts_of(context) == expected
    assert any(text.strip() for texts in expected.values() for text in texts.values())


def test_other_prompts_are_asked_and_nothing_is_scored_again(pools: Pools, done: dict[str, Any]) -> None:
    def scores() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (Path(done["cache_dir"]) / "scores").glob("*.json")}

    before = scores()
    changed = {**done, "evaluate": {"prompts": {"hu": "ház"}, "new_tokens": COUNT}}
    assert pools[2].run(on_rank, changed, "evaluate", True) == [True, True]
    found = texts_of(RunContext(parse_run(changed, "x")))
    assert list(found) == ["hu"] and set(found["hu"]) == {"base", "stage2"}
    assert scores() == before and before
    assert pools[2].run(on_rank, done, "evaluate", True) == [True, True]


def test_the_table_and_the_report_show_them(
    pools: Pools, done: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.run.reporting import write_report

    context = run(pools, done, 2)
    texts = texts_of(context)
    capsys.readouterr()
    write_report(context, STEP_NAMES)
    said, page = capsys.readouterr().out, (context.folder / "report.html").read_text()
    assert "how they go on, token by token the likeliest\nel: νερό φως πράσινο\n  base    … " in said
    assert "How they go on" in page and PROMPTS["el"] in page
    assert all(" ".join(text.split()) in said for one in texts.values() for text in one.values())
