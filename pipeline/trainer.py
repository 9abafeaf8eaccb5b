"""A stage on one rank: its engine, its samples, one step, one validation, one checkpoint."""

import io
import json
import math
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.optim.lr_scheduler import LambdaLR

from data_prep.store import TokenStore
from pipeline import checkpoint
from pipeline.config import RunConfig, Stage1Config, Stage2Config, StageConfig
from pipeline.data import SampleOrder, stage_order
from pipeline.distributed import Ranks, peak_memory_bytes
from pipeline.ds_config import fill_ds_config, micro_batch_size, read_ds_config, training_dtype
from pipeline.errors import UserError
from pipeline.expert_plan import ExpertPlan
from pipeline.losses import classifier_loss, load_balancing_loss, lpr_loss, next_token_loss
from pipeline.metrics import StepSums
from pipeline.model import Stage, moe_layers, parameter_groups, train_only
from pipeline.scoring import score_set
from pipeline.upcycle import load_upcycled


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
        self.micro_batch = micro_batch_size(inputs.run, self.stage, ranks.world_size, ranks.device.type)
        self.accumulation = self.stage.global_batch_size // (ranks.world_size * self.micro_batch)
        self.engine = self._build_engine()
        self.layers = moe_layers(self.engine.module)
        self.batch_tokens = self.stage.global_batch_size * self.stage.sequence_length
        self.step = 0
        self.best_value = math.inf
        inputs.folder.mkdir(parents=True, exist_ok=True)

    def _build_engine(self) -> Any:
        inputs, ranks, stage = self.inputs, self.ranks, self.stage
        ds_config = read_ds_config(inputs.run.deepspeed)
        ep_size = inputs.run.parallel.ep_size
        model = load_upcycled(
            inputs.upcycled,
            inputs.plan,
            training_dtype(ds_config),
            ep_size=ep_size,
            ep_rank=ranks.rank % ep_size,
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
        engine.checkpoint_engine = checkpoint.AtomicCheckpointEngine(engine._config, engine.module)
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
                micro_batch=self.micro_batch,
            ),
            dist_init_required=False,
        )
        return engine

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over one global batch; returns its row of metrics."""
        started = time.monotonic()
        first = self.step * self.stage.global_batch_size
        sums = StepSums(len(self.set_names), [layer.num_experts + 1 for layer in self.layers], self.ranks.device)
        for micro_step in range(self.accumulation):
            offset = (micro_step * self.ranks.world_size + self.ranks.rank) * self.micro_batch
            self._micro_step(first + offset, sums)
            if micro_step < self.accumulation - 1:
                self.engine.step()  # counts the micro-step; only the last one updates the weights
        grad_norm = self._gradient_norm()
        learning_rate = self.engine.get_lr()[0]
        self.engine.step()
        self.step += 1
        row = {
            "step": self.step,
            "samples": self.step * self.stage.global_batch_size,
            "tokens": self.step * self.batch_tokens,
        }
        row |= sums.read(self.ranks.sum(sums.pack()), self.set_names)
        seconds = time.monotonic() - started
        grad_norm = self.engine.get_global_grad_norm() if grad_norm is None else grad_norm
        return row | {
            "lr": learning_rate,
            "grad_norm": float(grad_norm),
            "tokens_per_second": self.batch_tokens / seconds,
            "memory_gb": peak_memory_bytes(self.ranks.device) / 1e9,
            "seconds": seconds,
        }

    def _micro_step(self, first: int, sums: StepSums) -> None:
        """Forward and backward of one micro-batch; DeepSpeed's boundary is the last of the step."""
        batch = self.order.batch(first, self.micro_batch)
        device = self.ranks.device
        logits_BLV = self.engine(**batch.model_inputs(device), use_cache=False).logits
        routings = [layer.routing for layer in self.layers if layer.routing is not None]
        losses = self._losses(logits_BLV, torch.from_numpy(batch.labels).to(device), routings, batch.is_old)
        sums.add_losses(**{name: loss for name, (loss, _) in losses.items()})
        sources_T = torch.from_numpy(batch.sources).to(device).repeat_interleave(self.stage.sequence_length)
        sums.add_routing(routings, sources_T)
        total = sum(weight * loss for loss, weight in losses.values())
        # The engine averages over ranks and divides by the accumulation steps; our sums are divided already.
        self.engine.backward(total * self.ranks.world_size * self.accumulation)
        for layer in self.layers:
            layer.routing = None

    def _losses(
        self, logits_BLV: torch.Tensor, labels_BL: torch.Tensor, routings: list[Any], is_old: Any
    ) -> dict[str, tuple[torch.Tensor, float]]:
        """Each loss of this micro-batch, as its part of the global batch's mean, and its weight."""
        stage = self.stage
        tokens = stage.global_batch_size * stage.sequence_length
        losses = {"next_token": (next_token_loss(logits_BLV, labels_BL) / tokens, 1.0)}
        if isinstance(stage, Stage1Config):
            balance = load_balancing_loss(
                routings, scale=stage.balance_scale, statistics=stage.balance_statistics
            )  # a mean already: over this rank's tokens
            losses["balance"] = (balance / (self.accumulation * self.ranks.world_size), stage.balance_weight)
        if isinstance(stage, Stage2Config):
            old_T = torch.from_numpy(is_old).flatten().to(labels_BL.device)
            old_tokens = self.order.old_tokens(self.step * stage.global_batch_size, stage.global_batch_size)
            losses["lpr"] = (lpr_loss(routings, old_T, stage.lpr) / max(1, old_tokens), stage.lpr_weight)
            losses["classifier"] = (classifier_loss(routings, old_T) / tokens, stage.classifier_weight)
        return losses

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
        is_best, self.best_value = mean < self.best_value, min(mean, self.best_value)
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

    def save(self) -> None:
        """Save a checkpoint unless this step's is there already."""
        if self.tag in checkpoint.complete_tags(self.inputs.folder):
            return
        state = {"stage": self.inputs.number, "step": self.step, "samples": self.step * self.stage.global_batch_size}
        manifest = {
            **self.inputs.identity, **state, "best_value": self.best_value,
            "ranks": self.ranks.world_size, "ep_size": self.inputs.run.parallel.ep_size,
        }  # fmt: skip
        checkpoint.save_checkpoint(
            self.engine, self.inputs.folder, self.tag, manifest, self.inputs.run.checkpoint.keep
        )

    def resume(self) -> None:
        """Go on from the newest sound checkpoint, if there is one.

        Raises:
            UserError: it is of another model, plan or tokenizer, or of another number of ranks.
        """
        found: list[Any] = [None]
        if self.ranks.is_first:
            found = [checkpoint.newest_sound_tag(self.inputs.folder)]
        if self.ranks.world_size > 1:
            torch.distributed.broadcast_object_list(found)
        tag, complaints = found[0]
        for complaint in complaints:
            self.ranks.say(complaint)
        if tag is None:
            return
        folder = self.inputs.folder / tag
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
        checkpoint.check_same_run(manifest, self.inputs.identity, folder)
        if manifest.get("settings") != self.inputs.identity.get("settings"):
            raise UserError(
                f"{folder}: was saved with other settings of this stage; add --force to begin the stage anew, "
                "or give the run another name"
            )
        here = {"ranks": self.ranks.world_size, "ep_size": self.inputs.run.parallel.ep_size}
        there = {key: manifest[key] for key in here}
        if here != there:
            raise UserError(f"{folder}: was saved with {there}, this run has {here}; resume with the same")
        self.engine.load_checkpoint(str(self.inputs.folder), tag=tag, load_module_strict=False)
        self.step, self.best_value = manifest["step"], manifest["best_value"]
        self.ranks.say(f"stage {self.inputs.number}: resumed from {folder} after {self.step} steps")
