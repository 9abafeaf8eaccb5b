"""The steps before upcycling: text to tokens, similarity, allocation."""

from common.errors import UserError
from common.files import content_key, sha256_file, write_json
from common.launch_environment import is_first_rank
from data_prep.config import SetConfig
from data_prep.prepare import prepare
from data_prep.sample import sample_documents
from data_prep.tokenizer import DocumentEncoder
from pipeline.config.experts import ExpertsConfig
from pipeline.config.run import RunConfig
from pipeline.method.allocation import allocate, clamp_similarity, ep_size_to_share, expert_plan
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.run_folder import PLAN_FILE, SIMILARITY_FILE, STATISTICS_FILE
from pipeline.records.similarity import Similarity
from pipeline.run.checks import warn_of_slow_bf16
from pipeline.run.context import RunContext
from pipeline.run.step import Inputs, Result


def tokenize_inputs(context: RunContext) -> Inputs:
    """The wanted token sets, and the tokenizer."""
    planned = context.planned
    benchmarks = {one.name: one.key for one in planned.sets if one.group == "benchmark"}
    return {"sets": planned.kept_keys, "benchmarks": benchmarks, "tokenizer": planned.tokenizer_key}


def tokens_are_there(context: RunContext) -> bool:
    """Whether the cache still holds them."""
    return context.planned.is_prepared


def tokenize(context: RunContext, _ranks: object) -> Result:
    """Text to token shards in the cache; tasks that srun started on several nodes share the work."""
    store = prepare(context.run.preparation, context.backend, force=context.force, planned=context.planned)
    assert store is not None
    if is_first_rank():
        write_json(context.folder / STATISTICS_FILE, store.statistics.model_dump(mode="json"))
    counts = {"train", "held_out", "dropped", "bad_rows"}
    sets = {name: one.manifest.model_dump(mode="json", include=counts) for name, one in store.sets.items()}
    return Result({"sets": store.keys}, {"sets": sets})


def similarity_inputs(context: RunContext) -> Inputs:
    """The model, the text of old and new sets with their languages, the tokenizer, and the settings.

    What caps and replay leave of the text does not matter.
    """
    data, planned = context.run.data, context.planned
    texts = {one.name: one.corpus for one in planned.sets if one.trains}
    return {
        "model": context.start,
        "dtype": str(context.dtype),
        "texts": texts,
        "tokenizer": _encoder_of_start(context).spec.key,
        "old": _languages(data.old),
        "new": _languages(data.new),
        "settings": context.run.similarity.model_dump(mode="json", exclude={"not_positive", "min_share"}),
    }


def _encoder_of_start(context: RunContext) -> DocumentEncoder:
    """The tokenizer of the model that the run starts from: a dense model knows no tokens that the run adds."""
    return context.planned.dense_encoder if context.base is None else context.planned.encoder


def measure_similarity(context: RunContext, _ranks: object) -> Result:
    """Tokens and dense model to similarity.json: one pass, nothing stored but means; kept in the cache."""
    cached = context.run.cache_dir / "similarity" / f"{content_key(similarity_inputs(context))}.json"
    if cached.is_file():
        print(f"similarity: {cached} is there already, skipped", flush=True)
    else:
        _measure(context).save(cached)
    found = Similarity.load(cached)
    found.save(context.folder / SIMILARITY_FILE)
    warnings = _few_tokens(context, found)
    for line in warnings:
        print(f"warning: {line}", flush=True)
    return Result({"similarity": sha256_file(cached)[:16]}, {"warnings": warnings})


def _measure(context: RunContext) -> Similarity:
    from pipeline.distributed.process_group import alone
    from pipeline.evaluation.checkpoints import load_scored
    from pipeline.method.similarity import similarity_of_sets
    from pipeline.model.backbone import ONE_RANK

    settings, data = context.run.similarity, context.run.data
    planned, encoder = context.planned, _encoder_of_start(context)
    documents = {
        name: [document.ids for document in sample_documents(planned, name, settings.tokens, encoder)]
        for name in (*data.old, *data.new)
    }
    warn_of_slow_bf16(context)
    _check_sample(context, {name: sum(map(len, found)) for name, found in documents.items()})
    model = load_scored(context.start_model, context.dense, context.dtype, alone(), ONE_RANK)
    return similarity_of_sets(model, documents, _languages(data.old), _languages(data.new), settings)


def _check_sample(context: RunContext, tokens: dict[str, int]) -> None:
    """Check that each set has tokens enough to measure anything.

    Raises:
        UserError: one has less than ``similarity.min_share`` of those asked for.
    """
    settings = context.run.similarity
    for name, found in tokens.items():
        if found < max(2, settings.min_share * settings.tokens):
            raise UserError(
                f"similarity: {name} has only {found:,} of {settings.tokens:,} tokens, less than "
                f"similarity.min_share={settings.min_share:g} of them; give the set more text, or lower "
                "similarity.tokens or similarity.min_share"
            )


