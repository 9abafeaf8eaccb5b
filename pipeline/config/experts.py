"""The sections of a run that say what is expanded: the base run, similarity and experts."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from common.section import Positive, Section
from common.yaml_reader import parse_yaml


class BaseConfig(Section):
    """The run whose expanded model this one expands further (LayerMoE, arXiv 2505.22582, section 4): its folder.

    It may also be a folder that ``python -m pipeline import`` made; that has one checkpoint alone.

    ``checkpoint`` is its last stage's, or STAGE, STAGE/best or STAGE/stepNNNNNN. Its experts freeze, its languages are
    old ones now, and each keeps the experts of its time; ``data.old`` names text of them for similarity and replay.
    """

    run: Path
    checkpoint: str = ""


class SimilarityConfig(Section):
    """How many ``tokens`` of each set are read (paper: 100,000), drawn over the whole of its text, whatever its caps.

    With ``windows: packed`` they are read in samples of ``sequence_length`` tokens of consecutive documents; with
    ``documents`` each document is read alone, with that much context at most (the reference: 10,000). A set with less
    than ``min_share`` of the tokens is an error. ``not_positive`` says what happens to a similarity that is not
    positive, which can't be divided by: an error, or it is raised to a small positive value.
    """

    tokens: Positive = 100_000
    windows: Literal["packed", "documents"] = "packed"
    sequence_length: Positive = 512
    min_share: float = Field(default=0.1, ge=0, le=1)
    not_positive: Literal["error", "clamp"] = "error"


class ExpertsConfig(Section):
    """How many experts each layer gets, and how many of them a token uses (``top_k``).

    ``num_new`` is the budget of new experts over all layers. ``delta`` is LayerMoE's own parameter instead.
    ``counts``, with ``allocation: explicit``, lists the experts of each layer, the original included. ``mola`` gives
    the four quarters of the layers 2, 4, 6 and 8 (arXiv 2402.08562). ``none`` is for a baseline, see ``method``.

    New experts are copies of the original MLP; with ``noise`` Gaussian noise is added, of so many times each matrix's
    standard deviation (ours; the baseline in Drop-Upcycling's code adds 0.02 to half of the dimensions). With ``init:
    drop`` they are copies of which the share ``drop_ratio`` of the intermediate dimensions is drawn anew, others for
    each expert (Drop-Upcycling, arXiv 2502.19261, section 3; there 0.5). ``init: random`` is an ablation of MoE-LPR's.
    With ``write_copies`` the upcycled checkpoint has a file for each new expert even if it is an exact copy, so that
    DeepSpeed itself can load it.

    ``classifier_layers`` is a number, of the most similar layers, or a list of layers; 0 is none. ``classifier:
    sequence`` classifies whole sequences as LayerMoE's reference implementation does, for comparison: see
    :class:`pipeline.model.moe.router.Router` for what it can't do.

    ``keep`` adds no experts to the base's: the run has no stage 1, and its stage 2 reviews the base's model once more,
    with the experts, routers and classifiers that it has.

    In a further expansion (``base``) an allocation adds to each layer one expert less than it gives. ``router: keep``
    keeps the routers' trained rows, ``reset`` draws all anew, as LayerMoE's reference implementation does. New experts
    are copies of the original MLP, or with ``copy_of: most_used`` of the expert of their layer that the new languages'
    tokens choose most often (ours).

    ``rounding`` of a budget: ``ceil`` is the paper's; ``largest_remainder`` meets it exactly; ``expert_parallel``
    moves the paper's counts to the nearest ones whose new experts ``parallel.ep_size`` ranks share evenly (ours).

    ``similarity`` is a file to take similarities from instead of measuring them: another run's similarity.json, or a
    published one, of a model with as many layers.
    """

    allocation: Literal["layerwise", "uniform", "mola", "explicit", "keep", "none"] = "layerwise"
    num_new: int | None = None
    delta: float | None = None
    counts: list[int] | None = None
    rounding: Literal["ceil", "largest_remainder", "expert_parallel"] = "ceil"
    top_k: Positive = 2
    init: Literal["copy", "random", "drop"] = "copy"
    drop_ratio: float = Field(default=0.5, gt=0, le=1)
    noise: float = Field(default=0.0, ge=0)
    router: Literal["keep", "reset"] = "keep"
    copy_of: Literal["mlp", "most_used"] = "mlp"
    write_copies: bool = False
    classifier_layers: int | list[int] = 0
    classifier: Literal["token", "sequence"] = "token"
    similarity: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> "ExpertsConfig":
        defaults = {name: field.default for name, field in type(self).model_fields.items() if name != "allocation"}
        others = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.allocation == "keep" and others:
            raise ValueError(f"allocation: keep takes the base's experts as they are; leave {others[0]} out")
        given = [key for key in ("num_new", "delta", "counts") if getattr(self, key) is not None]
        budgets = {"layerwise": ("num_new", "delta"), "uniform": ("num_new",), "explicit": ("counts",)}
        allowed = budgets.get(self.allocation, ())
        if given and not allowed:
            raise ValueError(f"allocation: {self.allocation} takes no {given[0]}; leave it out")
        if allowed and (len(given) != 1 or given[0] not in allowed):
            raise ValueError(
                f"allocation: {self.allocation} takes exactly one of {' or '.join(allowed)}, got {given or 'none'}"
            )
        if self.num_new is not None and self.num_new < 1:
            raise ValueError(f"num_new: {self.num_new} is below one expert; give at least 1")
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta: {self.delta} is not positive; give about 70, as the paper does for Llama-3.2-3B")
        if self.delta is not None and self.rounding != "ceil":
            raise ValueError("delta: works only with rounding: ceil; set that, or give num_new instead")
        if self.noise and self.init != "copy":
            raise ValueError(f"noise: {self.noise} is for copies, but init is {self.init}; leave one of them out")
        for layer, count in enumerate(self.counts or []):
            if count < 1:
                raise ValueError(f"counts[{layer}]: {count} is below 1; give at least 1, the original MLP")
        return self


def model_of_base(folder: Path) -> dict[str, Any]:
    """The section ``model`` of a run that starts from a run's folder, or from an imported one.

    Raises:
        ValueError: it is neither.
    """
    if (folder / "run.yaml").is_file():
        path = folder / "run.yaml"
        return dict(parse_yaml(path.read_text(encoding="utf-8"), str(path))["model"])
    if (folder / "imported.json").is_file():
        extends = json.loads((folder / "imported.json").read_text(encoding="utf-8"))["extends_tokenizer"]
        return {"path": str(folder / "model"), "tokenizer": str(folder / "upcycled" / "hf") if extends else None}
    if (folder / "expansion.json").is_file():
        raise ValueError(f"base.run: {folder} was exported; first: python -m pipeline import {folder}")
    raise ValueError(f"base.run: {folder} holds no run.yaml; name the folder of a run that was trained")
