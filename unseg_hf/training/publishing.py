"""A finished generator in its folder, with its model card, and on the Hugging Face Hub."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import pipeline
from transformers.dynamic_module_utils import get_relative_import_files

from ..modeling_unseg import UnSegModel
from ..processing_unseg import UnSegProcessor

PLACEHOLDER = re.compile(r"\{(\w+)\}")
NEEDED = ("model.safetensors", "processor_config.json", "config.json")
CODE = "pipeline_unseg.py"  # imports the rest of the model's code


class HubError(RuntimeError):
    """The Hub cannot be reached, or refuses."""


def fill_model_card(template: str, **sections: str) -> str:
    """The model card that `template` becomes when each `{placeholder}` is replaced by the section of that name.

    Args:
        template: the text of `model_card.md`, or of another card with a YAML front matter.
        sections: Markdown for each placeholder, as it is: braces in it are text.

    Raises:
        ValueError: a placeholder without a section, a section without a placeholder, or a front matter that the Hub
            would refuse.
    """
    wanted = set(PLACEHOLDER.findall(template))
    if missing := sorted(wanted - sections.keys()):
        raise ValueError(f"no text for {{{'}, {'.join(missing)}}} of the model card: pass {'=, '.join(missing)}=")
    if unknown := sorted(sections.keys() - wanted):
        raise ValueError(
            f"the model card has no {{{'}, {'.join(unknown)}}}: its placeholders are {{{'}, {'.join(sorted(wanted))}}}"
        )
    card = PLACEHOLDER.sub(lambda match: sections[match[1]], template)
    try:
        front_matter = ModelCard(card).data.to_dict()
    except Exception as error:  # of the YAML parser, or ModelCard's own
        raise ValueError(f"the front matter of the model card is no YAML mapping: {error}") from error
    if not front_matter:
        raise ValueError("the model card has no front matter: begin it with ---, YAML that names the license, and ---")
    return card


def save_generator(
    generator: UnSegModel,
    processor: UnSegProcessor,
    folder: str | os.PathLike,
    card: str | None = None,
    with_code: bool = True,
) -> list[str]:
    """Write a generator into a folder, from which `from_pretrained`, `pipeline` and [`push_generator`] take it.

    All files are written elsewhere in the folder first, then each takes its name in one step: whenever this is
    interrupted, no file is half written, and a new folder has a `config.json` only if the other files are there too.
    What else is in the folder stays. Neither the mode (training or evaluation) nor the device of `generator` changes.

    Args:
        generator: the generator, not wrapped (`accelerator.unwrap_model`).
        processor: its processor.
        folder: created if need be.
        card: text of `README.md`; none: the file is left as it is.
        with_code: write the model's code too, so that `trust_remote_code=True` works where this package is not
            installed.

    Returns:
        The names of the files written.

    Raises:
        OSError: the folder cannot be written; files that were in it are whole.
    """
    folder = Path(folder)
    # Inside the folder: beside it could be another file system, from which nothing can be renamed into it.
    partial = folder / ".generator.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    training = generator.training
    try:
        # Through the pipeline, which adds its own code and its name in the configuration. It would choose a device
        # itself and puts the generator into evaluation mode.
        pipeline("image-protection", model=generator, processor=processor, device=generator.device).save_pretrained(
            partial
        )
        if not with_code:
            _remove_code(partial)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        names = sorted((path.name for path in partial.iterdir()), key=lambda name: (name == "config.json", name))
        for name in names:
            # safetensors keeps its files from other users, whatever the umask says.
            shutil.copymode(partial / "config.json", partial / name)
            os.replace(partial / name, folder / name)
    finally:
        generator.train(training)
        shutil.rmtree(partial, ignore_errors=True)
    return names


def _remove_code(folder: Path) -> None:
    """What the Auto classes find code by goes too: without the code it would be an error."""
    for module in folder.glob("*.py"):
        module.unlink()
    for name in ("config.json", "processor_config.json"):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        for part in (values, *(value for value in values.values() if isinstance(value, dict))):
            part.pop("auto_map", None)
            part.pop("custom_pipelines", None)
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_hub(model_id: str, token: str | None = None) -> str:
    """Ask the Hub, before hours of training, whether [`push_generator`] will be allowed to push; one request.

    Args:
        model_id: `"namespace/name"`, or `"name"` for a repository of the user's own.
        token: a Hub token; by default HF_TOKEN or that of `hf auth login`.

    Returns:
        The whole id, `"namespace/name"`.

    Raises:
        ValueError: an id of another form, no token, a token that may only read, or a namespace that is not the
            token's; what to do about it is said.
        HubError: the Hub cannot be reached or refuses the token.
    """
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        raise ValueError(f"{model_id!r} is no model id: pass NAME or NAMESPACE/NAME ({error})") from error
    api = HfApi(token=token)
    try:
        user = api.whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(
            f"no token to push to {model_id} with: log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except Exception as error:  # of any of the client's layers
        raise HubError(f"could not ask {api.endpoint} about pushing to {model_id}: {reason(error)}") from error
    access = (user.get("auth") or {}).get("accessToken") or {}  # not there for some kinds of token
    if access.get("role") == "read":
        raise ValueError(
            f"the token of {user['name']} may only read, so it cannot push to {model_id}: log in with `hf auth login` "
            "or set HF_TOKEN, with a token that may write"
        )
    namespace, _, name = model_id.rpartition("/")
    own = [user["name"], *(organization["name"] for organization in user.get("orgs") or [])]
    if namespace and namespace.lower() not in map(str.lower, own):
        raise ValueError(f"{user['name']} cannot push to {model_id}: its namespace must be {' or '.join(own)}")
    return f"{namespace or user['name']}/{name}"


def push_generator(
    folder: str | os.PathLike,
    model_id: str,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload UnSeg generator",
) -> str:
    """Upload what [`save_generator`] wrote, and nothing else in the folder, in one commit.

    Args:
        folder: the generator's folder.
        model_id: `"namespace/name"`, or `"name"` for a repository of the user's own; created if need be.
        private: whether a new repository is private; one that exists stays as it is.
        token: a Hub token; by default HF_TOKEN or that of `hf auth login`.
        commit_message: first line of the commit.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the folder has no generator.
        HubError: the Hub cannot be reached or refuses; names the reason, and the command that pushes later.
    """
    folder = Path(folder)
    names = _published(folder)
    api = HfApi(token=token)
    try:
        repository = api.create_repo(model_id, private=private, exist_ok=True)
        # Not upload_folder, which may split a push into several commits.
        files = [CommitOperationAdd(name, folder / name) for name in names]
        api.create_commit(repository.repo_id, files, commit_message=commit_message)
    except Exception as error:  # of any of the client's layers: HTTP, Xet, validation of the card
        again = f"{json.dumps(str(folder))}, {json.dumps(model_id)}{', private=True' if private else ''}"
        code = f"from {__name__} import push_generator; push_generator({again})"
        raise HubError(
            f"could not push to {model_id} at {api.endpoint}: {reason(error)}. "
            f"The generator is safe in {folder}; push it later with: python -c {shlex.quote(code)}"
        ) from error
    return str(repository)


def _published(folder: Path) -> list[str]:
    """The names of the generator's files among whatever a folder holds."""
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {', '.join(missing)}: save_generator first, or choose another folder")
    names = [*NEEDED, *(["README.md"] if (folder / "README.md").is_file() else [])]
    if "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        names += [CODE, *sorted({Path(path).name for path in get_relative_import_files(folder / CODE)})]
    return names


def reason(error: Exception) -> str:
    """One line on an error of the Hub's client, with what to do where that is known."""
    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client says which file, its cause says why
    response = getattr(error, "response", None)
    if response is None:
        return " ".join([f"{type(error).__name__}:", *str(error).split()])
    said = " ".join((getattr(error, "server_message", None) or response.reason_phrase).split())
    fixes = {
        401: " (log in with `hf auth login`, or set HF_TOKEN to a valid token)",
        403: " (is the token allowed to write there?)",
    }
    return f"{response.status_code} {said}{fixes.get(response.status_code, '')}"
