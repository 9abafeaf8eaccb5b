"""Scores of models on lm-eval's tasks: what the cache does not hold is computed, a task at a time."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.files import content_key
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.evaluation.begins import Begins
from pipeline.evaluation.checkpoints import Scored, load_scored
from pipeline.evaluation.ratio import ratio_with_error
from pipeline.evaluation.task_list import SEED, TaskList
from pipeline.records.task_score import Figure, TaskScore, TaskScores

FORMAT = 1  # raised when the same weights and task give other scores
DRAWS = 1000  # of lm-eval's bootstrap, for metrics whose standard error has no formula; 100 of BLEU, chrF and TER
Missing = dict[str, list[str]]  # by label, names of tasks


@dataclass(frozen=True)
class TaskEvaluator:
    """Scores models on tasks.

    Attributes:
        tasks: which.
        window: tokens per window where whole documents are scored.
        dense: the dense model's folder.
        dtype: that models are computed in.
        cache: the folder of scores.
    """

    tasks: TaskList
    window: int
    dense: Path
    dtype: torch.dtype
    cache: Path

    def missing(self, models: Sequence[Scored]) -> Missing:
        """By label, the tasks on which a model has not been scored yet; labels that lack none are left out."""
        wanted = {
            model.label: [name for name in self.tasks.tasks if not self._path(model, name).is_file()]
            for model in models
        }
        return {label: names for label, names in wanted.items() if names}

    def score(
        self, models: Sequence[Scored], missing: Missing, text: dict[str, Begins], ranks: Ranks, dims: ParallelDims
    ) -> None:
        """Score models on the tasks that ``missing`` names, on all ranks; the first one keeps the results.

        Args:
            models: which.
            missing: by label, names of tasks.
            text: by label, how the model's text begins.
            ranks: all of them take part.
            dims: how experts are spread over them.
        """
        from pipeline.evaluation.shared_lm import SharedLM

        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap would fork a process that is a rank
        missing = ranks.agreed(missing)
        for scored in models:
            if scored.label not in missing:
                continue
            model, how = load_scored(scored, self.dense, self.dtype, ranks, dims), text[scored.label]
            lm = SharedLM(
                model, how.tokenizer, ranks, beginning=how.beginning, separator=how.separator, window=self.window,
            )  # fmt: skip
            for name in missing[scored.label]:
                found = self._score(lm, name, ranks, model_key(scored, self.window, self.dtype))
                if found is not None:
                    ranks.say(f"evaluate: {scored.label:12} {name:24} {_line(found)}")
                    found.save(self._path(scored, name))
            del model, lm

    def _score(self, lm: Any, name: str, ranks: Ranks, of: str) -> TaskScore | None:
        """One task's; None on ranks other than the first."""
        import lm_eval

        task = self.tasks.tasks[name]
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        task.set_fewshot_seed(SEED)
        results = lm_eval.evaluate(
            lm, {"tasks": {name: task}}, bootstrap_iters=DRAWS if ranks.is_first else 0,
            log_samples=task.OUTPUT_TYPE == "loglikelihood_rolling",
        )  # fmt: skip
        if not ranks.is_first:
            return None
        return TaskScore(
            of=of,
            version=str(task.VERSION),
            lm_eval=lm_eval.__version__,
            few_shot=int(results["n-shot"][name] or 0),
            samples=int(results["results"][name]["sample_len"]),
            metrics=_figures(task, results["results"][name], results.get("samples", {}).get(name, [])),
        )

    def result(self, models: Sequence[Scored]) -> TaskScores:
        """By task and group, by label, from the cache alone."""
        found = {
            name: {model.label: self._loaded(model, name) for model in models} for name in self.tasks.tasks
        }  # fmt: skip
        for name in self.tasks.groups:
            of_group = {model.label: self._of_group(name, found, model) for model in models}
            found[name] = {label: score for label, score in of_group.items() if score is not None}
        return found

    def _loaded(self, model: Scored, name: str) -> TaskScore:
        score = TaskScore.load(self._path(model, name))
        return score.model_copy(update={"part_of": self.tasks.part_of(name)})

    def _of_group(self, name: str, found: TaskScores, model: Scored) -> TaskScore | None:
        """What lm-eval makes of the scores of a group's tasks; None where they have no metric in common with it."""
        group = self.tasks.groups[name]
        members = {task.task_name: found[task.task_name][model.label] for task in group.get_all_tasks()}
        summed = group.aggregate({task: _as_lm_eval(score) for task, score in members.items()})
        first, shots = next(iter(members.values())), {score.few_shot for score in members.values()}
        directions = {metric: one.higher_is_better for metric, one in first.metrics.items()}
        figures = {
            metric: Figure(value=value, error=_error(summed, metric), higher_is_better=directions.get(metric))
            for metric, value in _values(summed).items()
        }
        if not figures:
            return None
        return TaskScore(
            of=first.of,
            version=str(group.version),
            lm_eval=first.lm_eval,
            few_shot=shots.pop() if len(shots) == 1 else -1,
            samples=sum(score.samples for score in members.values()),
            metrics=figures,
            part_of=self.tasks.part_of(name),
        )

    def _path(self, model: Scored, name: str) -> Path:
        import lm_eval

        of = model_key(model, self.window, self.dtype)
        key = [FORMAT, lm_eval.__version__, of, name, self.tasks.contents[name]]
        return self.cache / f"{content_key(key)}.json"


