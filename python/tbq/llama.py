# SPDX-License-Identifier: MIT
"""llama-cpp-python with the patched llama.cpp: a model in this process, with a tbq cache.

    from tbq.llama import Llama
    model = Llama("model.gguf", kv="tbq4_0", n_ctx=32768)
    model.create_chat_completion([{"role": "user", "content": "Hello"}])

tbq includes the bindings of the llama-cpp-python release that its libraries were built from.  If that release is
installed, the installed one is used.

After `import tbq.llama`, `import llama_cpp` gives the same bindings, with the same libraries.  Numbers of types work
there: llama_cpp.Llama(..., type_k=tbq.types["tbq4_0"].id, flash_attn=True).

Importing this module raises TBQError if llama_cpp is another release, or was imported before with other libraries.
The bindings read the folder of the libraries from environment variables.  These are set only while the bindings load.
"""

import contextlib
import csv
import ctypes
import importlib.util
import inspect
import io
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tbq._arguments import rpc_servers
from tbq._exact_rows import FIRST, RECENT, check_exact_rows
from tbq._types import types
from tbq.errors import TBQError
from tbq.kv_cache.calibrate import Scratch, center_file_for
from tbq.kv_cache.choose import choose, open_model
from tbq.kv_cache.type_pairs import split_pair
from tbq.programs.options import options_from_arguments
from tbq.programs.output import rpc_refusal
from tbq.programs.paths import paths

_VENDORED = pathlib.Path("_vendor", "llama_cpp")  # in the folder that has bin and lib


def _check_version(version: str | None, where: object) -> None:
    requirement = paths()["llama_cpp_python"]
    if version != requirement.partition("==")[2]:
        raise TBQError(
            f"llama-cpp-python {version or 'of an unknown release'} ({where}) does not fit these libraries, "
            f"which are of {requirement}: `pip uninstall llama-cpp-python` (tbq includes bindings), "
            "or import tbq.llama in another environment"
        )


def _check_library(module: ModuleType, folder: pathlib.Path) -> None:
    loaded = pathlib.Path(str(module.llama_cpp._lib._name)).resolve().parent
    if loaded != folder.resolve():
        raise TBQError(
            f"llama_cpp was imported before, with the libraries in {loaded} instead of {folder}; "
            "import tbq.llama before anything that imports llama_cpp, in a new process"
        )


def _find_bindings() -> ModuleSpec:
    """The installed llama_cpp, or the one that tbq includes."""
    found = importlib.util.find_spec("llama_cpp")
    if found is not None and found.origin is not None:
        return found
    vendored = pathlib.Path(paths()["lib"]).parent / _VENDORED
    if not (vendored / "__init__.py").is_file():
        raise TBQError(
            "this build of tbq has no bindings (it was built from another llama.cpp tree); install them: "
            f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install {paths()['llama_cpp_python']}"
        )
    spec = importlib.util.spec_from_file_location(
        "llama_cpp", vendored / "__init__.py", submodule_search_locations=[str(vendored)]
    )
    assert spec is not None
    return spec


