# SPDX-License-Identifier: MIT
"""Centred keys: the mean of a model's keys, measured once, which llama.cpp subtracts from keys before it stores them; and
how much its queries have in each channel, which tells the encoder of a tbq type where error costs most.

    tbq calibrate model.gguf -o model.center.gguf
    llama-server -m model.gguf --cache-type-k tbq4_0 --cache-center model.center.gguf

`tbq serve` and tbq.llama.Llama do both by themselves.  Why attention stays the same, and what it is worth: docs/center.md.
"""
import argparse
import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
import re
import shutil
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tbq import _files
from tbq._run import at_least_one, cores, interruptible, run
from tbq._settings import ROPE_OPTIONS, measured_over, select
from tbq.caches import read_model
from tbq.errors import TBQError, one_line, printable
from tbq.gguf_files import Tensor, as_path, open_gguf

_METHOD = "2"  # of measuring: another number when what is measured changes, so that nothing old is used
_SAMPLE = 64  # bytes at each end of a tensor that a fingerprint takes
_ROOM = 4 << 20  # bytes that measuring needs in its folder: a text and the center
_ERROR = re.compile(r"^(?:[\d.]+ E )?error: (.*)", re.M)  # with llama.cpp's clock in front
_CHUNK = re.compile(r"^chunk (\d+)/(\d+)$", re.M)

#: Options of llama.cpp's programs that change how the model runs, and whether a value follows: the measuring gets them too.
_MODEL_OPTIONS = {**{name: True for name in (
    "-t", "--threads", "-ngl", "--gpu-layers", "--n-gpu-layers", "-dev", "--device", "-sm", "--split-mode", "-ts", "--tensor-split", "-mg", "--main-gpu",
    "-ot", "--override-tensor", "-ncmoe", "--n-cpu-moe", "-ncffn", "--n-cpu-ffn", "--rpc", "-lm", "--load-mode", "-lzm", "--lazy-mode", "--numa")},
    **{name: False for name in ("-cmoe", "--cpu-moe", "-nr", "--no-repack", "--no-host")}}


class NothingToCentre(TBQError):
    """The attention of a model would notice."""


@dataclasses.dataclass(frozen=True)
class Center:
    """What a file holds.  means[layer], energies[layer]: float32 (KV heads, head size)."""

    model: str  #: fingerprint of the model
    architecture: str
    context: int  #: tokens of context that the keys were measured over
    tokens: int  #: keys measured in each layer
    hash: str  #: of everything; states of a cache carry it
    means: dict[int, npt.NDArray[np.float32]]
    energies: dict[int, npt.NDArray[np.float32]]  #: mean squares of the queries that read these keys
    shares: dict[int, float]  #: of the energy of a layer's keys, what the mean holds: 0 to 1


def fingerprint(model: str | os.PathLike[str]) -> str:
    """What ties a center to a GGUF file: SHA-256 of the names, types, shapes, and first and last bytes of its tensors.

    The same as in ggml_tbq/llama/llama-center-file.cpp, in hexadecimal.  Metadata and the split into files have no part in it.
    Raises TBQError for what is no model, OSError for what cannot be read.
    """
    digest = hashlib.sha256()
    files = {}
    try:
        for tensor in sorted(open_gguf(model).tensors, key=lambda tensor: tensor.name.encode()):
            ne = [*reversed(tensor.shape), 1, 1, 1][:4]
            digest.update(f"{tensor.name} {int(tensor.type)} {ne[0]} {ne[1]} {ne[2]} {ne[3]}\n".encode())
            if tensor.path not in files:
                files[tensor.path] = tensor.path.open("rb")
            n = min(_SAMPLE, tensor.n_bytes)
            for start in (0, tensor.n_bytes - n):
                files[tensor.path].seek(tensor.offset + start)
                digest.update(files[tensor.path].read(n))
    finally:
        for file in files.values():
            file.close()
    return digest.hexdigest()


def _hash(center: Center, rope: Sequence[float], factors: Sequence[str]) -> str:
    """Of everything in a center, as llama-center-file.cpp computes it.  rope, factors: by layer, in the order of the layers."""
    digest, n_rope = hashlib.sha256(f"{center.model} {center.architecture} {center.context} {center.tokens}\n".encode()), len(rope) // max(1, len(factors))
    for i, il in sorted(enumerate(center.means), key=lambda pair: pair[1]):
        heads, size = center.means[il].shape
        digest.update(f"{il} {size} {heads} {factors[i]}\n".encode())
        digest.update(struct.pack(f"<{n_rope + 1}f", *rope[i * n_rope:(i + 1) * n_rope], center.shares[il]))
        digest.update(center.means[il].tobytes())
        digest.update(center.energies[il].tobytes())
    return digest.hexdigest()


