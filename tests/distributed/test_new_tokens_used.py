"""What a run with new tokens is scored on, exported as and asked with.

Run: pytest tests/distributed/test_new_tokens_used.py
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.evaluation.generate import Sampling, continuation
from pipeline.evaluation.scoring import document_windows
from pipeline.model.backbone import load_dense
from pipeline.records.evaluation import Evaluation
from pipeline.records.run_folder import EVALUATION_FILE
from pipeline.run.context import RunContext
from pipeline.run.exporting import export_run
from pipeline.run.generating import generate
from pipeline.run.tasks import Asked
from pipeline.run.upcycling import parity_samples
from tests.distributed.conftest import Pools
from tests.distributed.rounds import Model, run
from tests.distributed.test_tasks import on_rank
from tests.helpers.extended import ADDED, FIRST, extended_tree

WINDOW = 16


@pytest.fixture(scope="module", params=["llama", "gemma3"], ids=["untied", "tied"])
def done(request: pytest.FixtureRequest, pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """A run of an extended tokenizer that is done; validation scores the heads of its sets."""
    folder = tmp_path_factory.mktemp(f"done-{request.param}")
    validate = {"every_tokens": 768, "max_tokens_per_set": 200}
    tree = extended_tree(folder, request.param, validate=validate, parallel={"ranks": 1})
    return run(pools, tree, 1)


def test_an_export_has_the_extended_tokenizer_and_the_logits_of_the_stage(
    done: RunContext, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_run(done, None, None, tmp_path / "exported")
    difference = re.search(r"differ by at most (\S+) \(logits up to", capsys.readouterr().out)
    assert difference is not None and float(difference[1]) < 1e-4
    assert parity_samples(done).max() >= FIRST  # what the export compares logits on
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["vocab_size"] == FIRST + ADDED
    extended = Path(str(done.run.model.tokenizer)) / "tokenizer.json"
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == extended.read_bytes()
    assert f"the dense model's with {ADDED} more tokens" in (tmp_path / "exported" / "README.md").read_text()

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True, dtype=torch.float32)
    loaded.eval().set_experts_implementation("eager")
    ids = torch.arange(FIRST + ADDED).view(2, -1)
    with torch.no_grad():
        expected = Model.of(done).module(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_base_model_gets_a_prompt_by_its_own_tokenizer_and_a_stage_by_the_extended_one(
    done: RunContext, capsys: pytest.CaptureFixture[str]
) -> None:
    own = AutoTokenizer.from_pretrained(done.dense)
    extended = AutoTokenizer.from_pretrained(str(done.run.model.tokenizer))
    prompt = extended.decode(done.store.held_out("el").document(0)[:40], skip_special_tokens=True)
    assert max(extended(prompt)["input_ids"]) >= FIRST > max(own(prompt)["input_ids"])
    generate(done, [prompt], None, Sampling(6), shows_experts=False)
    printed = re.split(r"\n--- (\w+)\n", capsys.readouterr().out)[1:]
    end = done.store.separator_id
    for label, text, model, tokenizer in (
        (*printed[:2], load_dense(done.dense, torch.float32), own),
        (*printed[2:], Model.of(done).module, extended),
    ):
        begin = tokenizer.bos_token_id if done.store.begins_with_bos else end
        ids = [begin, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        found = continuation(model, tokenizer, ids, Sampling(6), end=end)
        assert text.strip() == tokenizer.decode(found, skip_special_tokens=True).strip(), label
    assert printed[::2] == ["base", "stage2"]


def test_by_either_tokenizer_a_long_document_s_last_window_is_full_and_each_token_is_scored_once(
    done: RunContext,
) -> None:
    long = 0
    for by_own in (False, True):
        shard = done.store.held_out("el", by_own_tokenizer=by_own)
        windows = document_windows(done.store, "el", WINDOW, by_own_tokenizer=by_own)
        for number in range(shard.num_documents):
            text = shard.document(number)[:-1].tolist()
            ids = text if done.store.begins_with_bos else [done.store.separator_id, *text]
            of_document = [window for window in windows if window.document == number]
            assert [i for window in of_document for i in window.ids[-window.scored :]] == ids[1:]
            last = of_document[-1].ids.tolist()
            assert last == ids[-WINDOW - 1 :]
            long += len(ids) > WINDOW + 1
    assert long > 2


def test_heads_of_sets_hold_the_same_documents_by_either_tokenizer(done: RunContext) -> None:
    counts: list[Any] = []
    for by_own in (False, True):
        windows = document_windows(done.store, "el", WINDOW, 200, by_own_tokenizer=by_own)
        counts.append((max(window.document for window in windows), sum(window.scored for window in windows)))
    assert counts[0][0] == counts[1][0]
    assert 200 <= counts[0][1] < counts[1][1]


def test_lm_eval_gives_each_model_the_text_by_the_tokenizer_that_scored_it(done: RunContext, pools: Pools) -> None:
    pools[1].run(on_rank, done.run.model_dump(mode="json", by_alias=True), Asked("held_out"))
    evaluation = Evaluation.load(done.folder / EVALUATION_FILE)
    for name, result in evaluation.sets.items():
        scores = evaluation.tasks[f"held_out_{name}"]
        assert list(scores) == ["base", "stage1", "stage2"]
        for label, one in scores.items():
            expected = pytest.approx(result.bits_per_character[label], rel=1e-5)
            assert one.metrics["bits_per_character"].value == expected, (name, label)
