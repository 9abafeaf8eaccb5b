"""lm-eval's model class on a model of ours: the ranks share the requests, and each of them gets all answers."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from common.progress import progress
from pipeline.distributed.process_group import Ranks
from pipeline.model.backbone import moe_layers, padding_matters

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 8192}
TEXTS_PER_BATCH = {"cpu": 4, "cuda": 32}  # that are generated at once
EVERYTHING = 1 << 30  # requests per batch: what HFLM is given here is a batch already
Tokens = tuple[Any, list[int], list[int]]  # names, context, continuation: as HFLM's


class SharedLM(HFLM):
    """Scores and continues texts for lm-eval.

    lm-eval would give each rank other documents. Here each rank has all requests and computes its share: so tasks draw
    the same examples whatever the ranks, and may have fewer documents than there are ranks. With expert parallelism
    ranks exchange tokens in each forward pass, so all make the same number of them; a rank that has no batch left runs
    one that counts for nothing.

    Args:
        model: dense, or with MoE layers whose experts may be spread over the ranks; on the ranks' device.
        tokenizer: the model's.
        ranks: all of them take part.
        beginning: the token that a document begins with: BOS, or without one the document separator.
        separator: the token that ends a document.
        window: tokens per window where whole documents are scored, as in our own scoring; elsewhere, what the model
            can hold.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        ranks: Ranks,
        *,
        beginning: int,
        separator: int,
        window: int,
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=EVERYTHING,
            softmax_dtype="float32", prefix_token_id=beginning,
        )  # fmt: skip
        self._max_length: int | None = None
        self.add_bos_token: bool | None = None
        self._ranks, self._separator, self._window = ranks, separator, window
        self._is_spread = any(layer.ep_size > 1 for layer in moe_layers(model))

    @property
    def eot_token_id(self) -> int:
        """What ends a text; a chat model's eos may be another token."""
        return self._separator

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each pair of a context and its continuation, the log-likelihood, and whether it is the likeliest."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows; no token before it but the one that begins a document."""
        with self._documents():
            answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return answers

    @contextmanager
    def _documents(self) -> Iterator[None]:
        """Windows are those of our own scoring, and the tokenizer puts no BOS of its own before a text."""
        self._max_length, self.add_bos_token = self._window, False
        try:
            yield
        finally:
            self._max_length = self.add_bos_token = None

    def _loglikelihood_tokens(
        self, requests: Sequence[Tokens], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._say_if_too_long(requests)
        answers_N2 = torch.zeros(len(requests), 2, dtype=torch.float64, device=self._ranks.device)
        nothing: Tokens = (("", ""), [self._separator], [self._separator])
        for mine in self._share(self._batches(requests), "request"):
            chosen = [requests[i] for i in mine] or [nothing]
            # HFLM computes alike requests once, which is right only where it scores as many tokens of each.
            self.logits_cache = all(_is_one_token(one) for one in chosen)
            found = super()._loglikelihood_tokens(chosen, disable_tqdm=True)
            if mine:
                answers_N2[mine] = torch.tensor(found, dtype=torch.float64, device=self._ranks.device)
        return [(value, bool(is_likeliest)) for value, is_likeliest in self._ranks.sum(answers_N2).tolist()]

    def _say_if_too_long(self, requests: Sequence[Tokens]) -> None:
        too_long = sum(len(context) + len(more) > self.max_length + 1 for _, context, more in requests)
        if too_long:
            self._ranks.say(
                f"lm-eval: {too_long:,} of {len(requests):,} requests are longer than {self.max_length:,} tokens; "
                "what is too much is cut off at their beginning"
            )

    def _batches(self, requests: Sequence[Tokens]) -> list[list[int]]:
        """Numbers of requests, by batch; those that differ in their one scored token are in one, and computed once."""
        alike: dict[Any, list[int]] = {}
        for number, one in enumerate(requests):
            alike.setdefault(tuple(one[1]) if _is_one_token(one) else number, []).append(number)

        def length(numbers: list[int]) -> int:
            _, context, continuation = requests[numbers[0]]
            return min(len(context) + len(continuation) - 1, self.max_length)

        batches: list[list[int]] = []
        most = 0 if padding_matters(self.model) else TOKENS_PER_BATCH[self._ranks.device.type]
        for of_one_token in (True, False):
            rows, longest = 0, 0
            found = [numbers for numbers in alike.values() if _is_one_token(requests[numbers[0]]) == of_one_token]
            for numbers in sorted(found, key=length, reverse=True):
                if rows == 0 or (rows + 1) * longest > most:
                    batches.append([])
                    rows, longest = 0, length(numbers)
                batches[-1] += numbers
                rows += 1
        return batches

    def _share(self, batches: list[list[int]], unit: str) -> Iterator[list[int]]:
        """This rank's batches; empty ones at the end, so that all ranks have as many."""
        ranks = self._ranks
        with progress(sum(map(len, batches)), "lm-eval", unit, show=ranks.is_first) as bar:
            for start in range(0, len(batches), ranks.world_size):
                ranks.at(f"lm-eval, batch {start // ranks.world_size + 1}")
                together = batches[start : start + ranks.world_size]
                yield together[ranks.rank] if ranks.rank < len(together) else []
                bar.update(sum(map(len, together)))

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(input_ids=inps, use_cache=False).logits
        return logits

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop sequences."""
        batches = self._batches_to_generate(requests)
        texts: dict[int, str] = {}
        for mine in self._share(batches, "text"):
            found = super().generate_until([requests[i] for i in mine or batches[0][:1]], disable_tqdm=True)
            texts.update(zip(mine, found, strict=False))  # without a batch of its own, the text counts for nothing
        everyones: list[Any] = [texts] * self._ranks.world_size
        if self._ranks.world_size > 1:
            torch.distributed.all_gather_object(everyones, texts)
        together = {number: text for found in everyones for number, text in found.items()}
        return [together[number] for number in range(len(requests))]

    def _batches_to_generate(self, requests: list[Any]) -> list[list[int]]:
        """Numbers of requests, by batch; those of a batch have the same settings, and contexts of similar length."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        size = 1 if padding_matters(self.model) else TEXTS_PER_BATCH[self._ranks.device.type]
        batches = []
        for numbers in alike.values():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            batches += [numbers[start : start + size] for start in range(0, len(numbers), size)]
        return batches

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        # A rank whose texts have ended goes on until those of all ranks have.
        return super()._model_generate(context, max_length, stop, synced_gpus=self._is_spread, **generation_kwargs)


def _is_one_token(request: Tokens) -> bool:
    """Whether a single token is scored, as of questions whose answers are letters."""
    return len(request[2]) == 1
