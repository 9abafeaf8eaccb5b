"""Where the Hugging Face model lies and what its config says, without loading it."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from common.errors import UserError
from pipeline.config.run import ModelConfig


def model_folder(model: ModelConfig) -> Path:
    """The model's folder; a hub id is looked up in the local cache, or fetched from the hub.

    Raises:
        UserError: it is neither a folder with a config.json nor a hub id that can be fetched.
    """
    folder = Path(model.path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: {folder} holds no config.json; name a Hugging Face model's folder")
        return folder
    if folder.is_absolute() or model.path.startswith(".") or model.path.count("/") != 1:
        raise UserError(f"model.path: {model.path} does not exist; name a Hugging Face model's folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        return Path(snapshot_download(model.path, revision=model.revision, local_files_only=offline))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"model.path: {model.path} is not a folder here, nor can it be fetched ({type(error).__name__}); "
            "check the name, fetch it where there is a network, or name a folder"
        ) from error


def folder_here(model: ModelConfig) -> Path | None:
    """The model's folder, or that of a hub's model in the local cache; None where it is not there. No hub is asked."""
    if Path(model.path).is_dir():
        return Path(model.path)
    if model.path.startswith((".", "/")) or model.path.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return Path(found).parent if isinstance(found, str) else None


def model_config(folder: Path) -> Any:
    """The model's Hugging Face config.

    Raises:
        UserError: transformers can't read it.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise incomplete_model(f"model.path: {folder}: transformers can't read its config.json", error) from error


def incomplete_model(what: str, error: Exception) -> UserError:
    """That a model can't be read, with the first line of the cause, and the fix."""
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{what} ({cause}); name a complete Hugging Face model's folder")
