"""Checkpoints by name from Hugging Face: `hf_hub:timm/resnet50.a1_in1k`, as timm writes them, through huggingface_hub.

The library's cache, environment variables and offline mode (HF_HUB_OFFLINE) hold as they do for it.
"""

import pathlib
import re

from interop.files import shards
from interop.files.disk import CheckpointError

_NAME = re.compile(r"hf[_-]hub:(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_name(path: str) -> bool:
    """Whether this is a name for the hub."""
    return path.startswith(("hf_hub:", "hf-hub:"))


def fetch(name: str) -> pathlib.Path:
    """The file of that name, `hf_hub:owner/model[@revision][/file]`, in the local cache, fetched if it is not there.

    Without a file, the first of model.safetensors, its index, pytorch_model.bin and its index that the repository has.
    Raises CheckpointError if huggingface_hub is not installed, and for what it cannot find or reach.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(name, "is not of the form hf_hub:owner/model[@revision][/file]")
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise CheckpointError(name, "needs huggingface_hub: pip install huggingface_hub") from None

    def download(file: str) -> pathlib.Path:
        return pathlib.Path(huggingface_hub.hf_hub_download(match["repo"], file, revision=match["revision"]))

    files = (match["file"],) if match["file"] else _FILES
    failure: Exception | None = None
    try:
        for file in files:
            try:
                path = download(file)
            except EntryNotFoundError as error:  # not in the repository, or offline and not in the cache
                failure = failure or error
                continue
            if file.endswith(shards.SUFFIX):
                for shard in sorted(set(shards.read_index(path)["weight_map"].values())):
                    download(shard)
            return path
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # huggingface_hub's errors: HTTP, names, what is not there
        failure = error
    reason = str(failure).strip().partition("\n")[0]
    raise CheckpointError(name, f"none of {', '.join(files)} could be had: {reason}")
