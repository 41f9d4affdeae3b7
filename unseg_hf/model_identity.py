"""Which generator it was: a name that stays the same as long as its weights and settings do."""

import hashlib
import os
from pathlib import Path

from .image_files import one_line, sha256_of
from .protection import check_model_name, default_checkpoint


def checkpoint_digest(folder: str | os.PathLike) -> str:
    """sha256, in hex, over the names and contents of a checkpoint's configuration, processor and weights files.

    What decides the noise, or a victim's figures, counts, and not the card or the code beside it.

    Raises:
        FileNotFoundError: no such folder, or none of these files in it.
    """
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .json, .safetensors or .bin files: it is no checkpoint")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + bytes.fromhex(sha256_of(file)))
    return digest.hexdigest()


def hub_revision(model_id: str, revision: str | None = None) -> str:
    """The commit that a revision of a model of the Hub is now, or, without the Hub, was when it was last fetched.

    Raises:
        ValueError: the Hub does not know the model, or cannot be reached and the model was never fetched.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    check_model_name(model_id)
    try:
        return HfApi().model_info(model_id, revision=revision).sha
    except Exception as error:  # of any of the client's layers
        cached = None
        if not os.path.exists(model_id):
            cached = try_to_load_from_cache(model_id, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
        reason = one_line(error)
        raise ValueError(f"{model_id}: no such folder, and as a Hub id: {reason}") from error


def model_identity(model: str | os.PathLike | None, revision: str | None = None) -> tuple[str, str | None]:
    """What a generator is known by, and the revision to load it with.

    Args:
        model: folder, Hub id, or None for the embedded generator.
        revision: of a Hub id: branch, tag or commit.

    Returns:
        [`checkpoint_digest`] and None for a folder; `"id@commit"` and the commit for a Hub id.

    Raises:
        FileNotFoundError: a folder without a checkpoint.
        ValueError: a Hub id that leads nowhere.
    """
    folder = default_checkpoint() if model is None else Path(model)
    if folder.is_dir():
        return checkpoint_digest(folder), None
    commit = hub_revision(str(model), revision)
    return f"{model}@{commit}", commit
