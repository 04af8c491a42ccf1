"""The model hub: a folder of files, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def hub_folder(hub_id: str, patterns: Sequence[str], *, online: bool = True) -> Path | str:
    """Return the local snapshot of a hub repository, downloading what is not cached.

    Args:
        hub_id: for example ``state-spaces/mamba-130m-hf``.
        patterns: which files, with shell wildcards.
        online: may ask the hub; else only its cache on this machine is read.

    Returns:
        The folder, or one line that says why it cannot be had.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns), local_files_only=not online)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    return Path(folder)
