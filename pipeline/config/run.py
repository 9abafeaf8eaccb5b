"""RunConfig: every key of a run's YAML, checked once, when it is read."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.errors import UserError
from common.section import Fraction, Positive, Section
from data_prep.config import DataConfig, PreparationConfig, Stage1Tokens, check_one_tokenizer
from data_prep.config import ModelConfig as ModelConfig  # others import it from here
from pipeline.config.cluster import ClusterConfig
from pipeline.config.experts import BaseConfig, ExpertsConfig, SimilarityConfig, model_of_base
from pipeline.config.method import MethodConfig

NO_EXPERTS = ExpertsConfig(allocation="none")
PROGRAM = Path(__file__).resolve().parents[2]


class StageConfig(Section):
    """What both stages share: ``tokens`` to train on, in batches of ``global_batch_size`` x ``sequence_length``.

    The LPR loss is the paper's or the reference implementation's (``lpr``). In a further expansion it protects the
    languages of all earlier ones (``lpr_groups: all``), or the dense model's alone, as LayerMoE's reference
    implementation does (``base``).

    With ``z_loss_weight`` the router z-loss is added, which keeps the routers' logits small (ST-MoE, arXiv 2202.08906,
    eq. 5; there 0.001).
    """

    tokens: Positive
    sequence_length: Positive = 1024
    global_batch_size: Positive = 512
    lr: float = Field(default=5e-5, gt=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clipping: float = Field(default=1.0, ge=0)
    z_loss_weight: float = Field(default=0.0, ge=0)
    activation_checkpointing: bool = False
    lpr: Literal["paper", "reference"] = "paper"
    lpr_groups: Literal["all", "base"] = "all"

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        batch = self.global_batch_size * self.sequence_length
        if self.tokens < batch:
            raise ValueError(
                f"tokens: {self.tokens} is less than one batch of {self.global_batch_size} x {self.sequence_length} "
                f"= {batch}; give more tokens or a smaller global_batch_size"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps: whole batches only."""
        return self.tokens // (self.global_batch_size * self.sequence_length)


class Stage1Config(StageConfig):
    """Stage 1: new experts and routers train on the new languages (MoE-LPR section 3.2).

    With ``old_share`` that part of the samples is of old languages, as ``data.replay`` has chosen them, and with
    ``lpr_weight`` they have the LPR loss: with no stage 2, that is MoE-LPR's ablation of one stage.

    ``balance`` is how experts get equal loads: by MoE-LPR's ``loss``, to which the other ``balance_`` keys belong, or
    without it by a ``bias`` of each expert that is added to its score only to choose the top K, and after each step
    grows by ``bias_update_rate`` if the expert had less than the mean load of the global batch, or shrinks if it had
    more (Loss-Free Balancing, arXiv 2408.15664). The bias stays as it is in stage 2 and in evaluation.
    """

    old_share: float = Field(default=0.0, ge=0, lt=1)
    lpr_weight: float = Field(default=0.0, ge=0)

    balance: Literal["loss", "bias"] = "loss"
    bias_update_rate: float = Field(default=1e-3, gt=0)
    balance_weight: float = Field(default=0.01, ge=0)
    balance_scale: Literal["paper", "reference"] = "paper"
    balance_statistics: Literal["global", "local"] = "global"


class Stage2Config(StageConfig):
    """Stage 2: routers and classifiers train on a replay of all languages (MoE-LPR section 3.3).

    ``router_kl_weight`` is ours: nothing in the papers (arXiv 2408.11396, 2505.22582) keeps the routing of new
    languages as stage 1 left it. It weights the mean over new tokens and layers of KL(G_stage1 || G_now), both of the
    same input.
    """

    old_share: Fraction = 0.5
    lpr_weight: float = Field(default=0.1, ge=0)
    classifier_weight: float = Field(default=0.1, ge=0)
    router_kl_weight: float = Field(default=0.0, ge=0)


class ValidateConfig(Section):
    """During training, every ``every_tokens``: bits per character on the head of each held-out set.

    A set of an old language that has become worse than the base model, beyond its interval, is named; where that is
    by more than ``stop_if_forgetting`` percent, training saves and stops.
    """

    every_tokens: Positive | None = None
    max_tokens_per_set: Positive = 4096
    stop_if_forgetting: float | None = Field(default=None, ge=0)


