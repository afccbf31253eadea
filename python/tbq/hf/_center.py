# SPDX-License-Identifier: MIT
"""The mean keys of a model, which the cache subtracts, and the energy of its queries (docs/design/centering.md)."""

import contextlib
import hashlib
import inspect
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from tbq import _files
from tbq._text import python_text
from tbq.errors import TBQError

#: A change of the measurement increases it.  The names of kept centers depend on it.
_METHOD = "3"
#: The chunks of the text, the tokens of each, and the first keys of each that do not count: attention sinks, few and
#: far from the others.
_CHUNKS, _CHUNK, _SKIPPED = 8, 128, 8
#: Positions that the keys are measured over, unless RoPE is for fewer.  Half of the chunks are in the first quarter, so
#: that one center serves shorter contexts, too.
_CONTEXT = 8192
#: The part of the text that is read, in characters: far more than the chunks need.
_TEXT = 400_000
#: Values at either end of a parameter that tell models apart.
_SAMPLE = 8


class KeyCenter:
    """The mean of each layer's keys as they are cached, and the mean square of the queries that read them.

    means[layer]: float32 (KV heads, head size).  energies[layer]: the same; missing where it could not be measured.
    """

    def __init__(self, means: dict[int, torch.Tensor], energies: dict[int, torch.Tensor]) -> None:
        self.means, self.energies = means, energies

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file for TBQCache(center=path)."""
        from safetensors.torch import save

        tensors = {f"{layer}.mean": mean.contiguous() for layer, mean in self.means.items()}
        tensors |= {f"{layer}.energy": energy.contiguous() for layer, energy in self.energies.items()}
        _files.replace(path, save(tensors, {"tbq_key_center": "1"}))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "KeyCenter":
        """Reads such a file.  Raises TBQError if it is none, OSError if it cannot be read."""
        from safetensors import SafetensorError, safe_open

        with open(path, "rb"):  # its errors say more
            pass
        means: dict[int, torch.Tensor] = {}
        energies: dict[int, torch.Tensor] = {}
        try:
            with safe_open(os.fspath(path), "pt") as file:
                if (file.metadata() or {}).get("tbq_key_center") != "1":
                    raise TBQError(f"{os.fspath(path)} holds no means of keys; KeyCenter.save() makes such a file")
                for name in file.keys():  # noqa: SIM118
                    layer, kind = name.split(".")
                    (means if kind == "mean" else energies)[int(layer)] = file.get_tensor(name)
        except (SafetensorError, ValueError) as error:
            if isinstance(error, TBQError):
                raise
            raise TBQError(f"{os.fspath(path)} holds no means of keys; KeyCenter.save() makes such a file") from None
        return KeyCenter(means, energies)

    @staticmethod
    def measure(model: Any, tokenizer: Any = None) -> "KeyCenter":
        """Measures the keys of a model: runs it once, over 1024 tokens of Python's language reference.

        tokenizer: the model's; None: the one that lies where the model was loaded from, and without one random tokens.
        """
        return _measure(model, _chunks(model, tokenizer))


def center_of_model(model: Any) -> KeyCenter:
    """Returns the center of a model.  It is measured once: the model keeps it, and the user's folder for caches."""
    center = getattr(model, "tbq_key_center", None)
    if center is None:
        center = _kept(model)
        with contextlib.suppress(AttributeError, TypeError):
            model.tbq_key_center = center
    assert isinstance(center, KeyCenter)
    return center


def _kept(model: Any) -> KeyCenter:
    folder = _files.user_cache_folder("key-centers")
    path = folder / f"{_fingerprint(model)}.safetensors" if folder else None
    if path is not None:
        with contextlib.suppress(TBQError, OSError):  # missing, or corrupt: measured again
            return KeyCenter.load(path)
    center = KeyCenter.measure(model)
    if path is not None:
        with contextlib.suppress(TBQError, OSError):  # where nothing can be written, each process measures
            path.parent.mkdir(parents=True, exist_ok=True)
            center.save(path)
    return center


