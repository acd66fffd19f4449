"""``save_pretrained`` and ``from_pretrained``: a model as a self-contained folder.

The folder has ``config.json`` (class, package, versions and constructor arguments), ``model.safetensors``,
``manifest.json``, and ``tokenizer/`` on request. The arguments are recorded when the constructor is called, by a
wrapper that ``__init_subclass__`` puts around it, so a model class only has to inherit ``PretrainedMixin``.

State that methods add after construction (adapters, extra heads) goes through ``config_state`` and
``apply_config_state``; further files (image preprocessing) through ``write_assets`` and ``read_assets``.
"""

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lm_core.checkpoints.atomic_io import fsync_tree, new_directory, real_path
from lm_core.checkpoints.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    CheckpointError,
    check_format,
    read_json,
    read_manifest,
    verify_manifest,
    write_json,
    write_manifest,
)
from lm_core.checkpoints.module_specs import (
    check_values,
    decode_argument,
    encode_argument,
    is_given,
    package_of,
    register,
    version_of,
)
from lm_core.checkpoints.weights import load_weights, read_weights, save_weights, unwrapped
from lm_core.checks import typed
from lm_core.tokenizers import HUB_ID, Tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FOLDER = "tokenizer"

M = TypeVar("M", bound="PretrainedMixin")


def _recording(constructor: Callable[..., None]) -> Callable[..., None]:
    """Wraps a constructor to record the arguments of the outermost call in JSON."""
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_recorded_arguments" not in self.__dict__:
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError:
                pass  # the constructor itself raises the error to show
            else:
                # nn.Module's __setattr__ works only after its constructor has run
                encoded = _encode_arguments(signature, bound)
                local = type(self).local_arguments
                self.__dict__["_recorded_arguments"] = {
                    name: entry for name, entry in encoded.items() if name not in local
                }
        constructor(self, *args, **kwargs)

    return init


def _encode_arguments(signature: inspect.Signature, bound: inspect.BoundArguments) -> dict[str, Any]:
    bound.apply_defaults()
    encoded: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:  # without self
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            encoded |= {key: encode_argument(entry) for key, entry in value.items()}
        elif parameter.kind is parameter.VAR_POSITIONAL:
            encoded |= {name: {"$given": "positional arguments"}} if value else {}
        else:
            entry = encode_argument(value)
            if not (is_given(entry) and value is parameter.default):
                encoded[name] = entry
    return encoded


