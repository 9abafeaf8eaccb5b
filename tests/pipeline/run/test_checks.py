"""What can be known before training is said before it. Run: pytest tests/pipeline/run/test_checks.py"""

import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from pipeline.run.checks import check_model, sample_warnings, warn_of_slow_bf16
from pipeline.run.context import RunContext
from pipeline.run.stages import check_stage
from tests.helpers.tiny import do_steps, parse_run, run_tree


def context(folder: Path, **changes: Any) -> RunContext:
    """A tiny run: a model of 4 layers and 2,048 positions."""
    return RunContext(parse_run(run_tree(folder, **changes), "x"))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"stage1": {"sequence_length": 2049, "tokens": 10**5}}, r"stage1\.sequence_length: 2049 .* 2048 positions"),
        ({"stage2": {"sequence_length": 4096, "tokens": 10**5}}, r"stage2\.sequence_length: 4096 .* 2048 positions"),
        ({"similarity": {"sequence_length": 4096}}, r"similarity\.sequence_length: 4096 .* 2048 positions"),
        ({"evaluate": {"window": 4096}}, r"evaluate\.window: 4096 .* 2048 positions"),
        ({"experts": {"classifier_layers": [1, 4]}}, r"classifier_layers: 4 is not a layer .* from 0 to 3"),
        ({"experts": {"classifier_layers": 5}}, r"classifier_layers: 5, but the model has 4 layers"),
        ({"experts": {"counts": [2, 2]}}, r"experts\.counts: 2 numbers, but the model has 4 layers"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_named_before_anything_runs(
    tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    check_model(context(tmp_path))
    with pytest.raises(UserError, match=line):
        check_model(context(tmp_path, **change))


def test_what_stage_2_lacks_is_named_before_stage_1(tmp_path: Path) -> None:
    run = context(tmp_path, data={"replay": {"tokens": 400}}, stage2={"sequence_length": 512, "tokens": 4096})
    do_steps(run, "tokenize", "similarity", "allocate")
    with pytest.raises(UserError, match=r"set en has \d+ training tokens, less than one sample of 512 \+ 1.*replay"):
        check_stage(run, 1)


def test_text_that_is_read_too_often_or_not_wholly_is_a_line(tmp_path: Path) -> None:
    run = do_steps(context(tmp_path), "tokenize", "similarity", "allocate")
    assert sample_warnings(run, [1, 2]) == []
    run = context(tmp_path, stage1={"tokens": 10**5}, stage2={"tokens": 10**6})
    lines = sample_warnings(run, [1, 2])
    stages = ["stage 1 reads el", *(f"stage 2 reads {name}" for name in ("en", "el", "hu"))]
    assert [line.split(" times;")[0].rsplit(" ", 1)[0] for line in lines] == stages
    assert all("after 4 passes" in line for line in lines)
    assert sample_warnings(run, [1]) == lines[:1]


@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        (768, r"reads less than data\.replay has chosen: \d+% of en; change data\.replay or stage2\.tokens"),
        (6400, r"reads more than data\.replay says: en [\d.]+ times; change data\.replay or stage2\.tokens"),
    ],
)
def test_a_replay_that_stage_2_does_not_read_once_is_a_line(tmp_path: Path, tokens: int, line: str) -> None:
    run = context(tmp_path, data={"replay": {"tokens": 1000}}, stage2={"tokens": tokens})
    do_steps(run, "tokenize", "similarity", "allocate")
    [found] = sample_warnings(run, [2])
    assert re.search(line, found)


def test_a_similarity_of_too_few_tokens_is_an_error_that_a_setting_overrules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"tokens": 10**6, "sequence_length": 32}
    with pytest.raises(UserError, match=r"similarity: en has only [\d,]+ of 1,000,000 tokens.*similarity\.min_share"):
        do_steps(context(tmp_path, similarity=settings), "tokenize", "similarity")
    run = do_steps(context(tmp_path, similarity=settings | {"min_share": 0}), "tokenize", "similarity")
    warnings = run.folder.manifest("similarity").figures["warnings"]
    assert [line.split(" is ")[0] for line in warnings] == [f"similarity of {name}" for name in ("en", "el", "hu")]
    assert all(f"warning: {line}" in capsys.readouterr().out for line in warnings[:1])


@pytest.mark.parametrize(
    ("capability", "precision", "warns"), [("AVX2", "bf16", True), ("AVX512", "bf16", False), ("AVX2", "fp32", False)]
)
def test_bf16_on_a_cpu_that_has_no_instructions_for_it_is_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: str,
    precision: str,
    warns: bool,
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    run = context(tmp_path, deepspeed=f"ds_configs/{precision}_zero1.json")
    capsys.readouterr()
    warn_of_slow_bf16(run)
    assert ("several times slower than fp32: --set deepspeed=ds_configs/fp32" in capsys.readouterr().out) == warns