def _values(tensor: Tensor) -> npt.NDArray[np.float32]:
    return np.fromfile(tensor.path, "<f4", tensor.n_values, offset=tensor.offset).reshape(tensor.shape[-2:] if len(tensor.shape) > 1 else (1, -1))


def read_center(path: str | os.PathLike[str]) -> Center:
    """The contents of a file of `tbq calibrate`, checked; TBQError if it is another kind of file, or damaged."""
    file = open_gguf(path)
    fields, by_name = file.metadata, {tensor.name: tensor for tensor in file.tensors}
    try:
        if fields["cache_center.version"] != 1:
            raise TBQError(f"{path} is of a newer version; update ggml-tbq")
        layers, shares = fields["cache_center.layers"], fields["cache_center.share"]
        rope, factors = fields["cache_center.rope"], fields["cache_center.rope_factors"]
        means = {il: _values(by_name[f"blk.{il}.attn_k.center"]) for il in layers}
        energies = {il: _values(by_name[f"blk.{il}.attn_q.energy"]) for il in layers}
        center = Center(fields["cache_center.model"], fields["cache_center.architecture"], fields["cache_center.n_ctx"], fields["cache_center.n_tokens"],
                        fields["cache_center.hash"], means, energies, dict(zip(layers, shares, strict=True)))
        found = _hash(center, rope, factors)
    except (KeyError, TypeError, ValueError, IndexError, struct.error) as error:
        if isinstance(error, TBQError):
            raise
        raise TBQError(f"{path} holds no means of keys; tbq calibrate makes such a file") from None
    if found != center.hash:
        raise TBQError(f"{path} is damaged; make it again with tbq calibrate")
    return center


def model_options(options: Sequence[str]) -> list[str]:
    """Those of llama.cpp's options that the measuring needs too."""
    return [text for pair in select(options, _MODEL_OPTIONS | ROPE_OPTIONS) for text in pair if text is not None]


def _text(text: "bytes | str | os.PathLike[str] | None") -> tuple[bytes, str]:
    """What is read, and what a message calls it."""
    from tbq.quality import python_text, read_text

    if text is None:
        return python_text(), "Python's language reference"
    if not isinstance(text, bytes):
        return read_text(pathlib.Path(text)), f"text {os.fspath(text)!r}"
    if not text.strip():
        raise TBQError("the text is empty; name one that the model can read")
    return text, "the text"


