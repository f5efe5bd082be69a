"""Starting weights of a backbone, by name or path; every way ends in one .safetensors file, and no pickle is opened.

| `model.weights` | what is read |
|---|---|
| `timm` | the weights that timm names for `model.backbone`, from the Hugging Face hub |
| `hf-hub:OWNER/NAME`, `hf-hub:OWNER/NAME@REVISION` | `config.json` and `model.safetensors` of a timm model on the hub |
| a folder | the same two files on this machine, as timm's `save_for_hf` and `git clone` of a hub's model leave them |
| `FILE.safetensors`, also `s3://` | a state dict of the backbone, or a model file that `trainer.export` wrote |

Only the configuration names such a place. A model folder names its backbone by timm's name and brings its own weights:
nobody else's file decides what is asked for.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cluster.errors import UserError
from trainer.config import HUB

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); d = d.get('state_dict', d.get('model', d)); "
    "save_file({k.removeprefix('module.'): v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, "
    "sys.argv[2])"
)


def load_backbone(backbone: nn.Module, name: str, weights: str) -> None:
    """Fill a headless timm backbone; what is in the weights of a classifier of their own is passed over.

    Args:
        backbone: Made by timm under `name`.
        name: `model.backbone`.
        weights: `model.weights`, see the module.

    Raises:
        UserError: The weights are not there or unreadable, or of another network: a tensor is missing, has another
            shape, or has no place.
    """
    file = _file(name, weights)
    tensors = _read(file)
    if any(key.startswith("backbone.") for key in tensors):
        tensors = {
            key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")
        }
    tensors = _as_timm_has_them(tensors, backbone, name, weights)
    wanted = backbone.state_dict()
    for key, own in wanted.items():
        if key not in tensors:
            if key.endswith("num_batches_tracked"):  # a counter that old files lack and that nothing here reads
                tensors[key] = own
                continue
            raise UserError(
                f"weights {weights} lack tensor {key} of backbone {name}; give the file of this backbone, or set "
                f"model.backbone to the network that the file was made for"
            )
        if tensors[key].shape != own.shape:
            raise UserError(
                f"weights {weights}: tensor {key} has shape {list(tensors[key].shape)}, backbone {name} needs "
                f"{list(own.shape)}; set model.backbone to the network that the file was made for"
            )
    heads = _classifier_prefixes(name)
    strays = [key for key in tensors if key not in wanted and not key.startswith(heads)]
    if strays:  # a deeper sister network holds every tensor of this one: that is a mix-up, not a match
        raise UserError(
            f"weights {weights} hold tensor {strays[0]} that backbone {name} has no place for; set model.backbone to "
            f"the network that the file was made for"
        )
    backbone.load_state_dict({key: tensors[key] for key in wanted})


def conversion_command(pickle: str) -> str:
    """The command that makes a .safetensors file of a PyTorch checkpoint, for whoever trusts its author.

    It opens the checkpoint with PyTorch's restricted unpickler, and looks for the tensors where training scripts leave
    them: at the top, under `state_dict` or under `model`, with or without DistributedDataParallel's prefix.
    """
    name = pickle.rpartition("/")[2] if "://" in pickle else pickle
    target = str(Path(name).with_suffix(".safetensors"))
    return f'python -c "{_CONVERT}" {shlex.quote(name)} {shlex.quote(target)}'


def _file(name: str, weights: str) -> str:
    """Path or URI of the .safetensors file that is meant."""
    if weights == "timm":
        return _timms_own(name)
    if weights.startswith(HUB):
        repository = weights.removeprefix(HUB)
        _check_config(_from_hub(repository, CONFIG_FILE, weights), name, weights)
        return str(_from_hub(repository, WEIGHTS_FILE, weights))
    if "://" not in weights and Path(weights).is_dir():
        return _in_folder(Path(weights), name, weights)
    if weights.endswith(".safetensors"):
        return weights
    if weights.endswith(PICKLES):
        raise UserError(
            f"model.weights = {weights!r} must be a .safetensors file, since pickles are never loaded: they can run "
            f"code; if you trust whoever made it, convert it once: {conversion_command(weights)}"
        )
    raise UserError(
        f"model.weights = {weights!r} must be a .safetensors file, a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, "
        f"'{HUB}OWNER/NAME', 'timm' or null; there is no such folder, and pickles are never loaded"
    )


def _timms_own(name: str) -> str:
    import timm

    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise UserError(
            f"model.weights = 'timm': timm has no weights for {name!r}; give the path of a .safetensors file, or null"
        )
    if not known.hf_hub_id:
        raise UserError(
            f"model.weights = 'timm': timm's weights of {name!r} are a pickle ({known.url}), and pickles are never "
            f"loaded; if you trust whoever made it, download and convert it: {conversion_command(str(known.url))}"
        )
    return str(_from_hub(known.hf_hub_id, WEIGHTS_FILE, name))


def _from_hub(repository: str, file: str, weights: str) -> Path:
    """A file of a model on the hub, in its own cache on this machine."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    identity, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(identity, file, revision=revision or None))
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(
                f"model.weights: {identity} on the hub holds no {file}; choose a model of timm's with safetensors, "
                f"pickles are never loaded"
            ) from None
        raise UserError(
            f"model.weights: the weights of {weights!r} could not be downloaded ({one_line(error)}); on a machine "
            f"without network give the path of a .safetensors file or of a folder instead"
        ) from error


