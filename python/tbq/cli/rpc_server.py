# SPDX-License-Identifier: MIT
"""`tbq rpc-server`."""

import argparse
import os
import socket
import subprocess

from tbq.cli._argument import at_least_one
from tbq.errors import TBQError
from tbq.programs.paths import program
from tbq.serving.address import check_port


def _ipv4(host: str) -> str:
    """The address of a host: ggml-rpc-server takes numbers only, and ends with status 0 after anything else."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        raise TBQError(f"host {host!r} has no IPv4 address, and ggml-rpc-server listens on nothing else") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """lend this machine's GPUs or CPU to a `tbq serve --rpc` on another one"""
    parser.epilog = (
        "examples: tbq rpc-server                                # for this machine alone: 127.0.0.1:50052\n"
        "          tbq rpc-server --host 10.0.0.2                # for the network of that address\n"
        "          tbq rpc-server --device CUDA0,CUDA1 --cache\n\n"
        "There is no encryption and no password: whoever reaches the port can use this machine's memory, and read and "
        "change\nwhat others keep there. Name an address of a network that you trust."
    )
    parser.add_argument(
        "-H",
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="IPv4 address, or a name that has one, to listen on (127.0.0.1)",
    )
    parser.add_argument("-p", "--port", type=at_least_one, default=50052, metavar="N", help="port (50052)")
    parser.add_argument("-d", "--device", metavar="NAME,...", help="devices to lend (all GPUs; without a GPU the CPU)")
    parser.add_argument(
        "-t", "--threads", type=at_least_one, metavar="N", help="threads of the CPU device (half of all)"
    )
    parser.add_argument(
        "-c",
        "--cache",
        action="store_true",
        help="keep large tensors of models in the user's cache folder, so that the next load does not send them again",
    )

    def run(args: argparse.Namespace) -> int:
        server = program("ggml-rpc-server")
        host = _ipv4(args.host)
        check_port(args.port, host)
        command = [str(server), "--host", host, "--port", str(args.port)]
        for option in ("device", "threads"):
            if (value := getattr(args, option)) is not None:
                command += [f"--{option}", str(value)]
        command += ["--cache"] * args.cache
        if os.name == "nt":
            return subprocess.run(command, check=False).returncode
        os.execv(server, command)

    parser.set_defaults(run=run)
