"""The steps of a run: what each reads and writes, and when it is done already."""

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import content_key, read_json, sha256_file, write_json
from common.launch_environment import is_first_rank
from common.remembered_hashes import RememberedHashes
from data_prep.executor.launch import Backend, shares_an_srun
from data_prep.make_plan import Planned
from data_prep.prepare import plan_preparation, prepare
from data_prep.store import TokenStore
from pipeline.config.run import RunConfig
from pipeline.method.allocation import allocate, clamp_similarity, most_similar_layers
from pipeline.model.expert_plan import FILE_NAME as PLAN_FILE
from pipeline.model.expert_plan import ExpertPlan
from pipeline.run.run_folder import RunFolder
from pipeline.training.ds_config import read_ds_config, training_dtype

SIMILARITY_FILE = "similarity.json"
EVALUATION_FILE = "evaluation.json"
UPCYCLED_FORMAT = 2  # raised when what an upcycled folder holds changes
PARITY_SAMPLE = 128  # tokens of each set for the upcycling receipt


@dataclass(frozen=True)
class Steps:
    """One run's steps. ``force`` redoes a step whose inputs changed; ``redo`` one whose inputs did not.

    A step that is done already says so, unless ``quiet``.
    """

    run: RunConfig
    force: bool = False
    redo: bool = False
    quiet: bool = False

    @cached_property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.run.folder)

    @cached_property
    def dense(self) -> Path:
        """The dense model's folder."""
        from pipeline.model.backbone import model_folder

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
        keys = self.folder.manifest("tokenize")["outputs"]["sets"]
        return TokenStore(self.run.cache_dir / "tokens", self.run.data, keys)

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

    def done(self, step: str, inputs: dict[str, Any], say: bool = True) -> bool:
        done = self.folder.is_done(step, inputs, force=self.force) and not (self.force and self.redo)
        if done and say and not self.quiet:
            print(f"{step}: done, skipped", flush=True)
        return done

    def tokenize(self) -> None:
        """Text to token shards in the cache; tasks that srun started on several nodes share the work."""
        started = time.monotonic()
        backend: Backend = "array" if shares_an_srun() else "local"
        planned = plan_preparation(self.run.preparation, backend)
        inputs = _tokenize_inputs(planned)
        if self._tokens_are_there(planned):
            return
        store = prepare(self.run.preparation, backend, force=self.force, planned=planned)
        assert store is not None
        if not is_first_rank():
            return
        write_json(self.folder.path / "data_statistics.json", store.statistics.model_dump(mode="json"))
        figures = seconds_since(started) | {
            "sets": {
                name: one.manifest.model_dump(mode="json", include={"train", "held_out", "dropped", "bad_rows"})
                for name, one in store.sets.items()
            }
        }
        self.folder.finish("tokenize", inputs, outputs={"sets": store.keys}, figures=figures)

    def tokenize_is_done(self) -> bool:
        """Whether the tokens of these texts, with these settings, are there."""
        return self._tokens_are_there(plan_preparation(self.run.preparation))

    def _tokens_are_there(self, planned: Planned) -> bool:
        return self.done("tokenize", _tokenize_inputs(planned)) and planned.is_prepared({})

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
        self.folder.finish("similarity", inputs, outputs=outputs, figures=seconds_since(started))

    def similarity_is_done(self) -> bool:
        """Whether there is nothing to measure, or it has been."""
        if not self.run.data.old:
            if not self.quiet:
                print("similarity: no old set to compare with, skipped", flush=True)
            return True
        return self.done("similarity", self._similarity_inputs())

    def _similarity_inputs(self) -> dict[str, Any]:
        settings = self.run.similarity.model_dump(mode="json", exclude={"not_positive"})
        return {"model": self.model_hash, "tokens": content_key(self.store.keys), "settings": settings}

    def _measure_similarity(self, target: Path) -> None:
        import torch

        from pipeline.method.similarity import mean_unit_vectors, similarity_of
        from pipeline.model.backbone import load_dense
        from pipeline.training.sample_order import text_windows

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
        from pipeline.model.backbone import model_config

        if self.allocate_is_done():
            return
        experts, inputs = self.run.experts, self._allocate_inputs()
        needs_similarity = bool(self.run.data.old)
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

    def allocate_is_done(self) -> bool:
        """Whether the plan of these similarities and this budget is there."""
        return self.done("allocate", self._allocate_inputs())

    def _allocate_inputs(self) -> dict[str, Any]:
        needs_similarity = bool(self.run.data.old)
        return {
            "model": self.model_hash,
            "similarity": self.folder.manifest("similarity")["outputs"]["similarity"] if needs_similarity else None,
            "experts": self.run.experts.model_dump(mode="json"),
            "not_positive": self.run.similarity.not_positive,
        }

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
            from pipeline.method.upcycle import upcycle

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
        figures = seconds_since(started) | {
            key: manifest[key] for key in ("parity", "dense_parameters", "mlp_parameters")
        }
        self.folder.finish("upcycle", inputs, outputs={"upcycled": target.name}, figures=figures)

    def upcycle_is_done(self) -> bool:
        """Whether the upcycled checkpoint is there."""
        return self.done("upcycle", self._upcycle_inputs()) and self._upcycle_target().is_dir()

    def _upcycle_inputs(self) -> dict[str, Any]:
        return {"model": self.model_hash, "plan": self.plan.experts_key, "seed": self.run.seed}

    def _upcycle_target(self) -> Path:
        return self.run.cache_dir / "upcycled" / content_key(self._upcycle_inputs() | {"format": UPCYCLED_FORMAT})

    def _parity_samples(self) -> Any:
        """The first tokens of each set's held-out text, [B, L]."""
        import numpy as np

        shards = [self.store.held_out(name) for name in self.run.data.sets]
        length = min(PARITY_SAMPLE, *(shard.num_tokens for shard in shards))
        return np.stack([shard.tokens[:length] for shard in shards])


def _tokenize_inputs(planned: Planned) -> dict[str, Any]:
    return {"sets": planned.keys, "tokenizer": planned.tokenizer_key}


def seconds_since(started: float) -> dict[str, Any]:
    return {"seconds": round(time.monotonic() - started, 1)}