def _in_folder(folder: Path, name: str, weights: str) -> str:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
        hint = f"; pickles are never loaded: convert it once: {conversion_command(str(pickles[0]))}" if pickles else ""
        raise UserError(f"model.weights = {weights!r}: the folder holds no {WEIGHTS_FILE}{hint}")
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"model.weights = {weights!r}: the folder holds no {CONFIG_FILE} that names its network; give {file} itself"
        )
    _check_config(folder / CONFIG_FILE, name, weights)
    return str(file)


def _check_config(path: Path, name: str, weights: str) -> None:
    """Whether a hub's `config.json` describes the configured backbone."""
    try:
        config = json.loads(path.read_bytes())
        architecture = config.get("architecture")
        library = "transformers" if "architectures" in config else "another library"
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"model.weights = {weights!r}: {CONFIG_FILE} is no JSON object; get the model again") from None
    if not isinstance(architecture, str):
        raise UserError(
            f"model.weights = {weights!r}: {CONFIG_FILE} names no architecture of timm's, the model is made for "
            f"{library}; choose one of timm's (on the hub: library timm)"
        )
    if architecture != name.partition(".")[0]:
        raise UserError(
            f"model.weights = {weights!r} are of {architecture!r} and model.backbone = {name!r}; "
            f"set model.backbone={architecture}"
        )
    # Image size follows data.image_px; whatever else changes the network would be lost without a word.
    changed = sorted(set(config.get("model_args") or {}) - {"img_size"})
    if changed:
        raise UserError(
            f"model.weights = {weights!r} are of a {architecture!r} built with another {', '.join(changed)}, which "
            f"model.backbone cannot say; choose a model without model_args in its {CONFIG_FILE}"
        )


def _read(file: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        if "://" in file:
            from cluster.storage import open_storage

            folder, _, name = file.rpartition("/")
            return load(open_storage(folder).read(name))
        if not Path(file).is_file():
            raise UserError(f"model.weights = {file!r} does not exist; give the path of a .safetensors file")
        return load_file(file)
    except SafetensorError as error:
        raise UserError(
            f"model.weights = {file!r} is damaged or no safetensors file ({error}); copy it again"
        ) from None


def _as_timm_has_them(tensors: dict[str, Tensor], backbone: nn.Module, name: str, weights: str) -> dict[str, Tensor]:
    """Tensors under today's names, and position tables of transformers fitted to the image size, by timm's own code."""
    convert: Any = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        return convert(tensors, backbone)
    except (KeyError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(
            f"weights {weights} do not fit backbone {name} ({one_line(error)}); set model.backbone to the network "
            f"that the file was made for"
        ) from None


def _classifier_prefixes(name: str) -> tuple[str, ...]:
    """How the names of the classifier's tensors begin in a full network of this kind."""
    import timm

    known = timm.get_pretrained_cfg(name)
    names: Any = known.classifier if known is not None else None  # timm: a string, a tuple of them, or nothing
    names = (names,) if isinstance(names, str) else names or ("classifier", "fc", "head")
    return tuple(f"{name}." for name in names)


def one_line(error: Exception) -> str:
    """What an exception says, fit for a sentence of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__
