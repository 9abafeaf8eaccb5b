"""The verb generate on a trained run. Run: pytest tests/distributed/test_generate.py"""

import re
from typing import Any

import pytest
import torch

from common.errors import UserError
from pipeline.cli.main import main
from pipeline.evaluation.generate import Sampling, continuation, experts_table
from pipeline.model.moe import collect_routings
from pipeline.run.context import RunContext
from pipeline.run.generating import generate
from tests.distributed.rounds import Model
from tests.helpers.tiny import parse_run

PROMPT = "house river"


def context_of(tree: dict[str, Any]) -> RunContext:
    return RunContext(parse_run(tree, "x"))


def tokenizer_of(context: RunContext) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(context.upcycled / "hf")


def test_the_likeliest_tokens_are_those_of_a_plain_loop(trained: dict[str, Any]) -> None:
    context = context_of(trained)
    model, tokenizer = Model.of(context).module, tokenizer_of(context)
    ids = [context.store.separator_id, *tokenizer(PROMPT)["input_ids"]]
    found = continuation(model, tokenizer, ids, Sampling(12), end=context.store.separator_id)
    expected = list(ids)
    while len(expected) < len(ids) + 12:
        with torch.no_grad():
            expected.append(int(model(input_ids=torch.tensor([expected]), use_cache=False).logits[0, -1].argmax()))
        if expected[-1] == context.store.separator_id:
            break
    assert found == expected
    assert continuation(model, tokenizer, ids, Sampling(12, 1.0, 5), end=0) == continuation(
        model, tokenizer, ids, Sampling(12, 1.0, 5), end=0
    )


def test_each_model_s_text_is_printed_after_its_name(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    generate(context_of(trained), [PROMPT], None, Sampling(4), shows_experts=False)
    assert re.findall(r"--- (\w+)\n(house river)", capsys.readouterr().out) == [
        ("base", PROMPT), ("stage2", PROMPT),
    ]  # fmt: skip
    generate(context_of(trained), [PROMPT, "stone"], "1,2", Sampling(4), shows_experts=False)
    assert re.findall(r"--- (\w+)\n", capsys.readouterr().out) == ["stage1", "stage1", "stage2", "stage2"]


@pytest.mark.parametrize("in_color", [False, True])
def test_the_table_of_experts_is_what_the_routers_decide(trained: dict[str, Any], in_color: bool) -> None:
    context = context_of(trained)
    model, tokenizer = Model.of(context).module, tokenizer_of(context)
    ids = [context.store.separator_id, *tokenizer(PROMPT)["input_ids"]]
    table = experts_table(model, context.plan, tokenizer, ids, in_color=in_color)
    with torch.no_grad(), collect_routings(model) as routings:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    header, *rows = re.sub(r"\033\[[\d;]*m", "", table).splitlines()[1:]
    assert header.split() == ["token", "expert", "0", "0", "1", "3"]
    assert len(rows) == len(ids)
    assert ("\033[38;5;" in table) == in_color
    for position, row in enumerate(rows):
        for text, routing in zip(row.split()[-3:], routings, strict=True):
            active = routing.ids_TK[position][routing.active_TK[position]].tolist()
            expected = sorted(expert for expert in active if expert)
            assert text == ("+".join(map(str, expected)) or ".")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prompt", " "], "--prompt: is empty"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0: give at least 1"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature -1: give 0 or more"),
        (["--prompt", "x", "--stage", "3"], "--checkpoint 3: unknown"),
    ],
)
def test_a_mistake_is_one_line(trained: dict[str, Any], words: list[str], line: str) -> None:
    file = str(context_of(trained).folder.run_file)
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        main(["generate", file, *words])
    assert "\n" not in str(caught.value)