@contextlib.contextmanager
def _set_variables(**values: str) -> Iterator[None]:
    """Sets environment variables inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _load() -> ModuleType:
    """llama_cpp with the libraries of this installation."""
    folder = pathlib.Path(paths()["lib"])
    if (module := sys.modules.get("llama_cpp")) is not None:
        _check_version(getattr(module, "__version__", None), getattr(module, "__file__", "?"))
        _check_library(module, folder)
        return module
    spec = _find_bindings()
    assert spec.origin is not None and spec.loader is not None
    version = re.search(r"""^__version__ = ["']([^"']*)""", pathlib.Path(spec.origin).read_text(encoding="utf-8"), re.M)
    _check_version(version and version[1], pathlib.Path(spec.origin).parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama_cpp"] = module
    try:
        with _set_variables(LLAMA_CPP_LIB_PATH=str(folder), MTMD_CPP_LIB=str(folder)):
            spec.loader.exec_module(module)
            importlib.import_module("llama_cpp.mtmd_cpp")  # the bindings would import it later, for a model with images
        # loads the backends that are modules, as llama.cpp's programs do when they start
        module.llama_cpp._lib.ggml_backend_load_all()
    except BaseException as error:
        for name in [name for name in sys.modules if name == "llama_cpp" or name.startswith("llama_cpp.")]:
            del sys.modules[name]
        if isinstance(error, ModuleNotFoundError):
            raise TBQError(f"llama_cpp needs {error.name}: pip install 'ggml-tbq[llama]'") from None
        if isinstance(error, (OSError, RuntimeError)):  # from loading the libraries
            raise TBQError(f"llama_cpp does not load: {error}") from None
        raise
    return module


if TYPE_CHECKING:
    _Base = Any
else:
    _Base = _load().Llama


def type_name(kind: str | int) -> str:
    """The name of a GGML type: "tbq4_0" for 644.  A name is returned as it is.  TBQError for an unknown number."""
    import gguf

    if isinstance(kind, str):
        return kind
    names = {info.id: name for name, info in types.items()} | {
        int(t): t.name.lower() for t in gguf.GGMLQuantizationType
    }
    if isinstance(kind, bool) or not isinstance(kind, int) or kind not in names:
        raise TBQError(f"cache type {kind!r} is not a type's name or number; {types['tbq4_0'].id} is tbq4_0")
    return names[kind]


def type_id(name: str) -> int:
    """GGML's number of a type: 644 for "tbq4_0", 1 for "f16".  TBQError for an unknown name."""
    import gguf

    known = {t.name.lower(): int(t) for t in gguf.GGMLQuantizationType} | {
        name: info.id for name, info in types.items()
    }
    if name not in known:
        raise TBQError(f"cache type {name!r} is not one of {', '.join(types)}, f16, q8_0, q4_0, ...")
    return known[name]


def _pair(
    model: str | os.PathLike[str], kv: str, type_k: str | int | None, type_v: str | int | None, shape: dict[str, Any]
) -> str:
    """The cache types as K/V, or "auto".  type_k and type_v replace those of kv."""
    if type_k is None and type_v is None:
        return kv
    k, v = "", ""
    if type_k is None or type_v is None:
        k, v = choose(model, kv, **shape)[:2] if kv == "auto" else split_pair(kv)
    return f"{k if type_k is None else type_name(type_k)}/{v if type_v is None else type_name(type_v)}"


def _as_options(arguments: dict[str, Any]) -> Iterator[str]:
    """Arguments of llama_cpp.Llama as options of llama.cpp's programs.

    The defaults of the bindings are included, because the programs have others.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(_Base.__init__).parameters.items()}
    yield from options_from_arguments({"n_gpu_layers": 0, **defaults, **arguments})
    scaling = {0: "none", 1: "linear", 2: "yarn"}.get(arguments.get("rope_scaling_type", -1))
    if scaling:
        yield from ("--rope-scaling", scaling)
    for key, value in (arguments.get("kv_overrides") or {}).items():
        kind = {bool: "bool", int: "int", float: "float", str: "str"}.get(type(value))
        if kind:
            text = io.StringIO()
            csv.writer(text, lineterminator="").writerow(
                [f"{key}={kind}:{str(value).lower() if kind == 'bool' else value}"]
            )
            yield from ("--override-kv", text.getvalue())


class Llama(_Base):  # type: ignore[misc]
    """llama_cpp.Llama with cache types that are chosen by name.

    Flash attention is on, because quantized values need it.

    model_path: a GGUF file.
    kv: "auto" (what tbq.plan recommends), a cache type, or "K/V".
    center: whether quantized keys are mean-centered, or a file of `tbq calibrate`.  Without a file the means are
    measured on the first use of a model, which a line on stderr says.
    recent, first: exact rows: the newest and the first rows of a tbq cache that are kept in 8 bits as well.
    type_k, type_v: the type of the keys and of the values, as a name or as GGML's number; they replace those of kv.
    n_ctx: tokens of context; 0 for the context that the model was trained for.
    rpc: RPC servers on which the model and its cache lie, as "HOST:PORT,..." or a list; `tbq rpc-server` runs one.
    n_gpu_layers is then -1, all layers, if it is not given.  The servers are devices of this process from then on.
    All other arguments are those of llama_cpp.Llama.

    Attributes: plan, the tbq.Plan of the cache or None; k and v, the cache types; center, the file of means or None.
    Raises TBQError for an unknown type, a pair that llama.cpp refuses for this model, and a model that does not load.
    """

    _stack = contextlib.ExitStack()  # llama_cpp.Llama.__del__ closes it, even if __init__ fails before it makes one

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        kv: str = "tbq4_0",
        *,
        center: bool | str | os.PathLike[str] = True,
        recent: int = RECENT,
        first: int = FIRST,
        type_k: str | int | None = None,
        type_v: str | int | None = None,
        n_ctx: int = 512,
        flash_attn: bool = True,
        rpc: str | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or not 0 <= n_ctx < 1 << 31:
            raise TBQError(
                f"n_ctx is {n_ctx!r}; it must be a number of tokens, or 0 for what the model was trained for"
            )
        check_exact_rows(recent, first)
        if rpc is not None:
            add_rpc_servers(rpc)
            options.setdefault("n_gpu_layers", -1)
        shape = {**_plan_arguments(n_ctx, center, options), "recent": recent, "first": first}
        if rpc is not None:  # the means are measured there, too
            shape["options"] = ["--rpc", ",".join(rpc_servers(rpc)), *shape["options"]]
        model = open_model(model_path)
        self.k, self.v, self.plan = choose(model, _pair(model, kv, type_k, type_v, shape), **shape)
        self._scratch = Scratch()
        context = n_ctx or (self.plan.context if self.plan else 0) or 8192
        self.center = center_file_for(model, self.k, context, center, shape["options"], _say, self._scratch)
        if kv == "auto" and self.plan and self.plan.center and not self.center and type_k is None:
            pair = _pair(model, kv, type_k, type_v, shape)
            self.k, self.v, self.plan = choose(model, pair, **{**shape, "center": False})
        ids = type_id(self.k), type_id(self.v)
        if not flash_attn and self.v not in ("f32", "f16", "bf16"):
            raise TBQError(f"values of {self.v} need flash attention; leave flash_attn=True, or choose {self.k}/f16")
        try:
            super().__init__(
                os.fspath(model_path), n_ctx=n_ctx, type_k=ids[0], type_v=ids[1], flash_attn=bool(flash_attn), **options
            )
        except ValueError as error:
            raise TBQError(f"{error}; verbose=True shows llama.cpp's reason") from None
        if self.center and not _try_center(self, self.center, required=center is not True):
            self.center = None
        set_exact_rows(self, recent, first)


def _say(line: str) -> None:
    print(f"tbq: {line}", file=sys.stderr, flush=True)


def _plan_arguments(n_ctx: int, center: object, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of tbq.plan() for a Llama.

    llama_cpp has one sequence, and sliding windows keep the whole context.
    """
    return {
        "center": center is not False,
        "context": n_ctx or None,
        "parallel": 1,
        "swa_full": options.get("swa_full") is not False,
        "ubatch": min(options.get("n_batch", 512), options.get("n_ubatch", 512)),
        "options": [*_as_options(options), *_adapter_options(options)],
    }


def _adapter_options(options: dict[str, Any]) -> list[str]:
    """The option of llama.cpp's programs for the adapter of a Llama."""
    path = options.get("lora_path")
    return ["--lora-scaled", f"{os.path.abspath(path)}:{options.get('lora_scale', 1.0)}"] if path else []


def add_rpc_servers(servers: str | Sequence[str]) -> None:
    """Makes the devices of RPC servers devices of this process, for all models that are loaded afterwards.

    servers: "HOST:PORT,..." or a list.  A server that was added before is not added again.
    Raises TBQError if one cannot be used: nothing listens there, or it is not one of this release of tbq.
    """
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]
    from llama_cpp._logger import llama_log_callback  # type: ignore[import-not-found, unused-ignore]

    library = llama_cpp.llama_cpp._lib
    by_name, address, register = (
        getattr(library, f"ggml_backend_{name}") for name in ("reg_by_name", "reg_get_proc_address", "register")
    )
    by_name.argtypes, by_name.restype = [ctypes.c_char_p], ctypes.c_void_p
    address.argtypes, address.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p
    register.argtypes, register.restype = [ctypes.c_void_p], None
    backend = by_name(b"RPC")
    if not backend:
        raise TBQError("this build of llama.cpp has no RPC (GGML_RPC)")
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address(backend, b"ggml_backend_rpc_add_server"))
    lines: list[str] = []
    collect = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    for server in rpc_servers(servers):
        llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
        try:
            found = add(server.encode())
        finally:
            llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
        if not found:
            raise TBQError(rpc_refusal("".join(lines).splitlines()) or f"RPC server {server} cannot be used")
        register(found)


