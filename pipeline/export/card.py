"""The model card of an exported folder: what the model is, what came of it, how to load it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common.text_table import markdown_table
from data_prep.config import SetConfig
from data_prep.reading.hub import is_folder
from pipeline.config.run import RunConfig
from pipeline.evaluation.task_table import shown_tasks, task_rows
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.evaluation import BASE, GROUPS, Change, Evaluation, SetResult

PAPERS = "[MoE-LPR](https://arxiv.org/abs/2408.11396) and [LayerMoE](https://arxiv.org/abs/2505.22582)"
LIMITS = (
    "It was trained to continue text, and measured by that alone: what the dense model knew of instructions or "
    "safety was neither trained nor tested. Languages that are not named here may have got worse."
)
IN_CARD = "FOLDER"  # stands for the exported folder, or for its name on the hub
GROUP_NAMES = {"new": "learned", "old": "known before", "watch": "only watched"}


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        run: the run's settings.
        plan: of the experts.
        label: of the checkpoint: stage1, stage2/best …
        evaluation: of the run; None if it has not been evaluated.
        base_model: the dense model's hub id; None where it is a folder.
        dtype: of the weights.
        new_tokens: how many its tokenizer has more than the dense model's.
        native: the class of transformers that loads the folder without code of its own; None for that of the folder.
        instruct: the instruct model whose difference to the dense one was added; None for none.
    """

    run: RunConfig
    plan: ExpertPlan
    label: str
    evaluation: Evaluation | None
    base_model: str | None
    dtype: str
    new_tokens: int = 0
    native: str | None = None
    instruct: str | None = None


def model_card(facts: CardFacts) -> ModelCard:
    """The card, with its metadata for the hub."""
    text = "\n\n".join(
        [
            f"# {facts.run.name}",
            _what_it_is(facts),
            "## Results",
            _results(facts),
            *_tasks(facts),
            "## How to use it",
            _usage(facts),
            "## How it was made",
            _training(facts),
            "## Limits",
            LIMITS,
        ]
    )
    return ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{text}\n")


def _metadata(facts: CardFacts) -> ModelCardData:
    of_sets = [entry.language for sets in (facts.run.data.old, facts.run.data.new) for entry in sets.values()]
    languages = list(dict.fromkeys([*(language for one in facts.plan.rounds for language in one.languages), *of_sets]))
    return ModelCardData(
        language=languages,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=facts.base_model,
        datasets=_datasets(facts.run) or None,
        tags=["mixture-of-experts", "moe-lpr", "layermoe"],
        model_name=facts.run.name,
        eval_results=[*_eval_results(facts), *_results_of_tasks(facts)] or None,
    )


def _datasets(run: RunConfig) -> list[str]:
    """The hub's datasets that it was trained on."""
    sources = [one for sets in (run.data.old, run.data.new) for entry in sets.values() for one in entry.source_list]
    names = [one.hub for one in sources if one.hub is not None and not is_folder(one.hub)]
    return list(dict.fromkeys(names))


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=f"{name}, held out ({result.language})",
            metric_type="bits_per_character",
            metric_name="bits per character",
            metric_value=round(result.bits_per_character[facts.label], 4),
        )
        for name, result in _scored(facts)
    ]


def _results_of_tasks(facts: CardFacts) -> list[EvalResult]:
    """The checkpoint's figures on lm-eval's tasks."""
    tasks = {} if facts.evaluation is None else shown_tasks(facts.evaluation.tasks)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=f"{name} (lm-eval {scores[facts.label].lm_eval})",
            dataset_args={"num_few_shot": scores[facts.label].few_shot} if scores[facts.label].few_shot >= 0 else None,
            metric_type=metric.partition(",")[0],
            metric_name=metric,
            metric_value=round(figure.value, 4),
            metric_args=None if figure.error is None else {"stderr": round(figure.error, 4)},
        )
        for name, scores in tasks.items()
        if facts.label in scores
        for metric, figure in scores[facts.label].metrics.items()
    ]


def _scored(facts: CardFacts) -> list[tuple[str, SetResult]]:
    """The sets on which the checkpoint was scored, in the order in which people read them."""
    if facts.evaluation is None:
        return []
    sets = facts.evaluation.sets.items()
    return [
        (name, result)
        for group in GROUPS
        for name, result in sets
        if result.group == group and facts.label in result.bits_per_character
    ]


def _what_it_is(facts: CardFacts) -> str:
    if facts.run.method.is_dense:
        return _of_a_baseline(facts)
    dense, *rounds = facts.plan.rounds
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "A dense model"
    lines = [f"{base}, which knows {_and(dense.languages)}, as a mixture of experts that has learned "
             f"{_and([language for one in rounds for language in one.languages])}."]  # fmt: skip
    routers = len(facts.plan.moe_layers)
    is_layerwise = facts.run.experts.allocation == "layerwise"
    where = ", more where languages look different to a layer" if is_layerwise else ""
    lines.append(
        f"Each layer's MLP is frozen as expert 0; {sum(facts.plan.num_new)} new experts in {routers} of "
        f"{facts.plan.num_layers} layers were trained{where}. A token takes {facts.plan.top_k} of a layer's experts."
    )
    for number, one in enumerate(rounds, 1):
        if len(rounds) > 1:
            lines.append(
                f"Round {number} added {sum(one.num_new)} experts for {_and(one.languages)}, copies of {one.source}."
            )
    if facts.evaluation is not None:
        counts = facts.evaluation.parameters
        total, active, dense_total = (f"{counts[key] / 1e6:.1f} M" for key in ("total", "active", "dense"))
        lines.append(f"Parameters: {total}, of which a token uses {active} (the dense model has {dense_total}).")
    return " ".join(lines)


