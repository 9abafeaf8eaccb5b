"""The run's ``method``: what trains."""

from typing import Any, Literal

from pydantic import Field, model_validator

from common.section import Positive, Section

_DEFAULTS: dict[str, dict[str, Any]] = {
    "moe": {},
    "full": {},
    "lora": {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": "all"},
    "llama_pro": {"blocks": 8},
}


class MethodConfig(Section):
    """What trains: ``method: full``, or with options ``method: {name: lora, rank: 8}``.

    ``moe`` is the mixture of experts. The others are baselines: the dense model itself trains in stage 1, with the
    next token's loss alone, on the same samples. ``full`` trains all weights. ``lora`` trains adapters of a ``rank``,
    scaled by ``alpha`` / ``rank``, with ``dropout`` of their input, on linear maps of every layer: those of the
    ``attention``, of the ``mlp``, or ``all`` (arXiv 2106.09685). ``llama_pro`` puts so many new ``blocks`` between the
    layers, which alone train (arXiv 2401.02415, which has 8 for 32 layers).

    What a run says of experts, routers and stage 2 does nothing with a baseline, so that it differs from the run that
    it is compared with by this one key.
    """

    name: Literal["moe", "full", "lora", "llama_pro"] = "moe"
    rank: Positive | None = None
    alpha: Positive | None = None
    dropout: float | None = Field(default=None, ge=0, lt=1)
    targets: Literal["all", "attention", "mlp"] | None = None
    blocks: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, value: Any) -> Any:
        """A name alone is a section of that name; options that are left out get the method's own values."""
        tree = {"name": value} if isinstance(value, str) else value
        if not isinstance(tree, dict):
            return tree
        given = {key: option for key, option in tree.items() if option is not None}
        return {**_DEFAULTS.get(str(tree.get("name")), {}), **given}

    @model_validator(mode="after")
    def _check(self) -> "MethodConfig":
        for option in self.options:
            if option not in _DEFAULTS[self.name]:
                owner = next(name for name, options in _DEFAULTS.items() if option in options)
                raise ValueError(f"{option}: is an option of method {owner}, but the method is {self.name}; remove it")
        return self

    @property
    def is_dense(self) -> bool:
        """Whether a dense model trains: there are no experts, and no stage 2."""
        return self.name != "moe"

    @property
    def options(self) -> dict[str, Any]:
        """All that it has besides its name."""
        return self.model_dump(mode="json", exclude={"name"}, exclude_none=True)
