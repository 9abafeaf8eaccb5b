"""Bits per character of the base model and of each checkpoint, and how their tokens are routed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

from data_prep.store import TokenStore
from pipeline.config.run import RunConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.evaluation.checkpoints import Scored, load_scored
from pipeline.evaluation.ratio import ratio_with_error
from pipeline.evaluation.score_cache import ScoreCache
from pipeline.evaluation.scoring import score_set
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.evaluation import BASE, Change, Evaluation, SetResult, SetScore, Shares, StageRouting

Scores = dict[str, dict[str, SetScore]]  # by label, by set


class Evaluator:
    """Scores models on a run's sets; what the cache holds is not computed again.

    Args:
        run: its settings.
        plan: how many experts each layer has.
        store: the tokens.
        texts: by set, a hash of its held-out text.
        dense: the dense model's folder.
        dtype: that models are computed in.
        cache: where scores are kept.
    """

    def __init__(
        self,
        run: RunConfig,
        plan: ExpertPlan,
        store: TokenStore,
        texts: dict[str, str],
        *,
        dense: Path,
        dtype: torch.dtype,
        cache: ScoreCache,
    ) -> None:
        self.run, self.plan, self.store, self.texts = run, plan, store, texts
        self.dense, self.dtype, self.cache = dense, dtype, cache

    def missing(self, models: list[Scored]) -> dict[str, list[str]]:
        """By label, the sets on which a model has not been scored yet; labels that lack none are left out."""
        wanted = {
            model.label: [name for name, text in self.texts.items() if not self.cache.has(model.weights, text)]
            for model in models
        }
        return {label: names for label, names in wanted.items() if names}

    def score(self, models: list[Scored], missing: dict[str, list[str]], ranks: Ranks, dims: ParallelDims) -> None:
        """Score models on the sets that ``missing`` names, on all ranks; the first one keeps the results."""
        missing = agreed(missing, ranks)
        for scored in models:
            if scored.label not in missing:
                continue
            model = load_scored(scored, self.dense, self.dtype, ranks, dims)
            for name in missing[scored.label]:
                plan = scored.plan
                group = plan.round_of(self.run.data.sets[name].language) if plan is not None else None
                found = score_set(
                    model, self.store, name, ranks,
                    window=self.run.evaluate.window, group=group, by_own_tokenizer=scored.by_own_tokenizer,
                )  # fmt: skip
                ranks.say(f"evaluate: {scored.label:12} {name:12} {found.bits_per_character:.4f} bits/char")
                if ranks.is_first:
                    self.cache.save(scored.weights, self.texts[name], found)
            del model

    def result(self, models: list[Scored], parameters: dict[str, int]) -> Evaluation:
        """Everything that ``evaluation.json`` holds, from the cache alone; the base model is the first of the models.

        Args:
            models: all of them scored on all sets.
            parameters: numbers of parameters by kind.
        """
        scores = {
            model.label: {name: self.cache.load(model.weights, text) for name, text in self.texts.items()}
            for model in models
        }
        return Evaluation(
            window=self.run.evaluate.window,
            checkpoints=list(scores),
            sets={name: self._set_result(name, scores) for name in self.texts},
            routing={label: self._routing(found) for label, found in scores.items() if self._is_routed(label)},
            own_experts=self._own_experts(scores),
            parameters=parameters,
        )

    def _set_result(self, name: str, scores: Scores) -> SetResult:
        by_label = {label: found[name] for label, found in scores.items()}
        base = by_label[BASE]
        after = {label: score for label, score in by_label.items() if label != BASE}
        return SetResult(
            group=self.run.data.group(name),
            language=self.run.data.sets[name].language,
            documents=len(base.characters),
            characters=sum(base.characters),
            bits_per_character={label: score.bits_per_character for label, score in by_label.items()},
            change={label: paired_change(np.array(base.bits), np.array(score.bits)) for label, score in after.items()},
            bits_by_document={label: [round(bits, 3) for bits in score.bits] for label, score in by_label.items()},
            pages=[document.page for document in self.store.held_out_documents(name)],
        )

    def _own_experts(self, scores: Scores) -> dict[str, dict[str, float]]:
        """By set of a language of an earlier round, by checkpoint."""
        if self.plan.num_groups < 3:
            return {}
        last = self.plan.num_groups - 1
        earlier = [name for name in self.texts if self._round_of(name) not in (None, last)]
        return {
            name: {label: own for label, found in scores.items() if (own := found[name].own_experts) is not None}
            for name in earlier
        }

    def _round_of(self, name: str) -> int | None:
        return self.plan.round_of(self.run.data.sets[name].language)

    def _is_routed(self, label: str) -> bool:
        return label != BASE and bool(self.plan.moe_layers)

    def _routing(self, scores: dict[str, SetScore]) -> StageRouting:
        sets = {name: Shares(**score.model_dump(include=set(Shares.model_fields))) for name, score in scores.items()}
        return StageRouting(layers=list(self.plan.moe_layers), sets=sets)


def agreed(value: Any, ranks: Ranks) -> Any:
    """The first rank's value on all ranks: a shared disk may show them different files."""
    if ranks.world_size == 1:
        return value
    holder = [value]
    torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def paired_change(before: np.ndarray, after: np.ndarray) -> Change:
    """The change of total bits in percent, and the half-width of its 95 % interval over documents.

    The interval is that of a ratio of sums over paired documents (the delta method): documents vary
    much more than a document's two scores do. None for a single document.

    Args:
        before: [documents] bits.
        after: [documents] bits of the same documents.
    """
    ratio, error = ratio_with_error(after, before)
    return Change(percent=100 * (ratio - 1), interval=None if error is None else 100 * 1.96 * error)
