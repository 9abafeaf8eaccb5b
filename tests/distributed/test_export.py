"""The verb export on a trained run. Run: pytest tests/distributed/test_export.py"""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from pipeline.run.context import RunContext
from pipeline.run.exporting import export_run
from tests.distributed.test_expansion import Model
from tests.helpers.tiny import parse_run

IDS = torch.arange(30).view(2, 15) * 7 % 290


def context_of(tree: dict[str, Any], **options: Any) -> RunContext:
    return RunContext(parse_run(tree, "x"), **options)


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("label", ["stage1", "stage2"])
def test_a_stage_s_export_gives_its_logits(
    trained: dict[str, Any], tmp_path: Path, label: str, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(trained)
    export_run(context, label, None, tmp_path / "exported")
    with torch.no_grad():
        expected = Model.of(context, label).module(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits_of(tmp_path / "exported"), expected, rtol=1e-5, atol=1e-5)
    said = capsys.readouterr().out
    assert re.search(rf"export: {label} as .*exported, .* M parameters, .* differ by at most \S+ \(logits up to", said)


def test_without_options_the_last_stage_goes_to_the_run_s_folder_in_its_own_dtype(trained: dict[str, Any]) -> None:
    context = context_of(trained, force=True)
    export_run(context, None, "bf16", None)
    model = AutoModelForCausalLM.from_pretrained(context.folder / "export", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    assert model.config.classifier_layers == [0, 3]
    export_run(context, None, None, None)
    assert (
        AutoModelForCausalLM.from_pretrained(context.folder / "export", trust_remote_code=True).dtype == torch.float32
    )


def test_a_mistake_is_one_line_and_writes_nothing(trained: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "exported"
    (tmp_path / "there").mkdir()
    copied = dict(trained) | {"output_dir": str(tmp_path / "runs")}
    shutil.copytree(trained["output_dir"], tmp_path / "runs", symlinks=True)
    folder = tmp_path / "runs" / "tiny"
    cases = [
        ((None, None, tmp_path / "there"), "there exists; name another folder with --to, or replace it with --force"),
        (("base", None, target), "--checkpoint base: is the model that the run starts from; name a stage"),
        (("stage3", None, target), "--checkpoint stage3: unknown"),
        (("stage2/step000001", None, target), "holds no complete checkpoint step000001"),
    ]
    for arguments, line in cases:
        check_line(copied, arguments, line)
    damaged = next((folder / "stage2").glob("step*/mp_rank_00_model_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    check_line(copied, (None, None, target), "damaged")
    (folder / "manifests" / "stage2.json").unlink()
    check_line(copied, (None, None, target), "stage2")
    assert not target.exists() and not list(tmp_path.glob(".*partial"))


def check_line(tree: dict[str, Any], arguments: tuple[Any, ...], line: str) -> None:
    """The export is refused so, in one line."""
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        export_run(context_of(tree), *arguments)
    assert "\n" not in str(caught.value)
