"""The verb ``generate``: how the base model and the stages continue a prompt."""

import sys
from typing import TYPE_CHECKING

from common.errors import UserError
from pipeline.records.evaluation import BASE
from pipeline.run.context import RunContext
from pipeline.run.scoring import models_to_score
from pipeline.run.tokenizers import beginning_of, tokenizer_of

if TYPE_CHECKING:
    from pipeline.evaluation.generate import Sampling


def generate(
    context: RunContext, prompts: list[str], labels: str | None, sampling: "Sampling", *, shows_experts: bool
) -> None:
    """Print each model's continuation of each prompt as it comes.

    Args:
        context: the run.
        prompts: beginnings of texts.
        labels: names of checkpoints as ``evaluate --checkpoint`` takes them, or 1 and 2 for stages, with commas
            between; without them the base model and the last stage.
        sampling: how tokens are chosen.
        shows_experts: whether the experts of each token are shown too.

    Raises:
        UserError: a prompt is empty, or there is no such checkpoint.
    """
    from pipeline.distributed.process_group import alone
    from pipeline.evaluation.checkpoints import load_scored
    from pipeline.evaluation.generate import continuation, experts_table
    from pipeline.model.backbone import ONE_RANK

    if not all(prompt.strip() for prompt in prompts):
        raise UserError('--prompt: is empty; give the beginning of a text, such as --prompt "Il était"')
    end = context.store.separator_id
    for label in _labels(context, labels):
        scored = models_to_score(context, label)[-1]
        model = load_scored(scored, context.dense, context.dtype, alone(), ONE_RANK)
        tokenizer = tokenizer_of(context, scored)
        for prompt in prompts:
            print(f"\n--- {label}", flush=True)
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            ids = [beginning_of(context, tokenizer), *ids]
            ids = continuation(model, tokenizer, ids, sampling, end=end, streams=True)
            if shows_experts and scored.plan is not None:
                print(experts_table(model, scored.plan, tokenizer, ids, in_color=sys.stdout.isatty()), flush=True)
        del model


def _labels(context: RunContext, labels: str | None) -> list[str]:
    if labels is None:
        return [BASE, context.stages[-1]]
    return [f"stage{label}" if label in ("1", "2") else label for label in labels.replace(" ", "").split(",") if label]
