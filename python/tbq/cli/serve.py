# SPDX-License-Identifier: MIT
"""`tbq serve`."""

import argparse
import contextlib
import os
import pathlib
import signal
from collections.abc import Sequence
from types import FrameType

from tbq._units import format_size
from tbq.errors import TBQError
from tbq.programs import output
from tbq.programs.signals import INTERRUPTIONS, handle_signals, interruptible
from tbq.serving.server import Server, say


def summary(server: Server, kv: str) -> list[str]:
    """The plan in up to three lines."""
    plan = server.plan
    if plan is None:
        return [f"cache: keys {server.k}, values {server.v}; its size is not known for this model"]
    name, weights = plan.name or pathlib.Path(plan.model).name, format_size(plan.weights_bytes)
    head = f"model: {name}, {plan.architecture}, {len(plan.layers)} layers, {weights} of weights"
    if not plan.cached:
        return [head, "cache: none", f"why:   {'; '.join([plan.reason, *plan.warnings])}"]
    pair = plan.pair(server.k, server.v)
    full = plan.bytes_at("f16", "f16", plan.context)
    exact = f", {format_size(pair.exact_bytes)} of them exact rows" if pair.exact_bytes else ""
    share = f", {100 * pair.bytes / full:.0f} % of f16's {format_size(full)}" if full else ""
    why = plan.reason
    if kv != "auto":
        why = "chosen with --kv"
        if (server.k, server.v) != plan.recommended:
            why += f"; tbq plan recommends {'/'.join(plan.recommended)}: {plan.reason}"
    return [
        head,
        f"cache: keys {pair.k}, values {pair.v}: {format_size(pair.bytes)} for {plan.context} tokens{exact}{share}",
        f"why:   {'; '.join([why, *plan.warnings])}",
    ]


class _SignalForwarder:
    """Forwards SIGINT, SIGTERM and SIGHUP to a server.  The second one kills it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.early: int | None = None  # a signal that came before the process existed
        self.count = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.server._stopping = True
        if not hasattr(self.server, "process"):
            self.early = number
        else:
            self._send(number if self.count == 1 else signal.SIGTERM if os.name == "nt" else signal.SIGKILL)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.server.process.send_signal(number)

    def send_early(self) -> None:
        """Forwards a signal that came before the process existed."""
        if self.early is not None:
            self._send(self.early)


def _correction(server: Server) -> str | None:
    """A line that corrects the plan, if the server chose another context; None if it did not.

    It may choose another one for the memory of a GPU, or because a file with settings says so.
    """
    if server.context_is_capped:  # the log names the context of a slot, which is less than that of the cache
        return None
    context = output.server_context(server.log)
    # a slot never has more context than the model was trained for
    if context is None or server.plan is None or server.plan.context > server.plan.context_train:
        return None
    size = server.plan.bytes_at(server.k, server.v, context)
    if size == server.plan.bytes_at(server.k, server.v, server.plan.context):
        return None
    return f"llama-server took a context of {context} tokens, so the cache has {format_size(size)}"


def serve(model: str, kv: str, options: Sequence[str], center: bool = True, rpc: str | None = None) -> int:
    """Runs llama-server in the foreground.  Returns its exit status, or 128 + N if signal N ended it."""
    with interruptible():
        server = Server(
            model,
            kv,
            center=center,
            port=8080,
            rpc=rpc,
            options=options,
            timeout=None,
            on_line=lambda line: say(line, to_stderr=True),
        )
        server.prepare()
    for line in summary(server, kv):
        say(f"tbq: {line}")
    if ignored := sorted(name for name in os.environ if name.startswith("LLAMA_ARG_")):
        say(
            f"tbq: warning: {', '.join(ignored)}: not passed on to llama-server; give it the options instead",
            to_stderr=True,
        )
    signals = _SignalForwarder(server)
    with handle_signals(INTERRUPTIONS, signals):  # ignored signals stay ignored, also in the server
        server.start()
        signals.send_early()
        try:
            server.wait_until_healthy()
            if correction := _correction(server):
                say(f"tbq: {correction}")
            say(f"tbq: llama-server is up: {server.url}; Ctrl-C stops it")
            if server.process.wait() and not signals.count:
                raise TBQError(f"llama-server {server.describe_ending()}: {server.last_error()}")
        except TBQError as error:
            # llama-server --version, for example, ends with status 0
            if not signals.count and server.process.poll() != 0:
                say(f"tbq: error: {' '.join(str(error).split())}", to_stderr=True)
        finally:
            server.stop()
            server._reader.join(5)  # reads the last lines of the log
    status = server.process.returncode
    return status if status >= 0 else 128 - status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """plan a model's cache and run llama-server with it"""
    parser.usage = (
        "tbq serve [-h] [--kv auto|TYPE|K/V] [--no-center] [--rpc HOST:PORT,...] MODEL [llama-server's options ...]"
    )
    parser.epilog = (
        "examples: tbq serve model.gguf\n"
        "          tbq serve --kv tbq4_0/tbq3_0 model.gguf -c 131072 --port 9000 -ngl 99\n"
        "          tbq serve --rpc 10.0.0.2:50052,10.0.0.3:50052 model.gguf    # each runs tbq rpc-server\n\n"
        "The exit status is llama-server's; LLAMA_ARG_... variables are not passed on to it."
    )
    parser.add_argument(
        "--kv",
        default="auto",
        metavar="auto|TYPE|K/V",
        help="cache types: what `tbq plan` recommends (auto, the default), one for keys and values, or keys/values",
    )
    parser.add_argument(
        "--no-center",
        action="store_true",
        help="do not center the keys; quantized keys are less accurate then",
    )
    parser.add_argument(
        "--rpc",
        metavar="HOST:PORT,...",
        help="RPC servers (`tbq rpc-server`) on which the model and its cache lie; nothing is encrypted on the way",
    )
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, the first one if it is split")
    rest = parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="OPTION", help="any option of llama-server, passed on unchanged"
    )
    rest.required = False  # argparse would report it as missing together with MODEL

    def run(args: argparse.Namespace) -> int:
        kv, center, options, given = args.kv, not args.no_center, [], iter(args.options)
        for option in given:  # --kv and --no-center may come after the model too
            if option == "--kv":
                kv = next(given, "")
            elif option.startswith("--kv="):
                kv = option[len("--kv=") :]
            elif option == "--no-center":
                center = False
            elif option in ("-h", "--help"):
                parser.print_help()
                return 0
            elif option != "--":
                options.append(option)
        if not kv:
            raise TBQError("--kv needs a value: auto, a type, or K/V")
        return serve(args.model, kv, options, center, args.rpc)

    parser.set_defaults(run=run, hint="; llama-server's options come after MODEL")
