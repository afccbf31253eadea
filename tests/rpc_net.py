# SPDX-License-Identifier: MIT
"""RPC servers with addresses of their own, and a proxy that changes what one of them says."""

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time

from llama_tools import ENV

PORT = 50052
#: Commands, and the sizes of their answers (ggml-rpc.cpp, tbq-rpc.h)
HELLO, TBQ_HELLO, SUPPORTS_OP = 14, 0xE0, 0xE1
BUSY = 2**64 - 1


def _ip(*words):
    return subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, check=False)


def namespaces_allowed():
    """Whether this process may make network namespaces; otherwise the servers share this machine's loopback."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return False
    name = f"tbq{os.getpid()}x"
    made = _ip("netns", "add", name).returncode == 0
    return _ip("netns", "del", name).returncode == 0 and made


class Machine:
    """A network namespace with an address of its own that runs one RPC server; without namespaces 127.0.0.N."""

    def __init__(self, bin_dir, number, log, isolated):
        self.program, self.log_path, self.isolated = bin_dir / "ggml-rpc-server", log, isolated
        self.name, self.outside = f"tbq{os.getpid()}n{number}", f"tbq{os.getpid() % 10**6}v{number}"
        self.address = f"10.213.{number}.2" if isolated else f"127.0.0.{number + 1}"
        self.process = None
        if isolated:
            inside = f"{self.outside}i"
            for words in (
                ("netns", "add", self.name),
                ("link", "add", self.outside, "type", "veth", "peer", "name", inside, "netns", self.name),
                ("addr", "add", f"10.213.{number}.1/24", "dev", self.outside),
                ("link", "set", self.outside, "up"),
                ("-n", self.name, "addr", "add", f"{self.address}/24", "dev", inside),
                ("-n", self.name, "link", "set", inside, "up"),
                ("-n", self.name, "link", "set", "lo", "up"),
            ):
                done = _ip(*words)
                assert done.returncode == 0, f"ip {words}: {done.stderr}"

    @property
    def endpoint(self):
        return f"{self.address}:{PORT}"

    def start(self, *args, environment=None):
        command = [str(self.program), "--host", self.address, "--port", str(PORT), "-t", "1", *args]
        if self.isolated:
            command = ["ip", "netns", "exec", self.name, *command]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**ENV, **(environment or {})}
            )
        self.wait()
        return self

    def wait(self, seconds=20):
        """Waits until something listens."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection((self.address, PORT), timeout=1):
                return
            assert self.process.poll() is None, f"ggml-rpc-server ended:\n{self.log}"
            time.sleep(0.05)
        raise AssertionError(f"{self.endpoint} does not listen:\n{self.log}")

    @property
    def log(self):
        return self.log_path.read_text(errors="replace")

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def cut(self):
        """Takes the cable out."""
        assert self.isolated and _ip("link", "set", self.outside, "down").returncode == 0

    def plug(self):
        """Puts the cable in again."""
        assert _ip("link", "set", self.outside, "up").returncode == 0

    def close(self):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.kill()
        if self.isolated:
            _ip("link", "del", self.outside)
            _ip("netns", "del", self.name)


def read(sock, size):
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionError("closed")
        data += piece
    return data


def connect(endpoint, timeout=30):
    host, _, port = endpoint.partition(":")
    return socket.create_connection((host, int(port)), timeout=timeout)


def ask(sock, command, payload=b""):
    """Sends a command and returns its answer; the number of heartbeats in front of it is in ask.heartbeats."""
    sock.sendall(struct.pack("<BQ", command, len(payload)) + payload)
    ask.heartbeats = 0
    while (size := struct.unpack("<Q", read(sock, 8))[0]) == BUSY:
        ask.heartbeats += 1
    return read(sock, size)


class Proxy:
    """Stands in front of an RPC server on this machine, and answers some of the commands in its place.

    answers: by command a function that gets the payload and the server's way to answer, a function without arguments;
    it returns the answer, or None to close the connection.
    """

    def __init__(self, machine, answers):
        self.machine, self.answers = machine, answers
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.listener.close()

    def _serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), client, connect(self.machine.endpoint, timeout=None) as server:
                try:
                    self._pass_on(client, server)
                finally:  # close() would wait for the thread that reads
                    for sock in (client, server):
                        with contextlib.suppress(OSError):
                            sock.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, client, server):
        lock = threading.Lock()  # nothing of ours in the middle of the server's

        def back():
            with contextlib.suppress(OSError):
                while size := read(server, 8):
                    (n,) = struct.unpack("<Q", size)
                    data = b"" if n == BUSY else read(server, n)
                    if self.diverted is not None:
                        self.diverted.append(data)
                        self.event.set()
                        continue
                    with lock:
                        client.sendall(size + data)
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

        self.diverted, self.event = None, threading.Event()
        thread = threading.Thread(target=back, daemon=True)
        thread.start()
        while True:
            head = read(client, 9)
            command, size = struct.unpack("<BQ", head)
            payload = read(client, size)
            answer = self.answers.get(command)
            if answer is None:
                server.sendall(head + payload)
                continue

            def real(head=head, payload=payload):
                self.diverted = []
                self.event.clear()
                server.sendall(head + payload)
                self.event.wait(60)
                found, self.diverted = self.diverted[0], None
                return found

            found = answer(payload, real, client)
            if found is None:
                return
            with lock:
                client.sendall(struct.pack("<Q", len(found)) + found)
