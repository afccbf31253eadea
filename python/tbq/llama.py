# SPDX-License-Identifier: MIT
"""llama-cpp-python on the patched llama.cpp: a model in this process, with a tbq cache.

    from tbq.llama import Llama
    model = Llama("model.gguf", kv="tbq4_0", n_ctx=32768)
    model.create_chat_completion([{"role": "user", "content": "Hello"}])

The bindings are those of the release that the libraries were built from, which tbq brings along; an installed
llama-cpp-python of that release is used instead.  Importing this module makes `import llama_cpp` the same thing, so plain
integers work there: llama_cpp.Llama(..., type_k=tbq.types["tbq4_0"].id, flash_attn=True).

Importing it raises TBQError if llama_cpp is another release or was imported before with other libraries.
The bindings take the folder of the libraries from environment variables, which are set while they are loaded, and only then.
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
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tbq._types import types
from tbq.errors import TBQError
from tbq.kv_cache.calibrate import Scratch, center_file_for
from tbq.kv_cache.choose import choose, opened
from tbq.kv_cache.type_pairs import split_pair
from tbq.programs.options import from_arguments
from tbq.programs.paths import paths

_VENDORED = pathlib.Path("_vendor", "llama_cpp")  # beside bin and lib


def _check_version(version: str | None, where: object) -> None:
    requirement = paths()["llama_cpp_python"]
    if version != requirement.partition("==")[2]:
        raise TBQError(
            f"llama-cpp-python {version or 'of an unknown release'} ({where}) does not fit these libraries, which are of {requirement}: "
            "`pip uninstall llama-cpp-python` (tbq brings bindings along), or import tbq.llama in another environment"
        )


def _check_library(module: ModuleType, folder: pathlib.Path) -> None:
    loaded = pathlib.Path(str(module.llama_cpp._lib._name)).resolve().parent
    if loaded != folder.resolve():
        raise TBQError(
            f"llama_cpp was imported before, with the libraries in {loaded} instead of {folder}; "
            "import tbq.llama before anything that imports llama_cpp, in a new process"
        )


def _spec() -> ModuleSpec:
    """The installed llama_cpp, or ours."""
    found = importlib.util.find_spec("llama_cpp")
    if found is not None and found.origin is not None:
        return found
    ours = pathlib.Path(paths()["lib"]).parent / _VENDORED
    if not (ours / "__init__.py").is_file():
        raise TBQError(
            "this build of tbq has no bindings (it was made from a llama.cpp tree of its own); install them: "
            f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install {paths()['llama_cpp_python']}"
        )
    spec = importlib.util.spec_from_file_location(
        "llama_cpp", ours / "__init__.py", submodule_search_locations=[str(ours)]
    )
    assert spec is not None
    return spec


@contextlib.contextmanager
def _variables(**values: str) -> Iterator[None]:
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
    """llama_cpp, on our libraries."""
    folder = pathlib.Path(paths()["lib"])
    if (module := sys.modules.get("llama_cpp")) is not None:
        _check_version(getattr(module, "__version__", None), getattr(module, "__file__", "?"))
        _check_library(module, folder)
        return module
    spec = _spec()
    assert spec.origin is not None and spec.loader is not None
    version = re.search(r"""^__version__ = ["']([^"']*)""", pathlib.Path(spec.origin).read_text(encoding="utf-8"), re.M)
    _check_version(version and version[1], pathlib.Path(spec.origin).parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama_cpp"] = module
    try:
        with _variables(LLAMA_CPP_LIB_PATH=str(folder), MTMD_CPP_LIB=str(folder)):
            spec.loader.exec_module(module)
            importlib.import_module("llama_cpp.mtmd_cpp")  # the bindings would do it later, for a model with images
        # llama.cpp's programs do this at their start; it loads the backends that are modules
        module.llama_cpp._lib.ggml_backend_load_all()
    except BaseException as error:
        for name in [name for name in sys.modules if name == "llama_cpp" or name.startswith("llama_cpp.")]:
            del sys.modules[name]
        if isinstance(error, ModuleNotFoundError):
            raise TBQError(f"llama_cpp needs {error.name}: pip install 'ggml-tbq[llama]'") from None
        if isinstance(error, (OSError, RuntimeError)):  # the libraries'
            raise TBQError(f"llama_cpp does not load: {error}") from None
        raise
    return module


if TYPE_CHECKING:
    _Base = Any
else:
    _Base = _load().Llama


def type_name(kind: str | int) -> str:
    """The name of a GGML type, "tbq4_0" of 644; names stay.  TBQError for a number that is no type."""
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
    """GGML's number of a type, 644 of "tbq4_0" and 1 of "f16"; TBQError for an unknown name."""
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
    """K/V, or auto."""
    if type_k is None and type_v is None:
        return kv
    k, v = (
        ("", "") if None not in (type_k, type_v) else choose(model, kv, **shape)[:2] if kv == "auto" else split_pair(kv)
    )
    return f"{k if type_k is None else type_name(type_k)}/{v if type_v is None else type_name(type_v)}"


def _as_options(arguments: dict[str, Any]) -> Iterator[str]:
    """As the bindings pass them on, their defaults too: llama.cpp's programs have others."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(_Base.__init__).parameters.items()}
    yield from from_arguments({"n_gpu_layers": 0, **defaults, **arguments})
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
    """llama_cpp.Llama with a cache chosen by name, and flash attention on, which quantized values need.

    model_path: a GGUF file.  kv: "auto" (what tbq.plan recommends), a cache type, or "K/V"; type_k and type_v, names or
    GGML's numbers, replace a side of it.  The rest is llama_cpp.Llama's, n_ctx above all: its default is 512 tokens, 0 is what
    the model was trained for.
    center: whether quantized keys are centered (measured on first use, which a line on stderr says), or a file for it.
    plan: the tbq.Plan of its cache, or None.  k, v: the cache types.
    Raises TBQError for an unknown type, a pair that llama.cpp refuses for this model, and a model that cannot be loaded.
    """

    _stack = contextlib.ExitStack()  # __del__ wants one, however early __init__ fails

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        kv: str = "tbq4_0",
        *,
        center: bool | str | os.PathLike[str] = True,
        type_k: str | int | None = None,
        type_v: str | int | None = None,
        n_ctx: int = 512,
        flash_attn: bool = True,
        **options: Any,
    ) -> None:
        if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or not 0 <= n_ctx < 1 << 31:
            raise TBQError(
                f"n_ctx is {n_ctx!r}; it must be a number of tokens, or 0 for what the model was trained for"
            )
        # llama_cpp, unlike llama-server, has one sequence, and whole contexts for sliding windows
        shape: dict[str, Any] = {
            "center": center is not False,
            "context": n_ctx or None,
            "parallel": 1,
            "swa_full": options.get("swa_full") is not False,
            "ubatch": min(options.get("n_batch", 512), options.get("n_ubatch", 512)),
        }
        options_of_center = list(_as_options(options))
        model = opened(model_path)
        shape["options"] = options_of_center
        self.k, self.v, self.plan = choose(model, _pair(model, kv, type_k, type_v, shape), **shape)

        def say(line: str) -> None:
            print(f"tbq: {line}", file=sys.stderr, flush=True)

        self._scratch = Scratch()
        self.center = center_file_for(
            model,
            self.k,
            n_ctx or (self.plan.context if self.plan else 0) or 8192,
            center,
            options_of_center,
            say,
            self._scratch,
        )
        if kv == "auto" and self.plan and self.plan.center and not self.center and type_k is None:
            self.k, self.v, self.plan = choose(
                model, _pair(model, kv, type_k, type_v, shape), **{**shape, "center": False}
            )
        ids = type_id(self.k), type_id(self.v)
        if not flash_attn and self.v not in ("f32", "f16", "bf16"):
            raise TBQError(f"values of {self.v} need flash attention; leave flash_attn=True, or choose {self.k}/f16")
        try:
            super().__init__(
                os.fspath(model_path), n_ctx=n_ctx, type_k=ids[0], type_v=ids[1], flash_attn=bool(flash_attn), **options
            )
        except ValueError as error:
            raise TBQError(f"{error}; verbose=True shows llama.cpp's reason") from None
        if self.center:
            try:
                set_center(self, self.center)
            except TBQError as error:
                if center is not True:
                    raise
                say(f"keys are not centered: {error}")  # kv_overrides, for example, may have made another RoPE of it
                self.center = None


def set_center(model: Any, path: str | os.PathLike[str] | None) -> None:
    """Centers the keys of a llama_cpp.Llama that has not read a token yet, with a file of `tbq calibrate`; None: not any more.

    Raises TBQError if llama.cpp refuses the file: of another model or RoPE, or corrupt.
    """
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]

    function = llama_cpp.llama_cpp._lib.llama_set_cache_center
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_int32
    if function(model.ctx, None if path is None else os.fsencode(path)):
        raise TBQError(f"llama.cpp refuses the center {str(path)!r}; verbose=True shows its reason")
