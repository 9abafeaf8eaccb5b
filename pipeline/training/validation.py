"""Validation during training: bits per character on the head of each held-out set."""

from collections.abc import Iterable

from common.files import content_key
from pipeline.config.run import ValidateConfig
from pipeline.evaluation.score_cache import FORMAT
from pipeline.evaluation.scoring import score_sets
from pipeline.model.new_rows import new_rows
from pipeline.records.evaluation import SetScore, ValidationBase
from pipeline.records.metrics import ValidationRow
from pipeline.records.run_folder import VALIDATION_BASE_FILE
from pipeline.training.forgetting import forgotten, sets_of_old_languages
from pipeline.training.state import TrainingState


def validation_is_due(settings: ValidateConfig, step: int, num_steps: int, batch_tokens: int) -> bool:
    """Every ``every_tokens`` and at the end; one shortly before the end is left out."""
    if settings.every_tokens is None:
        return False
    every = max(1, settings.every_tokens // batch_tokens)
    return step == num_steps or (step % every == 0 and num_steps - step >= every / 2)


def score_heads(state: TrainingState, names: Iterable[str], *, by_own_tokenizer: bool = False) -> dict[str, SetScore]:
    """Score the heads of some held-out sets; see :func:`pipeline.evaluation.scoring.score_sets`."""
    run, model = state.inputs.run, state.engine.module
    model.eval()
    scores = score_sets(
        model,
        state.inputs.store,
        names,
        state.ranks,
        window=run.evaluate.window,
        max_tokens=run.validate_.max_tokens_per_set,
        by_own_tokenizer=by_own_tokenizer,
    )
    model.train()
    return scores


def validate(state: TrainingState) -> ValidationRow:
    """Score each set, and note in the state whether the mean over new and old sets is the best so far."""
    data = state.inputs.run.data
    scores = score_heads(state, data.sets)
    sets = {name: score.bits_per_character for name, score in scores.items()}
    trained_on = [sets[name] for name in (*data.new, *data.old)]
    mean = sum(trained_on) / len(trained_on)
    is_best = mean < state.best_value
    if is_best:
        state.best_value, state.best_tag = mean, state.tag
    return ValidationRow(
        **state.progress, sets=sets, mean=mean, best=is_best, forgotten=forgotten(state.base_scores, scores)
    )


def measure_base(state: TrainingState) -> None:
    """Note in the state how the untrained mixture, which is the base model, scores the sets of old languages.

    It is measured once for a run, before its first step, and kept in its folder. Where training began without, there
    is nothing to compare with.
    """
    run, store = state.inputs.run, state.inputs.store
    names = sets_of_old_languages(run.data)
    if run.validate_.every_tokens is None or not names:
        return
    asked = [{name: store.keys[name] for name in names}, run.validate_.max_tokens_per_set, run.evaluate.window, FORMAT]
    key, path = content_key([*asked, state.inputs.identity.model]), state.inputs.folder.parent / VALIDATION_BASE_FILE
    known = ValidationBase.load_if_there(path)
    if known is not None and known.key == key:
        state.base_scores = known.sets
    elif state.inputs.stage1_checkpoint is None and state.step == 0:
        is_dense = bool(new_rows(state.engine.module, that_train=True))  # else it has learned all of its rows before
        state.base_scores = score_heads(state, names, by_own_tokenizer=is_dense)
        if state.ranks.is_first:
            ValidationBase(key=key, sets=state.base_scores).save(path)
    else:
        state.say("the base model was not scored before training, so no validation says what is forgotten")
