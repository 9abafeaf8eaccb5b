"""A program of somebody else's: LoRA by peft on an exported folder, saved, loaded and merged.

python -I tests/export/client_peft.py FOLDER REFERENCE.pt RESULTS.json
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WHERE: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
}


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def tried(folder: str, ids: torch.Tensor, logits: torch.Tensor, where: dict[str, Any]) -> dict[str, Any]:
    model = get_peft_model(load(folder), LoraConfig(r=4, task_type="CAUSAL_LM", **where))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in trained], lr=0.5)
    found: dict[str, Any] = {"before": float((model(ids).logits - logits).abs().max()), "losses": []}
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        found["losses"].append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found["of experts"] = sum(".experts." in name for name, _ in trained)
    model.eval()
    after = model(ids).logits
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        again = PeftModel.from_pretrained(load(folder), saved).eval()
    found["loaded"] = float((again(ids).logits - after).abs().max())
    merged = again.merge_and_unload()
    found["merged"] = float((merged(ids).logits - after).abs().max())
    found["moved"] = float((after - logits).abs().max())
    return found


if __name__ == "__main__":
    reference = torch.load(sys.argv[2])
    torch.manual_seed(0)
    results = {name: tried(sys.argv[1], reference["ids"], reference["logits"], where) for name, where in WHERE.items()}
    Path(sys.argv[3]).write_text(json.dumps(results))