class PretrainedMixin(nn.Module):
    """Adds ``config``, ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` to a module.

    Attributes:
        local_arguments: constructor arguments that name places on this machine, such as a folder for a memory: they are
            neither stored nor taken from a file.
    """

    local_arguments: ClassVar[frozenset[str]] = frozenset()
    _recorded_arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register(cls)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    @property
    def config(self) -> dict[str, Any]:
        """Content of ``config.json``: class, package, versions, constructor arguments in JSON, and further state."""
        return self.pretrained_config()

    def pretrained_config(self) -> dict[str, Any]:
        """The content of ``config``; ``$`` tags are explained in ``lm_core.checkpoints.module_specs``."""
        cls = type(self)
        package = package_of(cls)
        config = {
            "format_version": FORMAT_VERSION,
            "package": package,
            "package_version": version_of(package),
            "class": cls.__name__,
            "arguments": dict(self.__dict__.get("_recorded_arguments", {})),
        }
        state = self.config_state()
        return {**config, "state": state} if state else config

    def config_state(self) -> dict[str, Any]:
        """Changes that methods made to the model's structure after construction, in JSON; a subclass overrides it."""
        return {}

    def apply_config_state(self, state: dict[str, Any]) -> None:
        """Applies the changes of ``config_state`` to a newly constructed model; a subclass overrides both."""
        if state:
            raise CheckpointError(f"{type(self).__name__} has no use for the stored state {sorted(state)}")

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        """Rejects constructor arguments of a file that would exhaust memory or time, before anything is built.

        By default no number may exceed 2^40 and no model have more than 1,000 layers; a subclass adds its own bounds.

        Args:
            arguments: constructor arguments by name, as they are stored.

        Raises:
            CheckpointError: an argument is out of bounds; the message names it.
        """
        check_values(dict(arguments), "arguments")

    def upgrade_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stored weights under their current names; a subclass overrides it to read those of earlier versions."""
        return state

    def write_assets(self, directory: Path) -> None:
        """Writes further files of the model into a checkpoint; a subclass overrides it."""

    def read_assets(self, directory: Path) -> None:
        """Reads the files of ``write_assets``; a subclass overrides both."""

    @classmethod
    def from_config(cls: type[M], config: Mapping[str, Any], **overrides: Any) -> M:
        """A model of the stored structure with fresh weights.

        Args:
            config: value of the property ``config``.
            overrides: constructor arguments to replace; those that could not be stored are required.

        Raises:
            CheckpointError: the configuration has another class or format, or is damaged.
            ValueError: an argument that could not be stored is missing.
            TypeError: the constructor has no such argument.
        """
        check_config(cls, config)
        arguments = config["arguments"]
        not_stored = {name: value["$given"] for name, value in arguments.items() if is_given(value)}
        missing = [f"{name} (a {kind})" for name, kind in not_stored.items() if name not in overrides]
        if missing:
            raise ValueError(f"{cls.__name__} cannot be rebuilt alone, pass again as argument: {', '.join(missing)}")
        parameters = inspect.signature(cls).parameters
        unknown = sorted(set(overrides) - set(parameters))
        if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            raise TypeError(f"{cls.__name__} has no argument {', '.join(unknown)}; it has {', '.join(parameters)}")
        stored = {name: value for name, value in arguments.items() if name not in {*overrides, *cls.local_arguments}}
        cls.check_arguments(stored)
        foreign = sorted(set(stored) - set(parameters))
        if foreign and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            raise CheckpointError(f"{CONFIG_FILE} has arguments that {cls.__name__} lacks: {', '.join(foreign)}")
        decoded = {}
        for name, value in stored.items():
            try:
                decoded[name] = decode_argument(value)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{CONFIG_FILE} has a wrong value for {name}: {error}") from error
        with torch.random.fork_rng(devices=[]):  # the initial weights are discarded
            try:
                model = cls(**{**decoded, **overrides})
            except (TypeError, ValueError) as error:
                if overrides:
                    raise
                raise CheckpointError(f"{CONFIG_FILE} has arguments that {cls.__name__} refuses: {error}") from error
        state = config.get("state", {})
        check_values(state, "state")
        try:
            model.apply_config_state(state)
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{CONFIG_FILE} has a wrong state for {cls.__name__}: {error!r}") from error
        return model

    @typed
    def save_pretrained(self, directory: str | Path, overwrite: bool = False, tokenizer: Any = None) -> Path:
        """Writes the model into a folder.

        Args:
            directory: a new or empty folder (a link or a mount point stays one); with ``overwrite`` any folder, in
                which only the files of a checkpoint are replaced. A new folder is written atomically; files in a folder
                that exists are covered by a manifest that is written last, so loading detects a kill midway.
            overwrite: True allows a folder with content.
            tokenizer: tokenizer with ``save_pretrained``, stored in ``tokenizer/``.

        Returns:
            The folder.

        Raises:
            FileExistsError: the folder has content and ``overwrite`` is False, or the path is a file.
            TypeError: the tokenizer cannot be saved.
            OSError: the disk is full or the folder cannot be written.
        """
        target = real_path(directory)
        check_tokenizer(tokenizer)
        if target.exists() and not target.is_dir():
            raise FileExistsError(f"directory must be a folder, got the file {target}")
        if not target.is_dir() or not any(target.iterdir()):
            with new_directory(target) as temporary:
                write_model(temporary, self, tokenizer=tokenizer)
                write_manifest(temporary)
            return target
        if not overwrite:
            raise FileExistsError(f"directory must be new or empty unless overwrite=True, got {target}")
        with tempfile.TemporaryDirectory(dir=target, prefix=".tmp-") as name:
            temporary = Path(name)
            write_model(temporary, self, tokenizer=tokenizer)
            write_manifest(temporary)
            fsync_tree(temporary)
            _replace_files(temporary, target)
        fsync_tree(target)
        return target

    @classmethod
    def from_pretrained(cls: type[M], source: str | Path, *, revision: str | None = None, **overrides: Any) -> M:
        """A model from a folder, or from ``organisation/name`` on the hub; in the stored dtypes and on the CPU.

        Args:
            source: the folder (of ``save_pretrained``, or one ``step-N`` of a training run), or a hub name.
            revision: branch, tag or commit on the hub.
            overrides: constructor arguments to replace. A module among them receives the checkpoint's weights.

        Raises:
            FileNotFoundError: ``source`` is neither a folder nor a hub name.
            CheckpointError: the checkpoint is damaged, of another class, or does not fit.
            ValueError: an argument that could not be stored is missing.
            TypeError: the constructor has no such argument.
            ImportError: ``source`` is a hub name and the extra ``hub`` is not installed.
        """
        folder = _folder_of(source, revision)
        manifest = verify_manifest(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if name not in manifest["files"]:
                raise CheckpointError(f"{folder} is no checkpoint of a model: its manifest does not name {name}")
        config = read_json(folder / CONFIG_FILE)
        check_config(cls, config, folder / CONFIG_FILE)
        state = read_weights(folder / WEIGHTS_FILE)
        _check_sizes(cls, config, overrides, state, str(folder))
        model = cls.from_config(config, **overrides)
        load_weights(model, state, dtypes="stored", where=str(folder))
        model.read_assets(folder)
        return model

    @typed
    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: Any = None,
        private: bool = False,
        revision: str | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Uploads the folder of ``save_pretrained`` to the Hugging Face hub.

        Args:
            repo_id: ``organisation/name``, created if it does not exist.
            tokenizer: tokenizer to store with the model.
            private: True makes a new repository private.
            revision: branch to commit to.
            commit_message: message of the commit.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: ``repo_id`` is not of the form ``organisation/name``.
            ImportError: the extra ``hub`` is not installed.
        """
        if not HUB_ID.fullmatch(repo_id):
            raise ValueError(f"repo_id must be organisation/name, got {repo_id!r}")
        hub = _hub()
        with tempfile.TemporaryDirectory() as name:
            folder = self.save_pretrained(Path(name) / "model", tokenizer=tokenizer)
            api = hub.HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(
                api.upload_folder(
                    repo_id=repo_id, folder_path=str(folder), revision=revision, commit_message=commit_message
                )
            )


