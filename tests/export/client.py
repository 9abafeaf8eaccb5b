"""A program of somebody else's: loads an exported folder with transformers alone, and tries what people do with it.

python -I tests/export/client.py FOLDER REFERENCE.pt RESULTS.json [--compile]
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline


def load(folder: str, **options: Any) -> Any:
    config = json.loads((Path(folder) / "config.json").read_text())
    if config.get("attn_logit_softcapping"):  # which transformers 5.17 leaves out otherwise, of dense models too
        options["attn_implementation"] = "eager"
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def generated(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(ids, max_new_tokens=10, min_new_tokens=10, pad_token_id=0, **options)


def difference(model: Any, reference: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float((model(reference["ids"]).logits - reference["logits"]).abs().max())


def cached(model: Any, ids: torch.Tensor) -> float:
    """How far logits with a cache, token by token, are from those of the whole sequence."""
    with torch.no_grad():
        whole, cache, steps = model(ids).logits, None, []
        for position in range(ids.shape[1]):
            output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        return float((torch.cat(steps, 1) - whole).abs().max())


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compiled(folder: str, reference: dict[str, torch.Tensor]) -> dict[str, float]:
    model = load(folder).eval()
    model.set_experts_implementation("grouped_mm")
    forward = torch.compile(model.forward, fullgraph=True)
    with torch.no_grad():
        logits = forward(reference["ids"], use_cache=False).logits
    return {"compiled": float((logits - reference["logits"]).abs().max())}


def tried(folder: str, reference: dict[str, torch.Tensor]) -> dict[str, Any]:
    model = load(folder).eval()
    ids = reference["ids"]
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        found[implementation] = difference(model, reference)
    prompt = ids[:, :8]
    greedy = generated(model, prompt, do_sample=False)
    found["without a cache"] = torch.equal(generated(model, prompt, do_sample=False, use_cache=False), greedy)
    found["static cache"] = torch.equal(
        generated(model, prompt, do_sample=False, cache_implementation="static"), greedy
    )
    found["sampling"] = generated(model, prompt, do_sample=True).shape[1]
    found["beams"] = generated(model, prompt, do_sample=False, num_beams=3).shape[1]
    padding = torch.zeros(len(ids), 4, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(prompt)], 1)
    padded = generated(model, torch.cat([padding, prompt], 1), attention_mask=mask, do_sample=False)
    found["left padding"] = torch.equal(padded[:, 4:], greedy)
    found["token by token"] = cached(model, greedy)
    logits = model.model(ids, output_router_logits=True).router_logits
    found["router logits"] = [list(one.shape) for one in logits]
    half = load(folder, dtype=torch.bfloat16)
    found["bf16"] = sorted({str(p.dtype) for n, p in half.named_parameters() if ".mlp.gate." in n}) + [
        str(half.model.embed_tokens.weight.dtype)
    ]
    found["base model"] = type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("house river", max_new_tokens=5)
    found["pipeline"] = text[0]["generated_text"].startswith("house river")
    with tempfile.TemporaryDirectory() as other:
        model.save_pretrained(other)
        again = load(other)
        weights = dict(again.named_parameters())
        found["saved and loaded"] = all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        found["saved code"] = (Path(other) / "router.py").is_file()
        offloaded = load(
            folder, device_map="auto", max_memory={"cpu": 2 * found["parameters"]}, offload_folder=f"{other}/disk"
        )
        found["offloaded"] = "disk" in offloaded.hf_device_map.values()
        found["offloaded difference"] = difference(offloaded, reference)
        shutil.rmtree(f"{other}/disk", ignore_errors=True)
    model.train()
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable()
    again = gradients(model, ids)
    found["gradient checkpointing"] = max(float((again[name] - one).abs().max()) for name, one in plain.items())
    found["router gradient"] = float(sum(one.abs().sum() for name, one in plain.items() if ".gate.wg." in name))
    return found


if __name__ == "__main__":
    results = (compiled if "--compile" in sys.argv else tried)(sys.argv[1], torch.load(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(results))