def _fingerprint(model: Any) -> str:
    """Returns a hash of names, shapes and some values of all parameters, and of what moves the means: RoPE."""
    digest = hashlib.sha256(f"{_METHOD} {model.config.model_type}\n".encode())
    config = model.config.get_text_config(decoder=True)
    for name in ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "max_position_embeddings"):
        digest.update(f"{name} {getattr(config, name, None)}\n".encode())
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if parameter.device.type != "meta" and parameter.numel():
            values = parameter.detach().reshape(-1)
            samples.setdefault(parameter.device, []).extend((values[:_SAMPLE].float(), values[-_SAMPLE:].float()))
    for values_of_device in samples.values():
        digest.update(torch.cat(values_of_device).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


# --- what the model reads -----------------------------------------------------------------------------------------


def _chunks(model: Any, tokenizer: Any) -> torch.Tensor:
    """Returns the tokens of the chunks, (_CHUNKS, _CHUNK)."""
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    if tokenizer is not None:
        text = python_text().decode()[:_TEXT]
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        length = _CHUNK - len(bos)
        if len(ids) >= length:
            starts = [i * (len(ids) - length) // (_CHUNKS - 1) for i in range(_CHUNKS)]
            return torch.stack([torch.cat([torch.tensor(bos, dtype=torch.long), ids[i : i + length]]) for i in starts])
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocabulary, (_CHUNKS, _CHUNK), generator=torch.Generator().manual_seed(0))


def _tokenizer_of(model: Any) -> Any:
    """Returns the tokenizer that lies where the model was loaded from, or None.  Nothing is downloaded."""
    name = getattr(model.config, "_name_or_path", "")
    if not name:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:  # whatever a tokenizer's code raises: random tokens serve, too
        return None


def _positions(config: Any) -> torch.Tensor:
    """Returns the positions of the chunks: chunk i of n begins at (i / (n - 1))^2 of the context."""
    longest = getattr(config, "max_position_embeddings", None) or _CONTEXT
    last = max(0, min(_CONTEXT, longest) - _CHUNK)
    starts = torch.tensor([int((i / (_CHUNKS - 1)) ** 2 * last) for i in range(_CHUNKS)])
    return starts[:, None] + torch.arange(_CHUNK)


# --- measuring ----------------------------------------------------------------------------------------------------


class _Measured:
    """Sums of one layer's keys and of its queries."""

    def __init__(self, k: torch.Tensor) -> None:
        self.mean = k[:, :, _SKIPPED:].double().mean((0, 2)).float().cpu()
        self.energy: torch.Tensor | None = None

    def see_query(self, query: torch.Tensor) -> None:
        """Is called by the attention that reads these keys."""
        heads, size = self.mean.shape
        if query.shape[3] == size and query.shape[1] % heads == 0:
            squares = query.detach()[:, :, _SKIPPED:].double().square().mean((0, 2))
            energy = squares.reshape(heads, -1, size).mean(1).float().cpu()
            self.energy = energy if self.energy is None else self.energy + energy


class _MeasuringCache(DynamicCache):  # type: ignore[misc]
    """A cache that measures the keys as they arrive, and hands attention what it needs to measure the queries."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.measured: dict[int, _Measured] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.measured[layer_idx] = _Measured(key_states.detach())
        keys.tbq_see_query = self.measured[layer_idx].see_query  # attribute of this tensor, for tbq.hf's attention
        return keys, values


def see_query_of(key: torch.Tensor) -> Callable[[torch.Tensor], None] | None:
    """Returns what wants to see the queries that read these keys: not None while a center is measured."""
    return getattr(key, "tbq_see_query", None)


def _measure(model: Any, ids: torch.Tensor) -> KeyCenter:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    cache = _MeasuringCache(model.config)
    device = model.get_input_embeddings().weight.device
    parameters = inspect.signature(decoder.forward).parameters
    arguments: dict[str, Any] = {"cache" if "cache" in parameters else "past_key_values": cache, "use_cache": True}
    if "position_ids" in parameters:
        config = model.config.get_text_config(decoder=True)
        arguments["position_ids"] = _positions(config).to(device)
    with torch.no_grad(), _reading(decoder):
        decoder(input_ids=ids.to(device), **arguments)
    good = {i: layer for i, layer in cache.measured.items() if layer.mean.isfinite().all()}
    return KeyCenter(
        {i: layer.mean for i, layer in good.items()},
        {i: layer.energy for i, layer in good.items() if layer.energy is not None and layer.energy.isfinite().all()},
    )


@contextlib.contextmanager
def _reading(decoder: Any) -> Iterator[None]:
    """Lets tbq.hf's attention read the queries, without dropout."""
    training = [module for module in decoder.modules() if module.training]
    implementation = getattr(decoder.config, "_attn_implementation", None)
    decoder.eval()
    try:
        with contextlib.suppress(ValueError, AttributeError):  # a model that has no choice of its attention
            decoder.set_attn_implementation("tbq")
        yield
    finally:
        if implementation is not None and decoder.config._attn_implementation != implementation:
            decoder.set_attn_implementation(implementation)
        for module in training:  # each on its own: train() would change those below it, too
            module.training = True


# --- a layer's center ---------------------------------------------------------------------------------------------


def weights_of(energy: torch.Tensor) -> torch.Tensor:
    """Returns what error costs in each channel of a block, as llama-center.cpp does: the queries' energy, pooled over
    neighbors, to a power that trusts the sample a little less, and a floor.

    energy: (heads, size), in the order in which channels are stored.
    """
    heads, size = energy.shape
    pooled = energy.reshape(heads, size // 2, 2).mean(2, keepdim=True).expand(heads, size // 2, 2)
    weight = pooled.reshape(heads, size // 64, 64) ** 0.75
    mean = weight.mean(2, keepdim=True)
    weight = torch.where(mean > 0, weight / mean.clamp_min(torch.finfo(torch.float32).tiny) + 0.1, 1.0)
    return weight.reshape(heads, size).contiguous()


def load_center(center: "bool | str | os.PathLike[str] | KeyCenter | None", model: Any) -> KeyCenter | None:
    """Returns the center that TBQCache's argument names.  model: None if there is only its config.

    Where nobody asked for a center (None), a model that cannot be measured has none, and a warning says why.
    """
    if center is None:
        try:
            return center_of_model(model) if model is not None else None
        except Exception as error:  # whatever a model's code raises: nobody asked for a center
            warnings.warn(f"keys are not centered, the model cannot be measured: {error}", stacklevel=3)
            return None
    if isinstance(center, KeyCenter):
        return center
    if isinstance(center, (str, os.PathLike)):
        return KeyCenter.load(pathlib.Path(center))
    if not isinstance(center, bool):
        raise TBQError(f"center is {center!r}; it must be True, False, a KeyCenter or the path of one")
    if not center:
        return None
    if model is None:
        raise TBQError("center=True measures the model's keys: pass the model itself, TBQCache(model, ...)")
    return center_of_model(model)