def _check_sizes(
    cls: type[PretrainedMixin], config: Mapping[str, Any], overrides: Mapping[str, Any], state: Any, where: str
) -> None:
    """Compares the weights of a file with the model that its configuration describes, before that takes memory.

    Raises:
        CheckpointError: the configuration describes more than four times the numbers that the file holds.
    """
    if any(isinstance(value, nn.Module) for value in overrides.values()):
        return
    try:
        with torch.device("meta"):
            skeleton = cls.from_config(config, **overrides)
    except (NotImplementedError, RuntimeError) as error:
        if "overflow" in str(error):
            raise CheckpointError(f"{where} describes a {cls.__name__} beyond any memory: {error}") from error
        return  # a constructor that reads values of tensors
    described = sum(parameter.numel() for parameter in skeleton.parameters())
    stored = sum(tensor.numel() for tensor in state.values())
    if described > 4 * stored + 2**20:
        raise CheckpointError(f"{where} describes a {cls.__name__} of {described:,} weights and holds {stored:,}")


def check_config(cls: type, config: Mapping[str, Any], where: Path | None = None) -> None:
    """Raises ``CheckpointError`` unless ``config`` belongs to ``cls`` and has a readable format."""
    path = Path(CONFIG_FILE) if where is None else where
    check_format(config.get("format_version"), path)
    stored, expected = (config.get("package"), config.get("class")), (package_of(cls), cls.__name__)
    if stored != expected:
        raise CheckpointError(
            f"{path} is of a {stored[1]} ({stored[0]}), it cannot be loaded as {expected[1]} ({expected[0]})"
        )
    if not isinstance(config.get("arguments"), dict) or not isinstance(config.get("state", {}), dict):
        raise CheckpointError(f"{path} is damaged: it has no constructor arguments")


