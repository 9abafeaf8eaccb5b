"""How the base model and the last checkpoint go on from a run's prompts: what people look at beside the scores."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from common.files import content_key
from pipeline.evaluation.begins import Begins
from pipeline.evaluation.checkpoints import Scored
from pipeline.model.backbone import padding_matters
from pipeline.records.evaluation import Continued

FORMAT = 1  # raised when the same weights and prompts go on otherwise


@dataclass(frozen=True)
class Continuations:
    """Continues prompts, each by the likeliest tokens; what the cache holds is not computed again.

    Attributes:
        prompts: by name; none asks for nothing.
        new_tokens: that each is continued by; fewer are shown where the model ends its text.
        begins: gives a model's tokenizer, and what its documents begin and end with.
        folder: of what was computed.
        dtype: that models are computed in.
    """

    prompts: dict[str, str]
    new_tokens: int
    begins: Callable[[Scored], Begins]
    folder: Path
    dtype: torch.dtype

    def _path(self, scored: Scored) -> Path:
        key = {"weights": scored.weights, "prompts": self.prompts, "new_tokens": self.new_tokens}
        return self.folder / f"{content_key({**key, 'dtype': str(self.dtype), 'format': FORMAT})}.json"

    def lacks(self, scored: Scored) -> bool:
        """Whether a model has not been asked yet."""
        return bool(self.prompts) and not self._path(scored).is_file()

    def make(self, scored: Scored, model: PreTrainedModel, *, saves: bool) -> None:
        """Ask a model; all ranks do the same work, as with expert parallelism they exchange tokens in each pass.

        Args:
            scored: which model it is.
            model: dense, or with MoE layers whose experts are spread over the ranks.
            saves: whether this rank keeps what comes of it.
        """
        begins = self.begins(scored)
        starts = {
            name: [begins.beginning, *begins.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
            for name, prompt in self.prompts.items()
        }
        batches = [[name] for name in starts] if padding_matters(model) else [list(starts)]
        texts: dict[str, str] = {}
        for names in batches:
            new_ids = likeliest(model, [starts[name] for name in names], self.new_tokens, padding=begins.separator)
            for name, ids in zip(names, new_ids, strict=True):
                end = ids.index(begins.separator) if begins.separator in ids else len(ids)
                whole = begins.tokenizer.decode([*starts[name][1:], *ids[:end]])
                texts[name] = whole.removeprefix(self.prompts[name])
        if saves:
            Continued(texts=texts).save(self._path(scored))

    def load(self, scored: Scored) -> dict[str, str]:
        """What a model that has been asked went on with, by prompt."""
        return Continued.load(self._path(scored)).texts


@torch.inference_mode()
def likeliest(model: PreTrainedModel, starts: list[list[int]], count: int, *, padding: int) -> list[list[int]]:
    """For each start the ``count`` tokens that are likeliest, one after the other; no token ends a text.

    So all ranks make the same number of forward passes, though bf16 may round otherwise on one of them.

    Args:
        model: a causal language model.
        starts: ids, none of them empty.
        count: of new tokens.
        padding: the id before shorter starts; it is not attended to.
    """
    longest = max(len(ids) for ids in starts)
    ids_BL = torch.tensor([[padding] * (longest - len(ids)) + ids for ids in starts], device=model.device)
    mask_BL = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in starts], device=model.device)
    generate: Any = model.generate
    output_BL = generate(
        ids_BL, attention_mask=mask_BL, max_new_tokens=count, min_new_tokens=count, eos_token_id=None,
        pad_token_id=padding, do_sample=False, temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    found: list[list[int]] = output_BL[:, longest:].tolist()
    return found
