"""The steps of a run: what each reads and writes, and when it is done already."""

import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.hashes import RememberedHashes
from data_prep.prepare import prepare_run, tokens_folder
from data_prep.store import TokenStore
from pipeline.allocation import allocate, clamp_similarity, most_similar_layers
from pipeline.config import RunConfig
from pipeline.distributed import Ranks
from pipeline.ds_config import micro_batch_size, read_ds_config, training_dtype
from pipeline.errors import UserError
from pipeline.expert_plan import FILE_NAME as PLAN_FILE
from pipeline.expert_plan import ExpertPlan
from pipeline.files import content_key, read_json, sha256_file, write_json
from pipeline.run_folder import RunFolder
from pipeline.table import figures_line, result_table

SIMILARITY_FILE = "similarity.json"
EVALUATION_FILE = "evaluation.json"
PARITY_SAMPLE = 128  # tokens of each set for the upcycling receipt


@dataclass(frozen=True)
class Steps:
    """One run's steps. ``force`` redoes a step whose inputs changed; ``redo`` one whose inputs did not."""

    run: RunConfig
    force: bool = False
    redo: bool = False

    @cached_property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.run.folder)

    @cached_property
    def dense(self) -> Path:
        """The dense model's folder."""
        from pipeline.model import model_folder

        return model_folder(self.run.model)

    @cached_property
    def model_hash(self) -> str:
        """A content key of the dense model's config and weights."""
        files = sorted(p for pattern in ("config.json", "*.safetensors", "*.bin") for p in self.dense.glob(pattern))
        hashes = RememberedHashes(self.run.cache_dir / "hashes.json").sha256(files)
        return content_key({file.name: sha256 for file, sha256 in zip(files, hashes, strict=True)})

    @cached_property
    def store(self) -> TokenStore:
        """The tokens, which must be there."""
        return TokenStore(self.run.cache_dir / "tokens" / self.folder.manifest("tokenize")["outputs"]["tokens"])

    @cached_property
    def plan(self) -> ExpertPlan:
        """The expert plan, which must be there."""
        self.folder.manifest("allocate")
        return ExpertPlan.load(self.folder.path / PLAN_FILE)

    @cached_property
    def upcycled(self) -> Path:
        """The upcycled checkpoint, which must be there."""
        return self.run.cache_dir / "upcycled" / self.folder.manifest("upcycle")["outputs"]["upcycled"]

    def stage_folder(self, number: int) -> Path:
        """Where a stage's checkpoints and metrics lie."""
        return self.folder.path / f"stage{number}"

    def _done(self, step: str, inputs: dict[str, Any], say: bool = True) -> bool:
        done = self.folder.is_done(step, inputs, force=self.force) and not (self.force and self.redo)
        if done and say:
            print(f"{step}: done, skipped", flush=True)
        return done

    # --- steps that need no ranks -------------------------------------------------------------------

    def tokenize(self) -> None:
        """Text to token shards in the cache."""
        started = time.monotonic()
        folder = tokens_folder(self.run)
        inputs = {"tokens": folder.name}
        if self._done("tokenize", inputs) and (folder / "manifest.json").is_file():
            return
        store = prepare_run(self.run)
        sets = {name: entry.model_dump(mode="json", exclude={"sources"}) for name, entry in store.sets.items()}
        self.folder.finish(
            "tokenize", inputs, outputs={"tokens": store.key}, figures=_seconds(started) | {"sets": sets}
        )

    def similarity(self) -> None:
        """Tokens and dense model to similarity.json: one pass, nothing stored but means."""
        if self.similarity_is_done():
            return
        inputs, started = self._similarity_inputs(), time.monotonic()
        cached = self.run.cache_dir / "similarity" / content_key(inputs) / SIMILARITY_FILE
        if cached.is_file():
            print(f"similarity: {cached} is there already, skipped", flush=True)
        else:
            self._measure_similarity(cached)
        write_json(self.folder.path / SIMILARITY_FILE, read_json(cached))
        outputs = {"similarity": sha256_file(cached)[:16]}
        self.folder.finish("similarity", inputs, outputs=outputs, figures=_seconds(started))

    def similarity_is_done(self) -> bool:
        """Whether there is nothing to measure, or it has been."""
        if not self.run.data.old:
            print("similarity: no old set to compare with, skipped", flush=True)
            return True
        return self._done("similarity", self._similarity_inputs())

    def _similarity_inputs(self) -> dict[str, Any]:
        settings = self.run.similarity.model_dump(mode="json", exclude={"not_positive"})
        return {"model": self.model_hash, "tokens": self.store.key, **settings}

    def _measure_similarity(self, target: Path) -> None:
        import torch

        from pipeline.data import text_windows
        from pipeline.model import load_dense
        from pipeline.similarity import mean_unit_vectors, similarity_of

        settings, data = self.run.similarity, self.run.data
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_dense(self.dense, training_dtype(read_ds_config(self.run.deepspeed)), device)
        sums: dict[str, Any] = {}
        tokens: dict[str, int] = {}
        for name, entry in {**data.old, **data.new}.items():
            windows = text_windows(self.store, name, settings.sequence_length, self.run.seed)
            vectors = mean_unit_vectors(model.base_model, windows, settings.tokens, f"similarity {name}")
            if vectors.tokens < settings.tokens:
                print(f"similarity: {name} has only {vectors.tokens:,} of {settings.tokens:,} tokens", flush=True)
            sums[entry.language] = sums.get(entry.language, 0) + vectors.means() * vectors.tokens
            tokens[entry.language] = tokens.get(entry.language, 0) + vectors.tokens
        means = {language: total / tokens[language] for language, total in sums.items()}
        old = list(dict.fromkeys(entry.language for entry in data.old.values()))
        new = list(dict.fromkeys(entry.language for entry in data.new.values()))
        similarity_of(means, tokens, old, new).save(target)

    def allocate(self) -> None:
        """Similarities and budget to expert_plan.json."""
        from pipeline.model import model_config

        experts = self.run.experts
        needs_similarity = bool(self.run.data.old)
        inputs = {
            "model": self.model_hash,
            "similarity": self.folder.manifest("similarity")["outputs"]["similarity"] if needs_similarity else None,
            "experts": experts.model_dump(mode="json"),
            "not_positive": self.run.similarity.not_positive,
        }
        if self._done("allocate", inputs):
            return
        num_layers = model_config(self.dense).get_text_config().num_hidden_layers
        measured = read_json(self.folder.path / SIMILARITY_FILE)["by_layer"] if needs_similarity else None
        similarity = measured
        if measured is not None and self.run.similarity.not_positive == "clamp":
            similarity, changed = clamp_similarity(measured)
            if changed:
                print(
                    f"allocate: warning: similarity of layers {changed} raised to a small positive value", flush=True
                )
        allocation = allocate(experts, num_layers, similarity)
        plan = ExpertPlan.first_expansion(
            allocation.counts,
            old=sorted({entry.language for entry in self.run.data.old.values()}),
            new=sorted({entry.language for entry in self.run.data.new.values()}),
            top_k=experts.top_k,
            classifier_layers=self._classifier_layers(allocation.counts, measured),
            similarity=measured,
        )
        plan.placement(self.run.parallel.ep_size)  # checks that every rank gets an expert
        plan.save(self.folder.path / PLAN_FILE)
        print(f"allocate: {allocation.note}; experts by layer: {' '.join(map(str, plan.counts))}", flush=True)
        self.folder.finish("allocate", inputs, outputs={"plan": plan.key}, figures={"note": allocation.note})

    def _classifier_layers(self, counts: list[int], similarity: list[float] | None) -> list[int]:
        wanted = self.run.experts.classifier_layers
        if isinstance(wanted, list):
            return wanted
        if wanted == 0:
            return []
        if similarity is None:
            raise UserError("experts.classifier_layers: a number needs similarities, and so an old set; give a list")
        return most_similar_layers(similarity, counts, wanted)

    def upcycle(self) -> None:
        """Dense model and plan to a native DeepSpeed-MoE checkpoint in the cache."""
        if self.upcycle_is_done():
            return
        inputs, target, started = self._upcycle_inputs(), self._upcycle_target(), time.monotonic()
        if target.is_dir():
            print(f"upcycle: {target} is there already, skipped", flush=True)
        else:
            from pipeline.upcycle import upcycle

            samples = self._parity_samples()
            upcycle(self.dense, self.plan, samples, target, seed=self.run.seed, model_hash=self.model_hash)
        self.folder.link("upcycled", target)
        manifest = read_json(target / "manifest.json")
        parity = manifest["parity"]
        print(
            f"upcycle: largest logit difference to the dense model {parity['max_abs_logit_difference']:.2g} "
            f"(logits up to {parity['max_abs_logit']:.0f}) on {parity['tokens']} tokens of real text, fp32",
            flush=True,
        )
        figures = _seconds(started) | {key: manifest[key] for key in ("parity", "dense_parameters", "mlp_parameters")}
        self.folder.finish("upcycle", inputs, outputs={"upcycled": target.name}, figures=figures)

    def upcycle_is_done(self) -> bool:
        """Whether the upcycled checkpoint is there."""
        return self._done("upcycle", self._upcycle_inputs()) and self._upcycle_target().is_dir()

    def _upcycle_inputs(self) -> dict[str, Any]:
        return {"model": self.model_hash, "plan": self.plan.experts_key, "seed": self.run.seed}

    def _upcycle_target(self) -> Path:
        return self.run.cache_dir / "upcycled" / content_key(self._upcycle_inputs())

    def _parity_samples(self) -> Any:
        """The first tokens of each set's held-out text, [B, L]."""
        import numpy as np

        shards = [self.store.held_out(name) for name in self.run.data.sets]
        length = min(PARITY_SAMPLE, *(shard.num_tokens for shard in shards))
        return np.stack([shard.tokens[:length] for shard in shards])

    # --- steps on ranks -----------------------------------------------------------------------------

    def check_parallel(self, world_size: int, device: str) -> None:
        """What can be known of a training run before any rank starts.

        Raises:
            UserError: ep_size, batch or DeepSpeed config do not fit.
        """
        read_ds_config(self.run.deepspeed)
        ep_size = self.run.parallel.ep_size
        if world_size % ep_size:
            raise UserError(
                f"parallel.ep_size: {ep_size} does not divide the number of ranks, {world_size}; "
                f"start a multiple of {ep_size} ranks, or use --set parallel.ep_size={math.gcd(ep_size, world_size)}"
            )
        for stage in (self.run.stage1, self.run.stage2):
            if stage is not None:
                micro_batch_size(self.run, stage, world_size, device)

    def check_stage(self, number: int) -> None:
        """What can be known of a stage's data before any rank starts.

        Raises:
            UserError: a set has less than a sample.
        """
        from pipeline.data import stage_order

        stage_order(self.store, self.run.data, self.run.stage(number), self.run.seed)

    def stage_inputs(self, number: int) -> dict[str, Any]:
        """What a stage's result depends on; not how it is spread over ranks, nor when it validates or saves."""
        data = self.run.data
        sets = data.new if number == 1 else {**data.old, **data.new}
        inputs = {
            "upcycled": self.folder.manifest("upcycle")["outputs"]["upcycled"],
            "tokens": self.store.key,
            "plan": self._identity(number)["plan"],
            "weights": {name: entry.weight for name, entry in sets.items()},
            "seed": self.run.seed,
            "deepspeed": read_json(self.run.deepspeed),
            "settings": self.run.stage(number).model_dump(mode="json", exclude={"activation_checkpointing"}),
        }
        if number == 2:
            inputs["stage1"] = self.folder.hash_of("stage1")
        return inputs

    def stage_is_done(self, number: int, *, say: bool) -> bool:
        """Whether the stage has been trained to its end."""
        return self._done(f"stage{number}", self.stage_inputs(number), say)

    def train(self, number: int, ranks: Ranks) -> bool:
        """Train a stage, on this rank; false if it was asked to stop before its end."""
        import shutil

        from pipeline.train import StageInputs, train_stage

        inputs, step, target = self.stage_inputs(number), f"stage{number}", self.stage_folder(number)
        if ranks.is_first and self.force:  # what lies there is of other inputs, or is to be done again
            shutil.rmtree(target, ignore_errors=True)
            self.folder.forget(step)
        identity = self._identity(number)
        stage1_tag = None
        if number == 2:
            stage1 = self.folder.manifest("stage1")
            stage1_tag = self.stage_folder(1) / stage1["outputs"]["checkpoint"]
            identity["stage1"] = {"tag": stage1_tag.name, "manifest": sha256_file(stage1_tag / "manifest.json")}
        figures = train_stage(
            StageInputs(
                self.run, 1 if number == 1 else 2, self.plan, self.store, self.upcycled, target, identity, stage1_tag
            ),
            ranks,
        )
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
        return self._done("evaluate", self.evaluate_inputs(), say)

    def evaluate(self, ranks: Ranks, tag: str | None) -> None:
        """Score the base model and the stages' last checkpoints, or one that ``tag`` names."""
        from pipeline.evaluate import evaluate_models
        from pipeline.model import parameter_counts

        started = time.monotonic()
        inputs = self.evaluate_inputs() if tag is None else {}
        checkpoints = self.checkpoints_to_score(tag)
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
            self.folder.finish("evaluate", inputs, outputs={}, figures=_seconds(started))
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
        from pipeline.evaluate import BASE, checkpoint_folder

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
                checkpoints[label] = [checkpoint_folder(stages, f"stage1/{manifest['stage1']['tag']}"), folder]
        return checkpoints

    def _identity(self, number: int) -> dict[str, Any]:
        """What a stage's checkpoints are of."""
        plan = self.plan.experts_key if number == 1 else self.plan.key
        return {"model": self.model_hash, "plan": plan, "tokenizer": self.store.manifest.tokenizer_key}

    # --- what people look at ------------------------------------------------------------------------

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


def _seconds(started: float) -> dict[str, Any]:
    return {"seconds": round(time.monotonic() - started, 1)}
