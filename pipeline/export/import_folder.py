"""Makes the base of further expansions from an exported folder."""

from pathlib import Path

from common.errors import UserError
from common.files import new_folder, sha256_file, write_json, write_text
from pipeline.checkpoint.store import write_manifest
from pipeline.export.read import plan_of, read_expansion, read_exported
from pipeline.method.expand import write_experts
from pipeline.method.upcycle import TOKENIZER_FILES, copy_files, files_of, save_shared
from pipeline.records.checkpoint import HF_FOLDER, UPCYCLED_TAG, UpcycledManifest
from pipeline.records.expansion import IMPORTED_FILE, MODEL_FOLDER, OWN_TOKENIZER, Expansion, Imported
from pipeline.records.run_folder import PLAN_FILE, UPCYCLED

GENERATION = ("generation_config.json",)


def import_folder(source: Path, target: Path) -> Expansion:
    """Write what ``base:`` of a run can name: an upcycled checkpoint that holds all experts, its plan and tokenizer.

    Args:
        source: the exported folder.
        target: the folder to make; it appears only when all of it is written.

    Raises:
        UserError: the source is not an exported folder, its weights are damaged or not all of the run's, or the
            target exists.
    """
    if target.exists():
        raise UserError(f"import: {target} exists; name another folder with --to")
    expansion = read_expansion(source)
    _verify(source, expansion)
    plan = plan_of(source, expansion)
    with new_folder(target) as folder:
        upcycled, model_folder = folder / UPCYCLED, folder / MODEL_FOLDER
        for hf in (upcycled / HF_FOLDER, model_folder):
            hf.mkdir(parents=True)
            copy_files(source, GENERATION, hf)
            write_json(hf / "config.json", expansion.config)
        copy_files(source, TOKENIZER_FILES, upcycled / HF_FOLDER)
        extends = expansion.upcycled.new_rows is not None
        copy_files(source / OWN_TOKENIZER if extends else source, TOKENIZER_FILES, model_folder)
        (upcycled / UPCYCLED_TAG).mkdir()
        model = read_exported(source, upcycled / HF_FOLDER, expansion)
        write_experts(model, plan, plan, upcycled / UPCYCLED_TAG)
        state = {name: tensor for name, tensor in model.state_dict().items() if ".deepspeed_experts." not in name}
        save_shared(model, state, plan, upcycled / UPCYCLED_TAG)
        write_text(upcycled / "latest", UPCYCLED_TAG)
        write_manifest(upcycled, _manifest(upcycled, expansion))
        plan.save(folder / PLAN_FILE)
        Imported(
            run=expansion.run,
            checkpoint=expansion.checkpoint,
            has_classifiers=expansion.has_classifiers,
            extends_tokenizer=extends,
        ).save(folder / IMPORTED_FILE)
    return expansion


def _manifest(upcycled: Path, expansion: Expansion) -> UpcycledManifest:
    changes = {"files": files_of(upcycled), "selection_biases": expansion.selection_biases}
    return expansion.upcycled.model_copy(update=changes)


def _verify(source: Path, expansion: Expansion) -> None:
    for name, entry in expansion.files.items():
        path = source / name
        if not path.is_file() or path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256:
            raise UserError(f"import: {path} is damaged or missing; copy or export it again")
