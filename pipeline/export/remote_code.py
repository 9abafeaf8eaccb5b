"""The Python files that an exported folder carries, so that transformers can load it: ``auto_map`` names them.

They subclass the dense model's own config and model, whatever its family; the router is this package's own file.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from common.errors import UserError
from pipeline.model.moe import router

CODE = Path(__file__).with_name("code")
ROUTER_FILE = "router.py"
CONFIG_FILE, MODEL_FILE = "configuration_upcycled", "modeling_upcycled"


def class_names(model: PreTrainedModel) -> dict[str, str]:
    """What the templates' @words@ stand for.

    Args:
        model: the mixture as it is trained; its class is the dense model's.

    Raises:
        UserError: its MLPs have no activation that a config names.
    """
    causal, base, config = type(model), type(model.base_model), type(model.config)
    pretrained = next(one for one in causal.__mro__ if one.__name__.endswith("PreTrainedModel"))
    activations = [name for name in ("hidden_activation", "hidden_act") if getattr(model.config, name, None)]
    if not activations:
        raise UserError(
            f"export: {config.__name__} names no activation of its MLPs (hidden_act); it can't be exported"
        )
    return {
        "Family": causal.__name__.removesuffix("ForCausalLM"),
        "family": str(config.model_type),
        "CausalLM": causal.__name__,
        "Model": base.__name__,
        "PreTrained": pretrained.__name__,
        "Config": config.__name__,
        "modeling_module": causal.__module__,
        "config_module": config.__module__,
        "activation": activations[0],
    }


def write_code(folder: Path, names: Mapping[str, str]) -> None:
    """Write the config's, the model's and the router's file."""
    for file in (CONFIG_FILE, MODEL_FILE):
        text = (CODE / f"{file}.py.tmpl").read_text(encoding="utf-8")
        for word, name in names.items():
            text = text.replace(f"@{word}@", name)
        (folder / f"{file}.py").write_text(text, encoding="utf-8")
    shutil.copyfile(str(router.__file__), folder / ROUTER_FILE)


def auto_map(names: Mapping[str, str]) -> dict[str, Any]:
    """What config.json says of the classes."""
    return {
        "architectures": [f"Upcycled{names['CausalLM']}"],
        "model_type": f"upcycled_{names['family']}",
        "auto_map": {
            "AutoConfig": f"{CONFIG_FILE}.Upcycled{names['Config']}",
            "AutoModel": f"{MODEL_FILE}.Upcycled{names['Model']}",
            "AutoModelForCausalLM": f"{MODEL_FILE}.Upcycled{names['CausalLM']}",
        },
    }