def _of_a_baseline(facts: CardFacts) -> str:
    data, method = facts.run.data, facts.run.method
    old, new = ([entry.language for entry in sets.values()] for sets in (data.old, data.new))
    options = ", ".join(f"{name} {value}" for name, value in method.options.items())
    return (
        f"{facts.base_model or 'A dense model'}, which knows {_and(dict.fromkeys(old or ['others']))}, trained "
        f"on {_and(dict.fromkeys(new))} by {method.name}{f' ({options})' if options else ''}: a baseline."
    )


def _and(names: Any) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else str(last)


def _results(facts: CardFacts) -> str:
    scored = _scored(facts)
    if not scored:
        return "This checkpoint has not been evaluated."
    rows = [["set", "language", "", "before", "after", "change"]]
    for name, result in scored:
        before, after = result.bits_per_character[BASE], result.bits_per_character[facts.label]
        rows.append([name, result.language, GROUP_NAMES[result.group], f"{before:.3f}", f"{after:.3f}",
                     _change(result.change[facts.label])])  # fmt: skip
    assert facts.evaluation is not None
    forgotten = facts.evaluation.forgotten(facts.label)
    worse = ", ".join(f"{name} ({_change(change)})" for name, change in forgotten.items())
    verdict = f"Worse than before, beyond the interval: {worse}." if worse else "No known language got worse."
    of = (
        "" if facts.instruct is None else f" These are the scores before the difference of {facts.instruct} was added."
    )
    return (
        "Bits per character of held-out documents, lower is better; +- is a paired 95 % interval over documents."
        f"{of}\n\n{markdown_table(rows)}\n\n{verdict}"
    )


def _tasks(facts: CardFacts) -> list[str]:
    """The table of lm-eval's tasks, if there is any."""
    tasks = {} if facts.evaluation is None else facts.evaluation.tasks
    if not any(facts.label in scores for scores in tasks.values()):
        return []
    table = markdown_table(task_rows(tasks, {BASE: "before", facts.label: "after"}))
    return [f"On tasks of lm-eval; +- is one standard error.\n\n{table}"]


def _change(change: Change) -> str:
    interval = "" if change.interval is None else f" +-{change.interval:.1f}"
    return f"{change.percent:+.1f} %{interval}"


def _usage(facts: CardFacts) -> str:
    plain = f'`AutoModelForCausalLM.from_pretrained("{IN_CARD}", dtype="{facts.dtype}")`'
    if facts.run.method.is_dense:
        return plain
    if facts.native is not None:
        return f"{plain} loads it as a model of transformers' own class {facts.native}."
    return (
        "The folder carries its own code (`modeling_upcycled.py`, `router.py`), for transformers from 5.17 on:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{IN_CARD}", trust_remote_code=True, dtype="{facts.dtype}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{IN_CARD}")\n```'
    )


def _training(facts: CardFacts) -> str:
    run = facts.run
    lines = [f"- {PAPERS}, checkpoint {facts.label}, seed {run.seed}"]
    if facts.new_tokens:
        first = "stage 1" if run.base is None else "stage 1 of the first round"
        lines.append(
            f"- tokenizer: the dense model's with {facts.new_tokens:,} more tokens; their embedding and head rows "
            f"began as the mean of their pieces' and were trained in {first}"
        )
    for number in run.stage_numbers:
        stage = run.stage(number)
        experts = f"method {run.method.name}" if run.method.is_dense else "new experts and routers"
        what = experts if number == 1 else "routers, with a replay of all languages"
        lines.append(
            f"- stage {number}: {what}; {stage.tokens:,} tokens in batches of {stage.global_batch_size} x "
            f"{stage.sequence_length}, learning rate {stage.lr:g}"
        )
    if facts.instruct is not None:
        lines.append(
            f"- what instruction tuning added to the dense model, {facts.instruct} minus it, was added to each weight "
            "and each expert ([DeltaMoE](https://arxiv.org/abs/2605.18083)); experimental"
        )
    for group in ("old", "new"):
        for name, entry in getattr(run.data, group).items():
            lines.append(f"- text, {group}: {name} ({entry.language}) from {_sources(entry)}")
    return "\n".join(lines)


def _sources(entry: SetConfig) -> str:
    """Where a set's text comes from, each source with its licence."""
    found: dict[str, str] = {}
    for one in entry.source_list:
        license = one.license or entry.license
        name = str(one.hub or Path(str(one.path)).name)
        found[name] = f"{name} ({license})" if license else f"{name} (licence not recorded)"
    return ", ".join(found.values())