def check_tokenizer(tokenizer: Any) -> None:
    """Raises ``TypeError`` for a tokenizer that cannot be stored with a checkpoint."""
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise TypeError(f"tokenizer must have save_pretrained(directory), got {type(tokenizer).__name__}")


def check_vocabulary(tokenizer: Any, num_tokens: int) -> None:
    """Rejects a tokenizer that does not fit a model of ``num_tokens`` tokens, or cannot be saved with it.

    Raises:
        TypeError: the tokenizer lacks a member of ``lm_core.tokenizers.Tokenizer``, or cannot be saved.
        ValueError: it has more tokens than the model.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"tokenizer must have encode, decode, vocab_size, eos_id and pad_id, got {tokenizer!r}")
    check_tokenizer(tokenizer)
    if tokenizer.vocab_size > num_tokens:
        raise ValueError(
            f"model must have num_tokens >= {tokenizer.vocab_size}, the tokenizer's vocab_size, got {num_tokens}"
        )


def write_model(
    directory: Path,
    model: nn.Module | Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Writes configuration, weights, assets and tokenizer of a model into an existing folder, without a manifest.

    Args:
        directory: the folder.
        model: a model, or its state dict.
        config: content of ``config.json``; by default the model's own if it is a ``PretrainedMixin``.
        tokenizer: tokenizer with ``save_pretrained``.
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    if isinstance(model, PretrainedMixin):
        config = model.pretrained_config() if config is None else config
        model.write_assets(directory)
    if config is not None:
        write_json(directory / CONFIG_FILE, config)
    save_weights(directory / WEIGHTS_FILE, model)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory / TOKENIZER_FOLDER)


def _replace_files(source: Path, target: Path) -> None:
    """Moves a checkpoint's files over those of the one in ``target``; after an error the old ones are back."""
    try:
        outdated = set(read_manifest(target)["files"])
    except CheckpointError:
        outdated = set()
    new = {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}
    old = {name for name in (*outdated, *new) if (target / name).is_file()}
    with tempfile.TemporaryDirectory(dir=target, prefix=".tmp-") as name:
        kept = Path(name)
        try:
            # the manifest leaves first and arrives last: without it the folder is no checkpoint
            _move(sorted(old, key=lambda name: name != MANIFEST_FILE), target, kept)
            _move(sorted(new, key=lambda name: name == MANIFEST_FILE), source, target)
        except BaseException:
            for name in new:
                if (target / name).is_file() and (name not in old or (kept / name).is_file()):
                    (target / name).unlink()
            moved = [name for name in old if (kept / name).is_file()]
            _move(sorted(moved, key=lambda name: name == MANIFEST_FILE), kept, target)
            raise


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target / name)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hugging Face hub needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


def download(repository: str, revision: str | None = None, *, also: Sequence[str] = ()) -> Path:
    """The local snapshot of a model on the Hugging Face hub: configuration, safetensors, tokenizer and files ``also``.

    Raises:
        FileNotFoundError: the hub has no such model, or cannot be reached.
        ImportError: the extra ``hub`` is not installed.
    """
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", f"{TOKENIZER_FOLDER}/*", *also]
    ignored = ["original/*", "consolidated*"]  # the same weights again, in another layout
    hub = _hub()
    try:
        return Path(
            hub.snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
        )
    except (OSError, ValueError) as error:  # raised for unknown names and without a network
        raise FileNotFoundError(
            f"there is no folder {repository}, and the hub gives no model of this name: {str(error).splitlines()[0]}"
        ) from error


def _folder_of(source: str | Path, revision: str | None) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision is for models on the hub, but source is the folder {folder}")
        return folder
    if isinstance(source, str) and HUB_ID.fullmatch(source) and not folder.exists():
        return download(source, revision)
    raise FileNotFoundError(
        f"source must be the folder of a checkpoint or organisation/name on the hub, got {source!r}"
    )