def _few_tokens(context: RunContext, found: Similarity) -> list[str]:
    """Lines on languages that had fewer tokens than asked for."""
    languages = [entry.language for entry in (*context.run.data.old.values(), *context.run.data.new.values())]
    wanted = {name: context.run.similarity.tokens * languages.count(name) for name in languages}
    return [
        f"similarity of {name} is measured on {found.tokens[name]:,} of {wanted[name]:,} tokens: it has no more text"
        for name in wanted
        if found.tokens[name] < wanted[name]
    ]


def _languages(sets: dict[str, SetConfig]) -> dict[str, str]:
    return {name: entry.language for name, entry in sets.items()}


def similarity_is_there(context: RunContext) -> bool:
    """Whether the run's folder still holds what was measured, rather than what ``experts.similarity`` named since."""
    path = context.folder / SIMILARITY_FILE
    return path.is_file() and sha256_file(path)[:16] == context.folder.manifest("similarity").outputs["similarity"]


def is_measured(run: RunConfig) -> bool:
    """Whether a run measures similarities: it has experts and old sets to compare with, and names no file of them."""
    return not why_not_measured(run)


def why_not_measured(run: RunConfig) -> str:
    """Why a run measures no similarities; empty if it does."""
    if run.method.is_dense:
        return f"method {run.method.name} has no experts"
    if run.experts.allocation == "keep":
        return "experts.allocation keep adds no experts"
    if not run.data.old or run.experts.similarity is not None:
        return "no old set to compare with, or experts.similarity is given"
    return ""


def allocate_inputs(context: RunContext) -> Inputs:
    """The model, the similarities, measured or given, and the budget."""
    return {
        "model": context.start,
        "similarity": _similarity_hash(context),
        "experts": _allocation_settings(context.run.experts),
        "not_positive": context.run.similarity.not_positive,
    }


def _allocation_settings(experts: ExpertsConfig) -> Inputs:
    """What of the experts section a plan depends on; without options at their defaults that runs of before lacked."""
    others = {"init", "drop_ratio", "noise", "write_copies", "router", "similarity"}
    added_later = {"copy_of": "mlp", "classifier": "token"}
    as_before = {name for name, default in added_later.items() if getattr(experts, name) == default}
    return experts.model_dump(mode="json", exclude=others | as_before)


def _similarity_hash(context: RunContext) -> str | None:
    if context.run.experts.similarity is not None:
        from pipeline.method.given_similarity import hash_of_given

        return hash_of_given(context.run.experts.similarity)
    return context.folder.manifest("similarity").outputs["similarity"] if is_measured(context.run) else None


def allocate_experts(context: RunContext, _ranks: object) -> Result:
    """Similarities and budget to expert_plan.json; similarities that are given become the run's similarity.json."""
    from pipeline.model.model_folder import model_config

    run = context.run
    num_layers = model_config(context.dense).get_text_config().num_hidden_layers
    found = known_similarity(context, num_layers)
    if found is not None and not is_measured(run):
        print(f"allocate: similarities of {run.experts.similarity}, not measured", flush=True)
        found.save(context.folder / SIMILARITY_FILE)
    plan, note = plan_experts(run, num_layers, found)
    plan.save(context.folder / PLAN_FILE)
    print(f"allocate: {note}; experts by layer: {' '.join(map(str, plan.counts))}", flush=True)
    return Result({"plan": plan.key}, {"note": note})


def known_similarity(context: RunContext, num_layers: int) -> Similarity | None:
    """The similarities that a run's file names, or those that it has measured; None where there are none.

    Raises:
        UserError: the file is not there, or of another number of layers.
    """
    if context.run.experts.similarity is not None:
        from pipeline.method.given_similarity import given_similarity

        return given_similarity(context.run.experts.similarity, num_layers)
    return Similarity.load_if_there(context.folder / SIMILARITY_FILE) if is_measured(context.run) else None


def plan_experts(run: RunConfig, num_layers: int, found: Similarity | None) -> tuple[ExpertPlan, str]:
    """The plan that the run's budget and similarities give, and a line that says how the budget was met.

    Args:
        run: its settings.
        num_layers: of the model.
        found: the similarities; None where there are none.

    Raises:
        UserError: the budget can't be met, or a similarity is not positive.
    """
    measured = similarity = found.by_layer if found is not None else None
    if measured is not None and run.similarity.not_positive == "clamp":
        similarity, changed = clamp_similarity(measured)
        if changed:
            print(f"allocate: warning: similarity of layers {changed} raised to a small positive value", flush=True)
    allocation = allocate(run.experts, num_layers, similarity, ep_size_to_share(run))
    return expert_plan(run, allocation.counts, measured), allocation.note
