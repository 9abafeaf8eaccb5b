"""The expert plan that an estimate is of, which similarities may still have to be measured for."""

from common.errors import UserError
from pipeline.config.run import RunConfig
from pipeline.method.allocation import allocate, clamp_similarity, dense_plan, ep_size_to_share, expert_plan
from pipeline.method.given_similarity import given_similarity
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.run_folder import PLAN_FILE, RunFolder


def find_plan(run: RunConfig, num_layers: int, num_new: int | None = None) -> tuple[ExpertPlan, str]:
    """The run's plan and where it is from; before similarities are measured, as many experts spread evenly.

    Args:
        run: the run's settings.
        num_layers: of the model.
        num_new: new experts of the whole model, where the run leaves their number to similarities not yet measured.

    Raises:
        UserError: the number of experts itself depends on similarities.
    """
    if run.method.is_dense:
        return dense_plan(run, num_layers), "no experts"
    path = RunFolder(run.folder) / PLAN_FILE
    if path.is_file():
        plan = ExpertPlan.load(path)
        if plan.num_layers == num_layers:
            return plan, "the run's plan"
    experts, note, similarity = run.experts, "as the run lists them", None
    if experts.allocation == "layerwise" and experts.similarity is not None:
        similarity, note = given_similarity(experts.similarity, num_layers).by_layer, "by experts.similarity"
        if run.similarity.not_positive == "clamp":
            similarity, _ = clamp_similarity(similarity)
    elif experts.allocation == "layerwise":
        if experts.num_new is None and num_new is None:
            raise UserError(
                "experts.delta: how many experts it gives depends on the similarities; add --num-new N for so many, "
                "spread evenly, or python -m pipeline run RUN.yaml --until allocate first"
            )
        spread = {"num_new": experts.num_new or num_new, "delta": None, "rounding": "largest_remainder"}
        experts = experts.model_copy(update={"allocation": "uniform", **spread})
        note = "spread evenly, as similarities are not measured yet"
    elif experts.allocation == "keep":
        note = "the base's plan"
    counts = allocate(experts, num_layers, similarity, ep_size_to_share(run)).counts
    layers = experts.classifier_layers
    if similarity is None and isinstance(layers, int):  # which they are takes similarities; for sizes, any will do
        layers = [layer for layer, count in enumerate(counts) if count > 1][:layers]
    chosen = run.model_copy(update={"experts": experts.model_copy(update={"classifier_layers": layers})})
    return expert_plan(chosen, counts, similarity), note
