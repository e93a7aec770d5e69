"""Why a model of transformers cannot be loaded; imports no model library itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from cim.errors import CimError


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Say in one CimError why a model cannot be loaded."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, TypeError, SafetensorError) as error:
        raise CimError(f"{model} could not be loaded: {_why_not_loaded(error)}") from None


def _why_not_loaded(error: BaseException) -> str:
    """What is wrong and how to fix it, from the hub's errors behind those of transformers."""
    from huggingface_hub import errors as hub

    causes, cause = [], error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    reasons = {
        hub.GatedRepoError: "it is gated; accept its terms on its hub page, then log in with 'hf auth login'",
        hub.RevisionNotFoundError: "the hub has no such revision of it; fix model.revision",
        hub.RepositoryNotFoundError: "the hub has no such model, or it is private; fix model.name or log in",
        hub.LocalEntryNotFoundError: "no such folder, not in the hub's cache, and the hub cannot be reached",
        hub.OfflineModeIsEnabled: "no such folder, not in the hub's cache, and HF_HUB_OFFLINE forbids downloads",
    }
    for kind, reason in reasons.items():
        if any(isinstance(cause, kind) for cause in causes):
            return reason
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it needs code from the hub; read that code, then set model.trust_remote_code=true"
    return text[:200]
