"""A stage on one rank: its engine, its samples, one step, one validation, one checkpoint."""

import hashlib
import io
import math
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.optim.lr_scheduler import LambdaLR

from common.errors import AgreedError
from data_prep.store import TokenStore
from pipeline import checkpoint
from pipeline.config.run import RunConfig, Stage1Config, Stage2Config, StageConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks, peak_memory_bytes
from pipeline.evaluation.scoring import score_set
from pipeline.method.losses import classifier_loss, load_balancing_loss, lpr_loss, next_token_loss
from pipeline.method.upcycle import load_upcycled
from pipeline.model.backbone import Stage, moe_layers, parameter_groups, train_only
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import collect_routings
from pipeline.training.ds_config import batch_shape, fill_ds_config, read_ds_config, training_dtype
from pipeline.training.metrics import StepSums
from pipeline.training.rank_log import RankLog
from pipeline.training.sample_order import Batch, SampleOrder, stage_order
from pipeline.training.skipped_steps import StepGuard


@dataclass(frozen=True)
class StageInputs:
    """What a stage starts from.

    Attributes:
        identity: what its checkpoints are of: model, plan, tokenizer; and for stage 2 the checkpoint of stage 1.
        stage1_tag: for stage 2, the folder of the stage-1 checkpoint that holds the experts.
    """

    run: RunConfig
    number: Stage
    plan: ExpertPlan
    store: TokenStore
    upcycled: Path
    folder: Path
    identity: dict[str, Any]
    stage1_tag: Path | None = None

    @property
    def stage(self) -> Stage1Config | Stage2Config:
        """The stage's settings."""
        return self.run.stage(self.number)


def learning_rate_factor(step: int, stage: StageConfig) -> float:
    """Linear warm-up to 1 over ``warmup_ratio`` of the steps, then a cosine down to ``min_lr_ratio``.

    Args:
        step: optimizer steps taken before.
    """
    warmup = math.ceil(stage.warmup_ratio * stage.num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress_made = (step - warmup) / max(1, stage.num_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress_made)))
    return stage.min_lr_ratio + (1 - stage.min_lr_ratio) * cosine