class EvaluateConfig(Section):
    """At the end: whole held-out documents, in windows of ``window`` tokens; a document's last one is full too.

    The base model and the last stage go on from ``prompts``, by name, with the likeliest ``new_tokens`` tokens.
    """

    window: Positive = 1024
    prompts: dict[str, Annotated[str, Field(min_length=1)]] = {}
    new_tokens: Positive = 32


class CheckpointConfig(Section):
    """When checkpoints are saved, besides the end of a stage, and how many are kept, besides the best.

    ``if_full`` says what happens if a checkpoint can't be written, as on a full disk: ``stop`` the training, or
    ``continue`` until the next one is due. The last one of a stage must be written.
    """

    every_steps: Positive | None = None
    every_minutes: float | None = Field(default=30.0, gt=0)
    keep: Positive = 2
    resume: Literal["auto", "never"] = "auto"
    if_full: Literal["stop", "continue"] = "stop"


class BadStepsConfig(Section):
    """Which optimizer steps are skipped: a loss or gradient is not finite, or the gradient norm is far too large.

    A step is skipped, on all ranks, if its gradient norm exceeds ``norm_factor`` times the median norm of the last
    ``window`` steps. There is no limit if ``norm_factor`` is null, and none in the first ``window`` / 4 steps. After
    ``stop_after`` skipped steps in a row the run saves a checkpoint and stops.
    """

    norm_factor: float | None = Field(default=20.0, gt=1)
    window: Positive = 100
    stop_after: Positive = 10


class ParallelConfig(Section):
    """How the run is spread over ranks: ``ranks`` to start if no launcher has; new experts lie on ``ep_size`` of them.

    ``auto`` takes the smallest ``ep_size`` with which the run fits its devices. A layer whose busiest rank would
    compute more than ``max_imbalance`` times the mean rank's rows is spread over fewer ranks, and its experts are
    replicated; a larger value saves memory and costs time.

    A rank that makes no progress for ``timeout_minutes`` ends, and prints where it was.

    ``deterministic`` makes GPUs repeat a result bit by bit, as CPUs do: torch then takes kernels that add in a fixed
    order, attention's backward above all, which are slower.
    """

    ranks: Positive = 1
    ep_size: Positive | Literal["auto"] = "auto"
    max_imbalance: float = Field(default=1.3, ge=1)
    micro_batch_size: Positive | Literal["auto"] = "auto"
    timeout_minutes: float = Field(default=30.0, gt=0)
    deterministic: bool = False


class LogConfig(Section):
    """Which of DeepSpeed's monitors are on. ``ranks`` records where each rank ran and what it computed.

    ``profile_steps`` ([20, 23]) writes a trace and a table of where rank 0's time goes in these steps of a stage.
    ``peak_tflops`` is what one device can do, in 10^12 operations per second, for model FLOPs utilization; without it
    a known GPU's in bf16.
    """

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "moe-lpr"
    ranks: bool = False
    profile_steps: tuple[Positive, Positive] | None = None
    peak_tflops: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_profile_steps(self) -> "LogConfig":
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError("profile_steps: the first step comes after the last; give [first, last]")
        return self


