"""Repositories of the Hugging Face hub, through the hub's own cache."""

from __future__ import annotations

import json
from pathlib import Path

from kvcompile.ir.errors import ModelError
from kvcompile.models.cache import Progress

_SMALL = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt", "spiece.model")
_WEIGHTS = ("*.safetensors",)
_LAST_RESORT = ("pytorch_model*.bin",)


def snapshot(name: str, *, weights: bool, where: str, progress: Progress) -> Path:
    """The local folder of `owner/name`, downloaded as far as it is not there.

    weights False: config and tokenizer only.  Raises ModelError where the hub cannot be reached or has no such model.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    except ImportError as error:
        what = f"{name} is on the Hugging Face hub, whose client is missing."
        raise ModelError.at(where, what, "pip install 'kvcompile[compile]'") from error

    patterns = [*_SMALL, *_WEIGHTS] if weights else [*_SMALL]
    try:
        folder = _local(name, weights)
        if folder is None:
            progress(f"fetching {name} from the Hugging Face hub{'' if weights else ' (config and tokenizer)'}")
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            if weights and not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(name, allow_patterns=[*patterns, *_LAST_RESORT]))
    except GatedRepoError as error:
        mend = "Accept the model's terms on its page, then run `hf auth login`."
        raise ModelError.at(where, f"the hub does not give out {name} without a log-in.", mend) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        mend = "Check the spelling (owner/name), or name a folder or a .gguf file; a path to a folder may start with ./"
        raise ModelError.at(where, f"there is no folder {name!r} here, and the hub has no such model.", mend) from error
    except (OSError, ValueError, RuntimeError) as error:  # no network, offline mode, a time-out, a full disk
        mend = f"Go online and run `hf download {name}` once, or name a folder or a .gguf file that is here."
        raise ModelError.at(
            where, f"there is no folder {name!r} here, and the hub could not be reached ({type(error).__name__}).", mend
        ) from error
    return folder


def _local(name: str, weights: bool) -> Path | None:
    """The snapshot that the hub's cache holds, None if it lacks what is wanted."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    if not (folder / "config.json").is_file():
        return None
    shards = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return folder if not weights or _complete(folder, shards) else None


def _complete(folder: Path, shards: list[Path]) -> bool:
    for index in folder.glob("*.index.json"):
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return wanted <= {shard.name for shard in shards}
    return bool(shards)