class Trainer:
    """A stage's engine, its samples, and where it is."""

    def __init__(self, inputs: StageInputs, ranks: Ranks) -> None:
        self.inputs, self.ranks, self.stage = inputs, ranks, inputs.stage
        self.order: SampleOrder = stage_order(inputs.store, inputs.run.data, self.stage, inputs.run.seed)
        self.set_names = [source.name for source in self.order.sources]
        self.shape = batch_shape(inputs.run, self.stage, ranks.world_size, ranks.device.type)
        self.dims = ParallelDims(ranks.world_size, inputs.run.parallel.ep_size, ranks.rank)
        self._check_weights()
        self.engine = self._build_engine()
        self.guard = StepGuard(inputs.run.bad_steps)
        self.guard.watch(self.engine)
        self.layers = moe_layers(self.engine.module)
        self.batch_tokens = self.stage.global_batch_size * self.stage.sequence_length
        self.step = 0
        self.best_value, self.best_tag = math.inf, ""
        self.saved_tag = ""  # the newest checkpoint that this course of training has read or written
        inputs.folder.mkdir(parents=True, exist_ok=True)
        variables = list(inputs.run.cluster.environment)
        self.rank_log = RankLog(inputs.folder, ranks.rank, variables, writes=inputs.run.log.ranks)

    def _check_weights(self) -> None:
        """Verify what the stage starts from."""
        inputs = self.inputs
        checkpoint.check_sound(inputs.upcycled, self.ranks, "upcycle again with --force")
        if inputs.stage1_tag is not None:
            weights = checkpoint.weight_files(inputs.stage1_tag)
            checkpoint.check_sound(inputs.stage1_tag, self.ranks, "train stage 1 again with --force", weights)

    def _build_engine(self) -> Any:
        inputs, stage = self.inputs, self.stage
        ds_config = read_ds_config(inputs.run.deepspeed)
        model = load_upcycled(
            inputs.upcycled,
            inputs.plan,
            training_dtype(ds_config),
            self.dims,
            classifiers=inputs.number == 2,
        )
        if inputs.stage1_tag is not None:
            checkpoint.read_weights(model, inputs.stage1_tag)
        train_only(model, inputs.number)
        model.train()
        if stage.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with redirect_stdout(io.StringIO()):  # it prints memory figures, not through its logger
            engine = self._initialize(model, ds_config)
        # DeepSpeed writes this list into checkpoints; to it an expert is one that has a file, which expert 0 has not.
        engine.num_experts = [layer.num_experts - 1 for layer in moe_layers(engine.module)]
        engine.checkpoint_engine = checkpoint.AtomicCheckpointEngine(engine._config, engine.module, self.dims)
        return engine

    def _initialize(self, model: Any, ds_config: dict[str, Any]) -> Any:
        inputs, stage = self.inputs, self.stage
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model),
            lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: learning_rate_factor(step, stage)),
            config=fill_ds_config(
                ds_config,
                inputs.run,
                stage,
                stage_number=inputs.number,
                world_size=self.ranks.world_size,
                shape=self.shape,
            ),
            dist_init_required=False,
        )
        return engine

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over one global batch; returns its row of metrics."""
        started = time.monotonic()
        self._seed()
        sums = StepSums(len(self.set_names), [layer.num_experts for layer in self.layers], self.ranks.device)
        for micro_step in range(self.shape.accumulation):
            self._micro_step(micro_step, sums)
            if micro_step < self.shape.accumulation - 1:
                self.engine.step()  # counts the micro-step; only the last one updates the weights
        figures = sums.read(self.ranks.sum(sums.pack()), self.set_names)
        learning_rate = self.engine.get_lr()[0]
        grad_norm, skipped = self._optimizer_step(sum(figures["loss"].values()))
        self.step += 1
        seconds = time.monotonic() - started
        return {
            "step": self.step,
            "samples": self.step * self.stage.global_batch_size,
            "tokens": self.step * self.batch_tokens,
            **figures,
            "lr": learning_rate,
            "grad_norm": grad_norm,
            "skipped": skipped,
            "tokens_per_second": self.batch_tokens / seconds,
            "memory_gb": peak_memory_bytes(self.ranks.device) / 1e9,
            "seconds": seconds,
        }

    def _seed(self) -> None:
        """Random numbers of a step are a function of run, step and rank: a resumed run draws the same."""
        name = f"{self.inputs.run.seed}/{self.inputs.number}/{self.step}/{self.ranks.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "little"))

    def _optimizer_step(self, loss: float) -> tuple[float, str | None]:
        """Update the weights, unless the guard objects; returns the gradient norm and why it was skipped."""
        norm = self._gradient_norm()
        self.guard.expect(loss, norm)
        self.engine.step()
        if norm is None:
            norm = float(self.engine.get_global_grad_norm())
        if getattr(self.engine.optimizer, "overflow", False):
            # DeepSpeed has left this step out and held the schedule back; the schedule follows the step's number.
            with warnings.catch_warnings(action="ignore"):  # torch's, where the first step of all was left out
                self.engine.lr_scheduler.step()
        return norm, self.guard.record(norm)

    def _micro_step(self, micro_step: int, sums: StepSums) -> None:
        """Forward and backward of one micro-batch; DeepSpeed's boundary is the last of the step.

        Samples beyond the global batch, where ranks do not divide it, repeat earlier ones and count for nothing.
        """
        size, device = self.shape.micro_batch, self.ranks.device
        end = (self.step + 1) * self.stage.global_batch_size
        wanted = self.step * self.stage.global_batch_size
        wanted += (micro_step * self.ranks.world_size + self.ranks.rank) * size
        self.rank_log.samples(self.step + 1, wanted, max(0, min(size, end - wanted)))
        first = min(wanted, end - size)
        batch = self.order.batch(first, size)
        counts_T = (torch.arange(first, end)[:size] >= wanted).to(device).repeat_interleave(self.stage.sequence_length)
        with collect_routings(self.engine.module) as routings:
            logits_BLV = self.engine(**batch.model_inputs(device), use_cache=False).logits
        losses = self._losses(logits_BLV, batch, counts_T, routings, micro_step)
        sums.add_losses(**{name: loss for name, (loss, _) in losses.items()})
        sources_T = torch.from_numpy(batch.sources).to(device).repeat_interleave(self.stage.sequence_length)
        sums.add_routing(routings, torch.where(counts_T, sources_T, -1))
        total = sum(weight * loss for loss, weight in losses.values())
        # The engine averages over ranks and divides by the accumulation steps; our sums are divided already.
        self.engine.backward(total * self.ranks.world_size * self.shape.accumulation)

    def _losses(
        self, logits_BLV: torch.Tensor, batch: Batch, counts_T: torch.Tensor, routings: list[Any], micro_step: int
    ) -> dict[str, tuple[torch.Tensor, float]]:
        """Each loss of this micro-batch, as its part of the global batch's mean, and its weight."""
        stage, device = self.stage, logits_BLV.device
        tokens = stage.global_batch_size * stage.sequence_length
        labels_BL = torch.from_numpy(batch.labels).to(device)
        losses = {"next_token": (next_token_loss(logits_BLV, labels_BL, counts_T.view_as(labels_BL)) / tokens, 1.0)}
        if isinstance(stage, Stage1Config):
            balance = load_balancing_loss(
                routings, mask_T=counts_T, scale=stage.balance_scale, statistics=stage.balance_statistics
            )  # a mean already: over this rank's tokens
            share = self._balance_share(micro_step, counts_T)
            losses["balance"] = (balance * share / self.ranks.world_size, stage.balance_weight)
        if isinstance(stage, Stage2Config):
            old_T = torch.from_numpy(batch.is_old).flatten().to(device)
            old_tokens = self.order.old_tokens(self.step * stage.global_batch_size, stage.global_batch_size)
            lpr = lpr_loss(routings, old_T & counts_T, stage.lpr) / max(1, old_tokens)
            losses["lpr"] = (lpr, stage.lpr_weight)
            losses["classifier"] = (classifier_loss(routings, old_T, counts_T) / tokens, stage.classifier_weight)
        return losses

    def _balance_share(self, micro_step: int, counts_T: torch.Tensor) -> float:
        """What part of the global batch a micro-step's balance loss stands for: its samples on all ranks."""
        batch, at_once = self.stage.global_batch_size, self.ranks.world_size * self.shape.micro_batch
        if isinstance(self.stage, Stage1Config) and self.stage.balance_statistics == "local":
            return float(counts_T.sum()) / self.stage.sequence_length * self.ranks.world_size / batch
        return min(at_once, batch - micro_step * at_once) / batch

    def _gradient_norm(self) -> float | None:
        """Stage 2's norm before clipping; in stage 1 DeepSpeed knows it after its step."""
        if self.inputs.number == 1:
            return None
        gradients = [p.grad.float() for p in self.engine.module.parameters() if p.requires_grad and p.grad is not None]
        return float(torch.stack([g.norm() for g in gradients]).norm())

    def validate(self) -> dict[str, Any]:
        """Bits per character on the head of each set's held-out documents, and their mean over new and old sets."""
        settings, data = self.inputs.run.validate_, self.inputs.run.data
        self.engine.module.eval()
        sets = {
            name: score_set(
                self.engine.module,
                self.inputs.store,
                name,
                self.ranks,
                window=self.inputs.run.evaluate.window,
                max_tokens=settings.max_tokens_per_set,
            ).bits_per_character
            for name in data.sets
        }
        self.engine.module.train()
        taught = [sets[name] for name in (*data.new, *data.old)]
        mean = sum(taught) / len(taught)
        is_best = mean < self.best_value
        if is_best:
            self.best_value, self.best_tag = mean, self.tag
        batch = self.stage.global_batch_size
        row = {
            "step": self.step,
            "samples": self.step * batch,
            "tokens": self.step * batch * self.stage.sequence_length,
        }
        return row | {"sets": sets, "mean": mean, "best": is_best}

    @property
    def tag(self) -> str:
        """The name of a checkpoint taken now."""
        return f"step{self.step:06d}"

    def save(self) -> dict[str, float] | None:
        """Save a checkpoint unless this step's was read or written already; how long it took and how large it is.

        Raises:
            AgreedError: it can't be written.
        """
        if self.saved_tag.partition("-")[0] == self.tag:  # a resized one has its ranks in its name
            return None
        manifest = {
            **self.inputs.identity,
            "stage": self.inputs.number,
            "step": self.step,
            "samples": self.step * self.stage.global_batch_size,
            "best_value": self.best_value if self.best_tag else None,
            "best_tag": self.best_tag,
            "bad_steps": self.guard.state(),
            "ranks": self.dims.world_size,
            "ep_size": self.dims.ep_size,
            "expert_plan": self.inputs.plan.model_dump(mode="json"),
        }
        figures = checkpoint.save_checkpoint(
            self.engine, self.inputs.folder, self.tag, manifest, self.inputs.run.checkpoint.keep
        )
        self.saved_tag = self.tag
        return figures

    def resume(self) -> None:
        """Go on from the newest sound checkpoint, if there is one, whatever number of ranks saved it.

        Raises:
            AgreedError: it is of another model, plan or tokenizer, or of other settings.
        """
        tag, complaints = checkpoint.newest_sound_tag(self.inputs.folder, self.ranks)
        for complaint in complaints:
            self.ranks.say(complaint)
        if tag is None:
            return
        folder = self.inputs.folder / tag
        manifest = checkpoint.read_manifest(folder)
        checkpoint.check_same_run(manifest, self.inputs.identity, folder)
        if manifest.get("settings") != self.inputs.identity.get("settings"):
            raise AgreedError(
                f"{folder}: was saved with other settings of this stage; add --force to begin the stage anew, "
                "or give the run another name"
            )
        saved_by = ParallelDims(manifest["ranks"], manifest["ep_size"])
        if saved_by != self.dims:
            self.engine.checkpoint_engine.saved_by_others = checkpoint.SavedOptimizer(
                folder, self.inputs.plan, saved_by
            )
        with redirect_stdout(io.StringIO()):
            self.engine.load_checkpoint(str(self.inputs.folder), tag=tag, load_module_strict=False)
        self.engine.checkpoint_engine.saved_by_others = None
        self.step, self.saved_tag = manifest["step"], tag
        if manifest["best_tag"]:
            self.best_value, self.best_tag = manifest["best_value"], manifest["best_tag"]
            if self.ranks.is_first and self.best_tag in checkpoint.complete_tags(self.inputs.folder):
                checkpoint.mark_best(self.inputs.folder, self.best_tag, self.best_value)
        self.guard.load(manifest["bad_steps"])
        others = (
            "" if saved_by == self.dims else f" (saved by {saved_by.world_size} ranks, ep_size {saved_by.ep_size})"
        )
        self.ranks.say(f"stage {self.inputs.number}: resumed from {folder}{others} after {self.step} steps")