class RunConfig(Section):
    """A whole run.

    Paths are relative to the working directory. Only ``deepspeed``, where there is no such file, names one of those
    that come with this program, such as ``ds_configs/bf16_zero1.json``.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output_dir: Path = Path("runs")
    cache_dir: Path = Path("cache")
    seed: int = Field(default=17, ge=0)
    base: BaseConfig | None = None
    model: ModelConfig
    method: MethodConfig = MethodConfig()
    data: DataConfig
    similarity: SimilarityConfig = SimilarityConfig()
    experts: ExpertsConfig = NO_EXPERTS
    stage1: Stage1Config | None = None
    stage2: Stage2Config | None = None
    validate_: ValidateConfig = Field(default=ValidateConfig(), alias="validate")
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    bad_steps: BadStepsConfig = BadStepsConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: Path = Path("ds_configs/bf16_zero1.json")
    log: LogConfig = LogConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _starts_from_a_run(cls, tree: Any) -> Any:
        """``base: FOLDER`` is short for ``base: {run: FOLDER}``; the model is the base run's unless it is given."""
        if not isinstance(tree, dict) or not tree.get("base"):
            return tree
        base = tree["base"] if isinstance(tree["base"], dict) else {"run": tree["base"]}
        return {"model": model_of_base(Path(str(base.get("run")))), **tree, "base": base}

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        check_one_tokenizer(self.model, self.data)
        self._check_method()
        self._check_stages()
        if self.base is not None and self.experts.init != "copy":
            raise ValueError("experts.init: a further expansion copies experts; leave it out")
        if self.base is not None and self.experts.noise:
            raise ValueError("experts.noise: a further expansion copies experts exactly; leave it out")
        if self.base is None and self.experts.copy_of != "mlp":
            raise ValueError("experts.copy_of: a dense model has no other expert; leave it out, or name a base run")
        if self.experts.rounding == "expert_parallel" and self.parallel.ep_size == "auto":
            raise ValueError("experts.rounding: expert_parallel needs a number for parallel.ep_size; give one")
        reasons = {
            "stage2 replays": 2 in self.stage_numbers,
            "stage1.old_share reads": self.stage1 is not None and self.stage1.old_share > 0,
            "allocation: layerwise compares with": self.experts.allocation == "layerwise"
            and self.experts.similarity is None
            and not self.method.is_dense,
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if not self.data.old and reason:
            raise ValueError(
                f"data.old: no set, but {reason} old languages; add one, as old: {{en: {{path: en.jsonl}}}}"
            )
        return self

    def _check_method(self) -> None:
        method = self.method
        if not method.is_dense:
            if "experts" not in self.model_fields_set:
                raise ValueError("experts: missing; add it, as experts: {num_new: 60}")
            if self.experts.allocation == "none":
                raise ValueError("experts.allocation: none, but method moe has experts; use layerwise or uniform")
            return
        if self.base is not None:
            raise ValueError(f"method: {method.name} trains a dense model, but base is an expanded one; give model:")
        if self.model.tokenizer is not None:
            raise ValueError(
                f"model.tokenizer: given, but method {method.name} trains the dense model by its own tokenizer; "
                "leave it out, or set it to null"
            )
        if self.parallel.ep_size not in (1, "auto"):
            raise ValueError(
                f"parallel.ep_size: {self.parallel.ep_size}, but method {method.name} has no experts to spread over "
                "ranks; set it to 1"
            )

    def _check_stages(self) -> None:
        if self.experts.allocation != "keep":
            if self.stage1 is None:
                raise ValueError("stage1: missing; add it, as stage1: {tokens: 100_000_000}")
            return
        if self.base is None:
            raise ValueError("experts.allocation: keep reviews a base's experts, but the run has no base; name it")
        if self.stage1 is not None:
            raise ValueError("stage1: given, but experts.allocation keep adds no experts to train; leave it out")
        if self.stage2 is None:
            raise ValueError("stage2: missing, and with experts.allocation keep it is the only stage; add it")
        if self.data.replay is not None and self.data.replay.share is not None:
            raise ValueError(
                "data.replay.share: a share of stage 1's tokens, but the run has no stage 1; give data.replay as "
                "{tokens: 50_000_000}, or null for all"
            )

    def stage(self, number: int) -> Stage1Config | Stage2Config:
        """A stage's settings.

        Raises:
            UserError: the run has no such stage.
        """
        if number not in self.stage_numbers and self.method.is_dense:
            raise UserError(f"stage{number}: method {self.method.name} has stage 1 alone; train --stage 1")
        settings = {1: self.stage1, 2: self.stage2}[number]
        if settings is None:
            others = " or ".join(f"train --stage {one}" for one in self.stage_numbers)
            raise UserError(f"stage{number}: the run has no such section; add it, or {others}")
        return settings

    @property
    def stage_numbers(self) -> list[int]:
        """The stages that the run has, in order."""
        if self.stage1 is None:
            return [2]
        return [1, 2] if self.stage2 is not None and not self.method.is_dense else [1]

    @property
    def preparation(self) -> PreparationConfig:
        """What preparing its text depends on."""
        return PreparationConfig(
            model=self.model,
            data=self.data,
            seed=self.seed,
            cache_dir=self.cache_dir,
            stage1=Stage1Tokens(tokens=self.stage1.tokens) if self.stage1 is not None else None,
        )

    @property
    def ds_config_file(self) -> Path:
        """The DeepSpeed config: the path ``deepspeed``, or where there is none, this program's own of that name."""
        own = PROGRAM / self.deepspeed
        return own if own.is_file() and not self.deepspeed.is_file() else self.deepspeed

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every rank: the cluster section's, and what ``deterministic`` needs of cuBLAS."""
        cublas = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if self.parallel.deterministic else {}
        return cublas | self.cluster.environment

    @property
    def folder(self) -> Path:
        """Where this run's results go."""
        return self.output_dir / self.name
