"""The steps that run on ranks, training and evaluation, and the report of them all."""

import time
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import content_key, read_json, sha256_file, write_json
from common.text_table import figures_line, result_table
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.method.stages import find_stage, stages_of
from pipeline.run.steps import Steps, seconds_since
from pipeline.training.ds_config import batch_shape, read_ds_config, training_dtype
from pipeline.training.monitors import check_monitors, finish_wandb_run, keep_wandb_run

EVALUATION_FILE = "evaluation.json"


class RankSteps(Steps):
    """All steps of a run."""

    def check_parallel(self, world_size: int, device: str) -> None:
        """What can be known of a training run before any rank starts.

        Raises:
            UserError: ep_size, batch or DeepSpeed config do not fit.
        """
        read_ds_config(self.run.deepspeed)
        check_monitors(self.run.log)
        ParallelDims(world_size, self.run.parallel.ep_size)
        for stage in stages_of(self.run):
            batch_shape(self.run, stage.settings, world_size, device)

    def check_stage(self, number: int) -> None:
        """What can be known of a stage's data before any rank starts.

        Raises:
            UserError: a set has less than a sample, or stage 1's checkpoint, which stage 2 needs, is gone.
        """
        from pipeline.checkpoint import read_manifest
        from pipeline.training.sample_order import stage_order

        stage_order(self.store, self.run.data, find_stage(self.run, number), self.run.seed)
        if find_stage(self.run, number).starts_from is not None:
            try:
                read_manifest(self._stage1_checkpoint())
            except UserError as error:
                raise UserError(f"{error}; train stage 1 again with --force") from error

    def _stage1_checkpoint(self) -> Path:
        """The checkpoint that stage 1 ended with."""
        return self.stage_folder(1) / self.folder.manifest("stage1")["outputs"]["checkpoint"]

    def stage_inputs(self, number: int) -> dict[str, Any]:
        """What a stage's result depends on; not how it is spread over ranks, nor when it validates or saves."""
        sets = find_stage(self.run, number).sets(self.run.data)
        inputs = {
            "upcycled": self.folder.manifest("upcycle")["outputs"]["upcycled"],
            "tokens": self.store.key,
            "plan": self._identity(number)["plan"],
            "weights": {name: entry.weight for name, entry in sets.items()},
            "seed": self.run.seed,
            "deepspeed": read_json(self.run.deepspeed),
            "settings": self.run.stage(number).model_dump(mode="json", exclude={"activation_checkpointing"}),
        }
        if find_stage(self.run, number).starts_from is not None:
            inputs["stage1"] = self.folder.hash_of("stage1")
        return inputs

    def stage_is_done(self, number: int, *, say: bool) -> bool:
        """Whether the stage has been trained to its end."""
        return self.done(f"stage{number}", self.stage_inputs(number), say)

    def train(self, number: int, ranks: Ranks) -> bool:
        """Train a stage, on this rank; false if it was asked to stop before its end."""
        import shutil

        from pipeline.training.inputs import StageInputs
        from pipeline.training.train import train_stage

        inputs, step, target = self.stage_inputs(number), f"stage{number}", self.stage_folder(number)
        if ranks.is_first and (self.force or self.run.checkpoint.resume == "never"):
            shutil.rmtree(target, ignore_errors=True)
            self.folder.forget(step)
        ranks.wait()
        if ranks.is_first and self.run.log.wandb:
            keep_wandb_run(target)
        stage = find_stage(self.run, number)
        identity = self._identity(number) | {"settings": content_key(inputs)}
        stage1_tag = None
        if stage.starts_from is not None:
            stage1_tag = self._stage1_checkpoint()
            identity["stage1"] = {"tag": stage1_tag.name, "manifest": sha256_file(stage1_tag / "manifest.json")}
        figures = train_stage(
            StageInputs(
                self.run, stage, self.plan, self.store, self.upcycled, target, identity, stage1_checkpoint=stage1_tag
            ),
            ranks,
        )
        finish_wandb_run()
        if figures is None:
            return False
        if ranks.is_first:
            self.folder.finish(step, inputs, outputs={"checkpoint": figures["tag"]}, figures=figures)
        return True

    def evaluate_inputs(self) -> dict[str, Any]:
        """What the evaluation depends on."""
        stages = [1, 2] if self.run.stage2 else [1]
        return {
            "tokens": self.store.key,
            "model": self.model_hash,
            "window": self.run.evaluate.window,
            "stages": {f"stage{number}": self.folder.hash_of(f"stage{number}") for number in stages},
        }

    def evaluate_is_done(self, *, say: bool) -> bool:
        """Whether the last checkpoints have been scored."""
        return self.done("evaluate", self.evaluate_inputs(), say)

    def evaluate(self, ranks: Ranks, tag: str | None, checkpoints: dict[str, list[Path]]) -> None:
        """Score the base model and the checkpoints that :meth:`checkpoints_to_score` found for ``tag``."""
        from pipeline.evaluation.evaluate import evaluate_models
        from pipeline.model.backbone import parameter_counts

        started = time.monotonic()
        inputs = self.evaluate_inputs() if tag is None else {}
        result = evaluate_models(
            self.run, self.plan, self.store, dense=self.dense, upcycled=self.upcycled, checkpoints=checkpoints,
            dtype=training_dtype(read_ds_config(self.run.deepspeed)), ranks=ranks,
        )  # fmt: skip
        upcycled = read_json(self.upcycled / "manifest.json")
        sizes = (upcycled["dense_parameters"], upcycled["mlp_parameters"], upcycled["hidden_size"])
        result["parameters"] = parameter_counts(*sizes, self.plan)
        if not ranks.is_first:
            return
        if tag is None:
            write_json(self.folder.path / EVALUATION_FILE, result)
            self.folder.finish("evaluate", inputs, outputs={}, figures=seconds_since(started))
            return
        target = self.folder.path / "evaluations" / f"{tag.replace('/', '-')}.json"
        write_json(target, result)
        print(f"{result_table(result)}\nwritten: {target}", flush=True)

    def checkpoints_to_score(self, tag: str | None) -> dict[str, list[Path]]:
        """For each label, the checkpoints to lay over the upcycled model: the stages' last, or the one named.

        Raises:
            UserError: there is no such checkpoint, it is damaged, or it is of another model, plan or tokenizer.
        """
        from pipeline.checkpoint import check_same_run
        from pipeline.evaluation.evaluate import BASE, checkpoint_folder

        stages = {f"stage{number}": self.stage_folder(number) for number in (1, 2)}
        wanted = [tag] if tag else list(self.evaluate_inputs()["stages"])
        checkpoints: dict[str, list[Path]] = {}
        for label in wanted:
            if label == BASE:
                continue
            folder = checkpoint_folder(stages, label)
            manifest = read_json(folder / "manifest.json")
            check_same_run(manifest, self._identity(manifest["stage"]), folder)
            checkpoints[label] = [folder]
            if manifest["stage"] == 2:
                experts = checkpoint_folder(stages, f"stage1/{manifest['stage1']['tag']}")
                if sha256_file(experts / "manifest.json") != manifest["stage1"]["manifest"]:
                    raise UserError(
                        f"{folder}: was trained on another {experts} than lies there now; train stage 2 again"
                    )
                checkpoints[label] = [experts, folder]
        return checkpoints

    def _identity(self, number: int) -> dict[str, Any]:
        """What a stage's checkpoints are of."""
        plan_key = find_stage(self.run, number).plan_key(self.plan)
        return {"model": self.model_hash, "plan": plan_key, "tokenizer": self.store.manifest.tokenizer_key}

    def report(self) -> Path:
        """Everything measured to report.html, and the table."""
        from pipeline.report import write_report

        path = write_report(self.folder.path)
        evaluation = self.folder.path / EVALUATION_FILE
        if evaluation.is_file():
            print("\n" + self.summary(read_json(evaluation)), flush=True)
        print(
            f"report: {path}       next: copy launch/runs/quickstart.yaml, put in your model and languages", flush=True
        )
        return path

    def summary(self, evaluation: dict[str, Any]) -> str:
        """The table and the line of figures."""
        figures = {
            step: read_json(self.folder.manifest_path(step))["figures"]
            for step in ("tokenize", "similarity", "upcycle", "stage1", "stage2", "evaluate")
            if self.folder.manifest_path(step).is_file()
        }
        stages = [figures[step] for step in ("stage1", "stage2") if step in figures]
        line = figures_line(
            evaluation["parameters"],
            stages[0]["tokens_per_second"],
            max(stage["peak_memory_gb"] for stage in stages),
            sum(figure.get("seconds", 0.0) for figure in figures.values()) / 60,
        )
        return f"{result_table(evaluation)}\n{line}"
