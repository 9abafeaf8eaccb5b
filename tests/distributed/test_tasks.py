"""Tasks of lm-eval on a trained run. Run: pytest tests/distributed/test_tasks.py"""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from common.errors import UserError
from pipeline.cli.main import main
from pipeline.comparison.compare import compare
from pipeline.comparison.read import read_runs
from pipeline.comparison.table import as_text
from pipeline.distributed.process_group import Ranks, alone
from pipeline.evaluation.task_table import task_table
from pipeline.model.backbone import moe_layers
from pipeline.records.evaluation import Evaluation
from pipeline.records.run_folder import EVALUATION_FILE, REPORT_FILE
from pipeline.report.page import write_page
from pipeline.run.context import RunContext
from pipeline.run.exporting import export_run
from pipeline.run.scoring import score
from pipeline.run.tasks import Asked, TaskScoring, score_tasks
from pipeline.run.tokenizers import beginning_of, tokenizer_of
from tests.distributed.conftest import Pools
from tests.distributed.rounds import Model
from tests.helpers.own_tasks import CHOICES, GROUP, ONE, SPELLED, write_own_tasks
from tests.helpers.tiny import parse_run

Tree = dict[str, Any]
LABELS = ["base", "stage1", "stage2"]
WINDOW = 48  # tokens; the documents are longer


def on_rank(ranks: Ranks, tree: Tree, asked: Asked) -> None:
    """The held-out text, and then tasks, on this rank."""
    context = RunContext(parse_run(tree, "x"))
    score(context, asked.tag, ranks)
    ranks.wait()
    score_tasks(context, asked, ranks)


def context_of(tree: Tree) -> RunContext:
    return RunContext(parse_run(tree, "x"))


def evaluation_of(tree: Tree) -> Evaluation:
    return Evaluation.load(context_of(tree).folder / EVALUATION_FILE)


def copy_of(tree: Tree, folder: Path, **changes: Any) -> Tree:
    """The run again, with an empty cache of scores."""
    shutil.copytree(tree["output_dir"], folder / "runs", symlinks=True)
    cache = folder / "cache"
    cache.mkdir()
    for path in Path(tree["cache_dir"]).iterdir():
        if path.name not in ("scores", "tasks"):
            (cache / path.name).symlink_to(path)
    return {**tree, "output_dir": str(folder / "runs"), "cache_dir": str(cache), **changes}


def spread(ranks: int) -> Tree:
    return {"parallel": {"ranks": ranks, "ep_size": ranks, "micro_batch_size": 1}}


