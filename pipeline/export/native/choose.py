"""Which native form a mixture is exported in."""

from common.errors import UserError
from pipeline.export.native.ernie import Ernie
from pipeline.export.native.form import NativeForm
from pipeline.export.native.mixtral import Mixtral
from pipeline.export.native.mixture import Mixture
from pipeline.export.native.qwen_moe import Qwen2Moe, Qwen3Moe

AUTO = "auto"
FORMS: tuple[NativeForm, ...] = (Mixtral(), Qwen2Moe(), Qwen3Moe(), Ernie())  # from the one that adds least


def choose_form(wanted: str, mixture: Mixture) -> NativeForm:
    """The form of that name, or for ``auto`` the first that says the mixture exactly.

    Raises:
        UserError: it can't say the mixture, or none can.
    """
    fix = "leave --native out, and the folder carries its own code"
    if wanted != AUTO:
        form = next(form for form in FORMS if form.name == wanted)
        reason = form.why_not(mixture)
        if reason is not None:
            raise UserError(f"export --native {wanted}: can't say this mixture: {reason}; use auto, or {fix}")
        return form
    candidates = [form for form in FORMS if mixture.family in form.families]
    if not candidates:
        raise UserError(
            f"export --native: no mixture of experts in transformers computes layers as {mixture.family} does; {fix}"
        )
    reasons = {form.name: form.why_not(mixture) for form in candidates}
    found = next((form for form in candidates if reasons[form.name] is None), None)
    if found is None:
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UserError(f"export --native auto: no architecture says this mixture exactly ({said}); {fix}")
    return found
