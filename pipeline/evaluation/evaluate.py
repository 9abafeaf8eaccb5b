"""Bits per character of the base model and of each checkpoint, and how their tokens are routed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import nn

from data_prep.store import TokenStore
from pipeline.config.run import RunConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.evaluation.checkpoints import Scored, load_scored
from pipeline.evaluation.continuations import Continuations
from pipeline.evaluation.ratio import ratio_with_error
from pipeline.evaluation.score_cache import ScoreCache
from pipeline.evaluation.scoring import score_sets
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.evaluation import (
    BASE,
    Change,
    Continuation,
    Evaluation,
    SetResult,
    SetScore,
    Shares,
    StageRouting,
)

Scores = dict[str, dict[str, SetScore]]  # by label, by set


@dataclass(frozen=True)
class Work:
    """What is to be computed with one model: sets to score, and whether it goes on from the prompts."""

    sets: list[str]
    continues: bool


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
        continuations: what asks models to go on from the run's prompts.
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
        continuations: Continuations,
    ) -> None:
        self.run, self.plan, self.store, self.texts = run, plan, store, texts
        self.dense, self.dtype, self.cache, self.continuations = dense, dtype, cache, continuations

    def missing(self, models: list[Scored]) -> dict[str, Work]:
        """By label, what has not been computed yet; labels that lack nothing are left out."""
        wanted = {
            model.label: Work(
                [name for name, text in self.texts.items() if not self.cache.has(model.weights, text)],
                model in asked(models) and self.continuations.lacks(model),
            )
            for model in models
        }
        return {label: work for label, work in wanted.items() if work.sets or work.continues}

    def everything(self, models: list[Scored]) -> dict[str, Work]:
        """By label, all that there is to compute."""
        prompts = bool(self.continuations.prompts)
        return {model.label: Work(list(self.texts), prompts and model in asked(models)) for model in models}

    def score(self, models: list[Scored], missing: dict[str, Work], ranks: Ranks, dims: ParallelDims) -> None:
        """Compute what ``missing`` names, on all ranks; the first one keeps the results."""
        missing = ranks.agreed(missing)
        for scored in models:
            if scored.label not in missing:
                continue
            model = load_scored(scored, self.dense, self.dtype, ranks, dims)
            work = missing[scored.label]
            if work.sets:
                self._score_sets(scored, model, work.sets, ranks)
            if work.continues:
                ranks.at("continuing prompts")
                self.continuations.make(scored, model, saves=ranks.is_first)
            del model

    def _score_sets(self, scored: Scored, model: nn.Module, names: list[str], ranks: Ranks) -> None:
        languages = {name: self.run.data.sets[name].language for name in names}
        plan = scored.plan
        groups = None if plan is None else {name: plan.round_of(language) for name, language in languages.items()}
        found = score_sets(
            model, self.store, names, ranks,
            window=self.run.evaluate.window, groups=groups, by_own_tokenizer=scored.by_own_tokenizer,
            title=f"evaluate {scored.label}",
        )  # fmt: skip
        for name, score in found.items():
            ranks.say(f"evaluate: {scored.label:12} {name:12} {score.bits_per_character:.4f} bits/char")
            if ranks.is_first:
                self.cache.save(scored.weights, self.texts[name], score)

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
            continuations=self._continuations(asked(models)),
            parameters=parameters,
        )

    def _continuations(self, models: list[Scored]) -> list[Continuation]:
        prompts = self.continuations.prompts
        texts = {model.label: self.continuations.load(model) for model in models} if prompts else {}
        return [
            Continuation(name=name, prompt=prompt, texts={label: found[name] for label, found in texts.items()})
            for name, prompt in prompts.items()
        ]

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


def asked(models: list[Scored]) -> list[Scored]:
    """Those that go on from prompts: the base model and the last checkpoint."""
    return [models[0], *models[1:][-1:]]


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
