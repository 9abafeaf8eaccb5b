"""Validation during training: bits per character on the head of each held-out set."""

from pipeline.config.run import ValidateConfig
from pipeline.evaluation.scoring import score_set
from pipeline.records.metrics import ValidationRow
from pipeline.training.state import TrainingState


def validation_is_due(settings: ValidateConfig, step: int, num_steps: int, batch_tokens: int) -> bool:
    """Every ``every_tokens`` and at the end; one shortly before the end is left out."""
    if settings.every_tokens is None:
        return False
    every = max(1, settings.every_tokens // batch_tokens)
    return step == num_steps or (step % every == 0 and num_steps - step >= every / 2)


def validate(state: TrainingState) -> ValidationRow:
    """Score each set, and note in the state whether the mean over new and old sets is the best so far."""
    run, model = state.inputs.run, state.engine.module
    model.eval()
    sets = {
        name: score_set(
            model,
            state.inputs.store,
            name,
            state.ranks,
            window=run.evaluate.window,
            max_tokens=run.validate_.max_tokens_per_set,
        ).bits_per_character
        for name in run.data.sets
    }
    model.train()
    trained_on = [sets[name] for name in (*run.data.new, *run.data.old)]
    mean = sum(trained_on) / len(trained_on)
    is_best = mean < state.best_value
    if is_best:
        state.best_value, state.best_tag = mean, state.tag
    return ValidationRow(**state.progress, sets=sets, mean=mean, best=is_best)