def calibrate(model: str | os.PathLike[str], out: str | os.PathLike[str], context: int, *, text: "bytes | str | os.PathLike[str] | None" = None, chunks: int | None = None,
              options: Sequence[str] = (), on_chunk: Callable[[int, int], None] | None = None) -> str:
    """Measures the mean keys of a model and writes them to a file, which is complete or not there.

    model: a GGUF file, the first of a split.  context: tokens; the keys are taken at positions spread over them.
    text: what to run the model on, UTF-8 or the path of a file, Python's language reference if None.  chunks: of 128 tokens (8).
    options: llama.cpp's, for example ["-ngl", "99"].  on_chunk: is called with the chunks done, and all of them.
    Returns a table of the share of the keys' energy that the means hold, by layer and length of context.
    The same arguments give the same bytes.
    Raises TBQError with llama.cpp's reason: no keys to centre (MLA, attention sinks, logit soft-cap), a text too short; OSError
    for what cannot be written.
    """
    out = as_path(out)
    if out.is_dir():
        raise TBQError(f"{out} is a folder; name a file to write")
    if not _files.target(out).parent.is_dir():
        raise TBQError(f"{out.parent} is not a folder")
    opened = open_gguf(model)  # says better what is wrong with a file than the program does
    if out.exists() and any(out.samefile(file) for file in opened.files):
        raise TBQError(f"{out} is the model itself; name another file to write")

    def progress(output: str) -> None:
        if on_chunk and (found := _CHUNK.findall(output)):
            on_chunk(int(found[-1][0]), int(found[-1][1]))

    read, named = _text(text)
    with _files.workplace(out) as parts:
        with _files.naming(out):
            (parts / "text").write_bytes(read)
        threads = [] if "-t" in options or "--threads" in options else ["-t", str(cores())]
        arguments = [*threads, *options, "-m", str(as_path(model).absolute()), "-f", "text", "-c", str(context), "-o", "center",
                     *(["--chunks", str(chunks)] if chunks else [])]
        for on_the_cpu in ([], ["-ngl", "0"]):  # a GPU that is too small for the whole model is no reason not to measure
            done = run("llama-cache-center", [*arguments, *on_the_cpu], parts, progress, {"OMP_WAIT_POLICY": "passive"})
            reason = _ERROR.search(done.stderr + done.stdout)
            if not done.status or not reason or not re.search("cannot be loaded$|^no context", reason[1]):
                break
        if done.status or not (parts / "center").is_file():
            log = done.stderr + done.stdout
            nothing = re.search(r"nothing to measure(?:, the keys of this model stay as they are)?: (.*)", log)
            if nothing:
                raise NothingToCentre(f"the keys of {model} stay as they are: {nothing[1]}")
            if re.search("llama_cache_center_stats_save: center", log):  # it knows the name in the workplace only
                raise TBQError(f"{out} cannot be written; {parts.parent} has {shutil.disk_usage(parts).free} bytes free")
            if reason and reason[1].startswith("the text has "):
                raise TBQError(f"{named} is too short: it{reason[1].removeprefix('the text')}")
            raise TBQError(f"the keys of {model} were not measured: {reason[1] if reason else done.error()}")
        read_center(parts / "center")
        _files.put([(parts / "center", out)])
    return done.stdout[done.stdout.find("share of the keys"):].rstrip()


class Scratch:
    """A folder for files that must last as long as their user: made when it is first asked for, gone when it is closed, or with this object."""

    def __init__(self) -> None:
        self._remove: Callable[[], object] | None = None

    def folder(self) -> pathlib.Path:
        """OSError where nothing can be written."""
        if self._remove is None:
            try:
                self._folder = tempfile.mkdtemp(prefix="tbq-")
            except FileNotFoundError:  # a container that can be read only has this one
                self._folder = tempfile.mkdtemp(prefix="tbq-", dir="/dev/shm")
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, True)
        return pathlib.Path(self._folder)

    def close(self) -> None:
        if self._remove is not None:
            self._remove()
            self._remove = None


def folder() -> pathlib.Path | None:
    """Where centers are kept that were measured on first use: below the user's folder for caches.  None if the user has none."""
    import platformdirs

    try:
        found = pathlib.Path(platformdirs.user_cache_dir("ggml-tbq", appauthor=False)) / "centers"
    except RuntimeError:  # no variable names one, and the user has no entry in passwd
        return None
    return found if found.is_absolute() else None  # older releases return "~/.cache" then


def for_cache(model: str | os.PathLike[str], k: str, context: int, center: "bool | str | os.PathLike[str]", options: Sequence[str],
              say: Callable[[str], None], scratch: Scratch) -> pathlib.Path | None:
    """The center that a cache with keys of type k should have, or None: tbq.server and tbq.llama ask here.

    center: True for that of the model, measured now if need be; False for none; or a file.  Keys of 16 bits and more need none.
    context: tokens, the positions that keys can have.  scratch: for a center that cannot be kept.
    A model whose keys cannot be centred does without; say gets the reason, and one line before something is measured.
    Raises TBQError for a file that is none.
    """
    if not isinstance(center, bool):
        read_center(center)
        return pathlib.Path(center)
    if not center or k in ("f32", "f16", "bf16"):
        return None
    try:
        return of_model(model, context, options, say, scratch)
    except (TBQError, OSError) as error:
        say(f"keys are not centred: {one_line(error)}")
        return None