def model_key(scored: Scored, window: int, dtype: torch.dtype) -> str:
    """What names a model's weights, the window and the dtype: scores of another key are of another model."""
    return content_key({"weights": scored.weights, "window": window, "dtype": str(dtype)})


def _figures(task: Any, metrics: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Figure]:
    """A task's metrics; where lm-eval gives no standard error of a ratio of sums over documents, ours."""
    directions = task.higher_is_better()
    found = {}
    for name, value in _values(metrics).items():
        metric, _, filter_name = name.partition(",")
        error = _error(metrics, name)
        if error is None and samples:
            values = [one[metric] for one in samples if one["filter"] == (filter_name or "none")]
            error = _error_of_ratio(task.aggregation().get(metric), values)
        found[name] = Figure(value=value, error=error, higher_is_better=directions.get(metric))
    return found


def _values(metrics: dict[str, Any]) -> dict[str, float]:
    """lm-eval's "metric,filter" as names here, without errors and what is no metric."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float | np.number)
    }


def _error(metrics: dict[str, Any], name: str) -> float | None:
    metric, _, filter_name = name.partition(",")
    value = metrics.get(f"{metric}_stderr,{filter_name or 'none'}")
    return float(value) if isinstance(value, int | float | np.number) else None


def _error_of_ratio(aggregation: Any, values: list[Any]) -> float | None:
    """Of metrics that lm-eval computes from a log-likelihood and a count for each document; None of others."""
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity

    if aggregation not in (bits_per_byte, weighted_perplexity):
        return None
    nats, counts = np.array(values, dtype=np.float64).T
    ratio, error = ratio_with_error(-nats, counts)
    if error is None:
        return None
    return error / float(np.log(2)) if aggregation is bits_per_byte else error * float(np.exp(ratio))


def _as_lm_eval(score: TaskScore) -> dict[str, Any]:
    """A score in the form in which lm-eval sums scores up."""
    found: dict[str, Any] = {"sample_len": score.samples}
    for name, figure in score.metrics.items():
        metric, _, filter_name = name.partition(",")
        found[f"{metric},{filter_name or 'none'}"] = figure.value
        found[f"{metric}_stderr,{filter_name or 'none'}"] = "N/A" if figure.error is None else figure.error
    return found


def _line(score: TaskScore) -> str:
    """A score's first metrics, for a log."""
    return "  ".join(f"{name} {figure.value:.4f}" for name, figure in list(score.metrics.items())[:2])


def kept_tasks(
    before: TaskScores, models: dict[str, str], versions: dict[str, str], now: TaskScores | None = None
) -> TaskScores:
    """What holds of earlier scores, with those of now in their place.

    Args:
        before: what was written before.
        models: by label, the key of the model that has it now: scores of another model are left out.
        versions: of tasks whose version is known: scores of another version are left out.
        now: what has just been computed; a task in it that is asked otherwise than before replaces all of it.
    """
    result: TaskScores = {}
    for name, scores in before.items():
        holds = {label: score for label, score in scores.items() if models.get(label) == score.of}
        new = list((now or {}).get(name, {}).values())
        holds = {
            label: score
            for label, score in holds.items()
            if score.version == versions.get(name, score.version) and (not new or score.is_like(new[0]))
        }
        if holds:
            result[name] = holds
    for name, scores in (now or {}).items():
        result[name] = {**result.get(name, {}), **scores}
    return result