@pytest.fixture(scope="module")
def scored(pools: Pools, trained: Tree, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A run that one rank has scored on its held-out sets as tasks and on a user's own."""
    folder = tmp_path_factory.mktemp("tasks")
    own = write_own_tasks(folder / "own")
    tree = copy_of(trained, folder, evaluate={"window": WINDOW})
    pools[1].run(on_rank, tree, Asked(f"held_out,{own}"))
    return tree


@pytest.mark.parametrize("label", LABELS)
def test_lm_eval_s_bits_are_ours_on_every_held_out_set(scored: Tree, label: str) -> None:
    evaluation, store = evaluation_of(scored), context_of(scored).store
    assert max(d.tokens for name in evaluation.sets for d in store.held_out_documents(name)) > 2 * WINDOW
    for name, result in evaluation.sets.items():
        found = evaluation.tasks[f"held_out_{name}"][label]
        size = sum(document.bytes for document in store.held_out_documents(name))
        assert found.metrics["bits_per_character"].value == pytest.approx(result.bits_per_character[label], rel=1e-5)
        bits = sum(result.bits_by_document[label])
        assert found.metrics["bits_per_byte"].value == pytest.approx(bits / size, abs=1e-3)
        assert found.samples == result.documents


def test_two_ranks_that_share_experts_and_requests_score_as_one_does(
    pools: Pools, trained: Tree, scored: Tree, tmp_path: Path
) -> None:
    own = write_own_tasks(tmp_path / "own")
    tree = copy_of(trained, tmp_path, evaluate={"window": WINDOW}, **spread(2))
    pools[2].run(on_rank, tree, Asked(f"held_out,{own}"))
    found, expected = evaluation_of(tree).tasks, evaluation_of(scored).tasks
    assert found.keys() == expected.keys() > {CHOICES, ONE, SPELLED, GROUP}
    assert expected[ONE]["stage2"].samples == 1, "fewer documents than ranks"
    for name, scores in expected.items():
        assert list(scores) == LABELS
        for label, one in scores.items():
            assert found[name][label].few_shot == one.few_shot == (1 if name == CHOICES else one.few_shot)
            for metric, figure in one.metrics.items():
                other = found[name][label].metrics[metric]
                assert other.value == pytest.approx(figure.value, rel=1e-5), (name, label, metric)
                assert other.error == (None if figure.error is None else pytest.approx(figure.error, rel=1e-4))


def shared_lm(context: RunContext, label: str = "stage2", **options: Any) -> Any:
    from pipeline.evaluation.shared_lm import SharedLM

    model = Model.of(context, label)
    tokenizer = options.pop("tokenizer", None) or tokenizer_of(context, context.start_model)
    return SharedLM(
        model.module, tokenizer, alone("cpu"), beginning=context.store.separator_id,
        separator=context.store.separator_id, window=WINDOW,
    )  # fmt: skip


def requests_of(kind: str, *arguments: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]  # type: ignore[arg-type]


def test_answers_are_those_of_lm_eval_s_own_class(trained: Tree) -> None:
    from lm_eval.models.huggingface import HFLM

    context = context_of(trained)
    ours = shared_lm(context)
    plain = HFLM(
        pretrained=ours.model, tokenizer=ours.tokenizer, backend="causal", batch_size=1, softmax_dtype="float32",
        prefix_token_id=context.store.separator_id,
    )  # fmt: skip
    pairs = [("house river", " stone"), ("house river", " A"), ("house river", " B"), ("", "bread"), ("ποτάμι", "")]
    asked = requests_of("loglikelihood", *pairs[:4], *pairs[:1], ("x" * 3000, " stone bread"))
    found, expected = ours.loglikelihood(asked), plain.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = requests_of("loglikelihood_rolling", ("house river " * 40,), ("φως",), ("",))
    plain_in_windows = HFLM(
        pretrained=ours.model, tokenizer=ours.tokenizer, backend="causal", batch_size=1, softmax_dtype="float32",
        prefix_token_id=context.store.separator_id, max_length=WINDOW,
    )  # fmt: skip
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(texts), plain_in_windows.loglikelihood_rolling(texts, disable_tqdm=True), rtol=1e-5
    )
    settings = {"until": ["\n"], "max_gen_toks": 5}
    prompts = requests_of("generate_until", ("house", settings), ("house river stone", settings), ("φως", settings))
    assert ours.generate_until(prompts) == plain.generate_until(prompts, disable_tqdm=True)


def test_sequences_that_are_classified_whole_are_batches_of_their_own(trained: Tree) -> None:
    ours = shared_lm(context_of(trained))
    rows: list[int] = []
    ours.model.register_forward_pre_hook(
        lambda _model, _inputs, options: rows.append(len(options["input_ids"])), with_kwargs=True
    )

    def ask() -> set[int]:
        rows.clear()
        ours.loglikelihood(requests_of("loglikelihood", ("house river", " stone"), ("house", " bread water light")))
        settings = {"until": ["\n"], "max_gen_toks": 2}
        ours.generate_until(requests_of("generate_until", ("house", settings), ("house river", settings)))
        return set(rows)

    assert ask() == {2}
    for layer in moe_layers(ours.model):
        layer.router.classifies_sequences = True
    assert ask() == {1}


def test_a_tokenizer_s_own_bos_does_not_stand_before_a_document_twice(trained: Tree) -> None:
    from tokenizers.processors import TemplateProcessing

    context = context_of(trained)
    texts = requests_of("loglikelihood_rolling", ("house river",))
    expected = shared_lm(context).loglikelihood_rolling(texts)
    tokenizer = tokenizer_of(context, context.start_model)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    assert tokenizer("house").input_ids[0] == beginning_of(context, tokenizer)
    assert shared_lm(context, tokenizer=tokenizer).loglikelihood_rolling(texts) == pytest.approx(expected)