def of_model(model: str | os.PathLike[str], context: int, options: Sequence[str] = (), say: Callable[[str], None] | None = None,
             scratch: Scratch | None = None) -> pathlib.Path:
    """The center of a model for a context, measured now if it is not in folder() yet.

    context: tokens; contexts of like lengths share a center.  options: llama-server's; those of the model and of RoPE count.
    say: gets a line before something is measured.  scratch: where the center goes if it cannot be kept.
    Raises TBQError if the keys cannot be measured, or not be kept and there is no scratch.
    """
    context = measured_over(context, read_model(pathlib.Path(model), options).context)
    rope = [text for pair in select(options, ROPE_OPTIONS) for text in pair if text is not None]
    name = hashlib.sha256(" ".join([_METHOD, fingerprint(model), str(context), *rope]).encode()).hexdigest()[:32]
    what = f"measuring the mean of the keys of {pathlib.Path(model).name}"
    where, why = folder(), "the user has no folder for caches: neither XDG_CACHE_HOME nor HOME is set"
    if where is not None:
        try:
            if found := _kept(where, name):
                return found
            _check_writable(where)
            if say:
                say(f"{what}, once; it is kept in {where}")
            return _measure(model, where, name, context, options)
        except OSError as error:
            why = f"{where}: {error.strerror or error}"
    if scratch is None:
        raise TBQError(f"the means of the keys cannot be kept: {why}")
    if say:
        say(f"{what}, at each start, because it cannot be kept ({why})")
    return _measure(model, scratch.folder(), name, context, options)


def _kept(where: pathlib.Path, name: str) -> pathlib.Path | None:
    """The center of that name; None if it is not there, or damaged.  TBQError if the model is known to have none."""
    path, never = where / f"{name}.gguf", where / f"{name}.none"
    if path.is_file():
        with contextlib.suppress(TBQError):  # measure it again
            read_center(path)
            return path
    if never.is_file():
        raise TBQError(never.read_text(encoding="utf-8"))
    return None


def _check_writable(where: pathlib.Path) -> None:
    """OSError before anything is measured that could not be written there."""
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=where):
        if shutil.disk_usage(where).free < _ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _measure(model: str | os.PathLike[str], where: pathlib.Path, name: str, context: int, options: Sequence[str]) -> pathlib.Path:
    path = where / f"{name}.gguf"
    try:
        calibrate(model, path, context, options=model_options(options))
    except NothingToCentre as error:  # of a model, whatever the machine: it need not be loaded for that again
        with contextlib.suppress(OSError):
            path.with_suffix(".none").write_text(str(error), encoding="utf-8")
        raise
    return path


# --- the command ----------------------------------------------------------------------------------------------------


def define(parser: argparse.ArgumentParser) -> None:
    """measure the mean of a model's keys, for --cache-center"""
    parser.epilog = ("examples: tbq calibrate model.gguf\n"
                     "          tbq calibrate model.gguf --ctx 32768 -o model.center.gguf -- -ngl 99\n"
                     "          llama-server -m model.gguf --cache-type-k tbq4_0 --cache-center model.center.gguf\n\n"
                     "tbq serve and tbq.llama do this by themselves.  Options after -- are llama.cpp's.")
    parser.add_argument("model", type=pathlib.Path, metavar="MODEL.gguf", help="the model, the first file of a split one")
    parser.add_argument("--text", type=pathlib.Path, metavar="FILE", help="what the model reads (Python's language reference)")
    parser.add_argument("--ctx", type=at_least_one, metavar="N", help="tokens of context that the cache will have (what the model was trained for)")
    parser.add_argument("--chunks", type=at_least_one, metavar="N", help="chunks of 128 tokens to read, spread over the context (8)")
    parser.add_argument("-o", dest="out", type=pathlib.Path, metavar="OUT.gguf", help="file to write (MODEL.center.gguf, here)")
    parser.add_argument("options", nargs="*", metavar="-- OPTION ...", help="options of llama.cpp that the measuring needs: -- -ngl 99")

    def run_command(args: argparse.Namespace) -> int:
        from tqdm import tqdm  # type: ignore[import-untyped]

        context = args.ctx or read_model(args.model, args.options).context or 8192
        out = args.out or pathlib.Path(re.sub(r"(-00001-of-\d{5})?\.gguf$", "", args.model.name) + ".center.gguf")
        if args.text and out.exists() and out.samefile(args.text):
            raise TBQError(f"{out} is the text itself; name another file to write")
        with interruptible(), tqdm(unit="chunk", desc="keys", disable=None) as bar:
            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            shares = calibrate(args.model, out, context, text=args.text, chunks=args.chunks, options=args.options, on_chunk=show)
        print(shares)
        center = read_center(out)
        print(f"{printable(str(out)) or out}: {len(center.means)} layers, {center.tokens} keys each, for a context of {center.context} tokens")
        return 0

    parser.set_defaults(run=run_command)