def _try_center(model: Any, path: str | os.PathLike[str], required: bool) -> bool:
    """Centers the keys of a model.

    If llama.cpp refuses: TBQError if it is required, otherwise a line on stderr and False.
    """
    try:
        set_center(model, path)
    except TBQError as error:
        if required:
            raise
        _say(f"keys are not centered: {error}")  # kv_overrides, for example, may have given the model another RoPE
        return False
    return True


def set_center(model: Any, path: str | os.PathLike[str] | None) -> None:
    """Centers the keys of a llama_cpp.Llama with a file of `tbq calibrate`; None ends centering.

    The model must not have read a token yet.
    Raises TBQError if llama.cpp refuses the file: it is corrupt, or of another model or RoPE.
    """
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]

    function = llama_cpp.llama_cpp._lib.llama_set_cache_center
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_int32
    if function(model.ctx, None if path is None else os.fsencode(path)):
        raise TBQError(f"llama.cpp refuses the center {str(path)!r}; verbose=True shows its reason")


def set_exact_rows(model: Any, recent: int, first: int) -> None:
    """Keeps the newest and the first rows of a llama_cpp.Llama's tbq cache in 8 bits as well; 0 and 0: no rows.

    The model must not have read a token yet.
    Raises TBQError if llama.cpp refuses, because memory is short for example.
    """
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]

    check_exact_rows(recent, first)
    function = llama_cpp.llama_cpp._lib.llama_set_cache_exact
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32], ctypes.c_int32
    if function(model.ctx, recent, first):
        raise TBQError("llama.cpp refuses the exact rows; verbose=True shows its reason")