def test_plain_lm_eval_on_an_export_gives_our_bits_with_the_tasks_of_the_run(scored: Tree, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    context = context_of(scored)
    export_run(context, None, None, tmp_path / "exported")
    lm = HFLM(
        pretrained=str(tmp_path / "exported"), trust_remote_code=True, device="cpu", dtype="float32",
        softmax_dtype="float32", prefix_token_id=context.store.separator_id, max_length=WINDOW,
    )  # fmt: skip
    manager = TaskManager(include_path=context.folder / "tasks", include_defaults=False)
    results = lm_eval.evaluate(lm, manager.load(["held_out"]), bootstrap_iters=0)
    for name, result in evaluation_of(scored).sets.items():
        found = results["results"][f"held_out_{name}"]
        size = sum(document.bytes for document in context.store.held_out_documents(name))
        ours = sum(result.bits_by_document["stage2"]) / size
        assert found["bits_per_byte,none"] == pytest.approx(ours, abs=1e-3)
        assert found["bits_per_character,none"] == pytest.approx(result.bits_per_character["stage2"], abs=1e-3)


def test_a_group_s_row_stands_for_its_tasks(scored: Tree) -> None:
    tasks = evaluation_of(scored).tasks
    whole, many, one = (tasks[name]["stage1"] for name in (GROUP, CHOICES, ONE))
    expected = (5 * many.metrics["acc"].value + one.metrics["acc"].value) / 6
    assert whole.metrics["acc"].value == pytest.approx(expected)
    assert whole.samples == 6 and whole.few_shot == -1
    assert many.part_of == one.part_of == GROUP and not whole.part_of
    table = task_table(evaluation_of(scored))
    assert GROUP in table and CHOICES not in table and ONE not in table
    assert re.search(rf"{GROUP}\s+acc, higher is better\s+mixed\s+6 ", table)


def test_table_report_card_and_comparison_show_figures_with_their_errors(scored: Tree, tmp_path: Path) -> None:
    context, evaluation = context_of(scored), evaluation_of(scored)
    figure = evaluation.tasks["held_out_el"]["stage2"].metrics["bits_per_byte"]
    assert figure.error is not None and 0 < figure.error < figure.value
    text = f"{figure.value:.4f} +-{figure.error:.4f}"
    assert text in task_table(evaluation)
    write_page(context.folder, [])
    assert text.replace("+-", "± ") in (context.folder / REPORT_FILE).read_text(encoding="utf-8")
    export_run(context, None, None, tmp_path / "exported")
    card = ModelCard.load(tmp_path / "exported" / "README.md")
    assert text in card.text
    (result,) = [
        one
        for one in card.data.eval_results or []
        if (one.dataset_type, one.metric_type) == ("held_out_el", "bits_per_byte")
    ]
    assert result.metric_value == round(figure.value, 4)
    assert result.metric_args == {"stderr": round(figure.error, 4)}
    assert result.dataset_args == {"num_few_shot": 0}
    assert text in as_text(compare(read_runs([str(context.folder.path)])))


def test_what_is_scored_is_not_scored_again_and_what_is_lost_alone_is(scored: Tree) -> None:
    context = context_of(scored)
    scoring = TaskScoring(context, Asked("held_out"))
    assert scoring.missing() == {}
    path = scoring._evaluator._path(context.start_model, "held_out_el")
    kept = path.read_bytes()
    path.unlink()
    assert scoring.missing() == {"base": ["held_out_el"]}
    path.write_bytes(kept)
    file = Path(scored["output_dir"]).parent / "own" / f"{CHOICES}.yaml"
    assert TaskScoring(context, Asked(str(file))).missing() == {}
    assert TaskScoring(context, Asked(str(file), few_shot=2)).missing() == dict.fromkeys(LABELS, [CHOICES])


def test_evaluating_again_keeps_tasks_of_the_same_weights_and_text_and_drops_others(
    scored: Tree, tmp_path: Path
) -> None:
    tree = {**scored, "output_dir": str(tmp_path / "runs")}
    shutil.copytree(scored["output_dir"], tmp_path / "runs", symlinks=True)
    context, before = context_of(tree), evaluation_of(tree)
    score(context, None, None)
    assert evaluation_of(tree).tasks == before.tasks
    stale = {**before.tasks[CHOICES], "stage2": before.tasks[CHOICES]["stage2"].model_copy(update={"of": "others"})}
    text = {label: one.model_copy(update={"version": "1-other"}) for label, one in before.tasks["held_out_el"].items()}
    changed = before.model_copy(update={"tasks": {**before.tasks, CHOICES: stale, "held_out_el": text}})
    changed.save(context.folder / EVALUATION_FILE)
    score(context, None, None)
    kept = evaluation_of(tree).tasks
    assert list(kept[CHOICES]) == ["base", "stage1"]
    assert "held_out_el" not in kept and kept["held_out_hu"] == before.tasks["held_out_hu"]


def test_another_number_of_examples_takes_the_place_of_the_first(pools: Pools, scored: Tree, tmp_path: Path) -> None:
    tree = {**scored, "output_dir": str(tmp_path / "runs")}
    shutil.copytree(scored["output_dir"], tmp_path / "runs", symlinks=True)
    file = Path(scored["output_dir"]).parent / "own" / f"{CHOICES}.yaml"
    pools[1].run(on_rank, tree, Asked(str(file), few_shot=3))
    tasks = evaluation_of(tree).tasks
    assert {label: one.few_shot for label, one in tasks[CHOICES].items()} == dict.fromkeys(LABELS, 3)
    assert tasks[SPELLED] == evaluation_of(scored).tasks[SPELLED]


def test_one_checkpoint_s_tasks_stand_beside_its_bits(pools: Pools, scored: Tree, tmp_path: Path) -> None:
    tree = {**scored, "output_dir": str(tmp_path / "runs")}
    shutil.copytree(scored["output_dir"], tmp_path / "runs", symlinks=True)
    pools[1].run(on_rank, tree, Asked("held_out_el", tag="stage1"))
    context = context_of(tree)
    evaluation = Evaluation.load(context.folder.evaluation_of("stage1"))
    assert list(evaluation.tasks) == ["held_out_el"] and list(evaluation.tasks["held_out_el"]) == ["base", "stage1"]
    assert context.folder.tasks_done.is_file()


MISTAKES = [
    (["--tasks", "held_uot"], "--tasks held_uot: no task of this name in lm-eval or launch/tasks"),
    (["--tasks", ","], '--tasks ",": names no task; give some, such as --tasks held_out'),
    (["--tasks", "held_out", "--few-shot", "-1"], "--few-shot -1: give 0 or more"),
    (["--few-shot", "3"], "--few-shot 3: is of --tasks NAMES; give both, or leave it out"),
    (["--tasks", "arc_challenge"], "--tasks arc_challenge: its data is not here (Couldn't reach 'allenai/ai2_arc'"),
    (["--tasks", "flores_en-hu"], "python -m pipeline fetch RUN.yaml --tasks flores_en-hu"),
    (["--tasks", "{empty}"], "holds no task of lm-eval's; give it a YAML file with a task: in it"),
    (["--tasks", "{own}/broken.yaml"], "--tasks broken: can't be loaded (ValueError: no such words)"),
    (
        ["--tasks", "{own}/own_choices.yaml", "--few-shot", "6"],
        "own_choices: 6 examples, but it has 5 to take them from",
    ),
    (["--tasks", "held_out", "--checkpoint", "stage3"], "--checkpoint stage3: unknown"),
]


@pytest.mark.parametrize(("words", "line"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_line(trained: Tree, tmp_path: Path, words: list[str], line: str) -> None:
    (tmp_path / "empty").mkdir()
    own = write_own_tasks(tmp_path / "own")
    (own / "broken.py").write_text("def load(**_others):\n    raise ValueError('no such\\nwords')\n")
    (own / "broken.yaml").write_text("task: broken\ncustom_dataset: !function broken.load\n")
    words = [word.format(empty=tmp_path / "empty", own=own) for word in words]
    file = str(context_of(trained).folder.run_file)
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        main(["evaluate", file, *words])
    assert "\n" not in str(caught.value)


def test_the_command_scores_on_ranks_of_its_own_and_prints_the_table(
    trained: Tree, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = write_own_tasks(tmp_path / "own")
    tree = copy_of(trained, tmp_path)
    context = context_of(tree)
    file = tmp_path / "run.yaml"
    file.write_text(context.folder.text(context.run), encoding="utf-8")
    assert main(["evaluate", str(file), "--tasks", f"{own},held_out", "--report"]) == 0
    said, errors = capfd.readouterr()
    assert "lm-eval 0.4.13; +- is a standard error" in said and f"evaluate: stage2       {CHOICES}" in said
    assert "%|" not in errors, "no bars but on a terminal"
    assert set(evaluation_of(tree).tasks) == {
        CHOICES,
        ONE,
        SPELLED,
        GROUP,
        *(f"held_out_{x}" for x in context.store.sets),
    }
    assert "Each checkpoint on tasks of lm-eval" in (context.folder / REPORT_FILE).read_text(encoding="utf-8")
    assert main(["evaluate", str(file), "--tasks", "held_out"]) == 0
    again = capfd.readouterr().out
    assert f"evaluate: stage2       {CHOICES}" not in again and "held_out_el" in again
    torch.set_num_threads(1)
