# SPDX-License-Identifier: MIT
"""Caches of tbq types on other machines: real RPC servers, each with an address of its own, and a real model."""

import concurrent.futures
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import types

import pytest

import tbq
from llama_tools import ENV, GREEDY, LAYERS, THREADS, Server, n_bytes, number, python_text, run
from rpc_net import BUSY, HELLO, SUPPORTS_OP, TBQ_HELLO, Machine, Proxy, ask, connect, namespaces_allowed, read
from tbq.kv_cache import devices

PROMPT = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"
TYPES = ("-ctk", "tbq4_0", "-ctv", "tbq3_0")
#: seconds without a sign of a server after which it counts as lost (tbq-rpc.h), and what a busy machine adds
LOST, SLACK = 20, 12


@pytest.fixture(scope="module")
def isolated():
    """Whether servers are in network namespaces."""
    return namespaces_allowed()


@pytest.fixture(scope="module")
def machines(bin_dir, isolated, tmp_path_factory):
    """A function that starts servers on the first N machines, if they do not run."""
    folder, made = tmp_path_factory.mktemp("rpc"), []

    def get(count):
        while len(made) < count:
            made.append(Machine(bin_dir, len(made) + 1, folder / f"{len(made) + 1}.log", isolated).start())
        return made[:count]

    yield get
    for machine in made:
        machine.close()


@pytest.fixture(scope="module")
def centered(bin_dir, demo_model, tmp_path_factory):
    """Options of a cache with centered keys and exact rows."""
    folder = tmp_path_factory.mktemp("center")
    text = python_text(folder / "topics.txt")
    args = ("-f", text, "-c", 512, "--chunks", 1, "-o", folder / "center.gguf", *THREADS)
    run(bin_dir / "llama-cache-center", "-m", demo_model, *args)
    return (*TYPES, "--cache-center", folder / "center.gguf", "--cache-recent", 32, "--cache-first", 4)


def rpc(machines):
    return "--rpc", ",".join(machine.endpoint for machine in machines)


def buffers(log, what):
    """MiB of the first such buffer that llama.cpp logs on each RPC device, in the order of its log."""
    found = {}
    for name, size in re.findall(rf"RPC\d\[(\S+)\] +{what} buffer size = +([\d.]+) MiB", log):
        found.setdefault(name, float(size))
    return list(found.values())


# -- the same as on one machine --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def divergence(bin_dir, demo_model, centered, tmp_path_factory):
    """The divergence and the perplexity of a centered cache with exact rows, from an f16 cache on this machine."""
    folder = tmp_path_factory.mktemp("kld")
    size = ("-c", 256, "-b", 256, "--chunks", 1, "-fa", "on", "-nr", *THREADS)
    base = ("--kl-divergence-base", folder / "f16.logits", *size)
    program = bin_dir / "llama-perplexity"
    run(program, "-m", demo_model, "-f", python_text(folder / "topics.txt"), *base)

    def get(*args):
        done = run(program, "-m", demo_model, "--kl-divergence", *base, *centered, *args)
        text = done.stdout + done.stderr
        return number(r"Mean +KLD", text), number(r"Mean PPL\(Q\)", text)

    return get


def test_divergence_is_that_of_one_machine(divergence, machines):
    """Every layer's rows are written, attended to and corrected by the same kernels, wherever they lie."""
    here = divergence("-ngl", 0)
    assert 0.001 < here[0] < 0.5
    for count in (2, 3):
        there = divergence(*rpc(machines(count)))
        assert there == pytest.approx(here, rel=0.02), count


def test_text_slots_shift_and_states(bin_dir, demo_model, centered, machines, tmp_path):
    """Two slots, a context shift, and a slot that is saved, overwritten and restored: all as on one machine."""
    args = (*centered, "-nr", "-fa", "on", "--context-shift", "--no-kv-unified", "--slot-save-path", tmp_path)

    def texts(log, *where):
        with Server(bin_dir, demo_model, tmp_path / log, *args, *where, n_ctx=512, slots=2) as server:
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                both = list(
                    pool.map(
                        lambda slot: server.complete(("The sky is", PROMPT)[slot], n=24, id_slot=slot)["content"],
                        (0, 1),
                    )
                )
            assert server.slot("save", f"{log}.bin", 1)[0] == 200
            shifted = server.complete("The sky is blue. " * 45, n=64, id_slot=1, ignore_eos=True)["content"]
            assert "context shift" in server.log
            assert server.slot("restore", f"{log}.bin", 1)[0] == 200
            restored = server.complete(PROMPT + both[1], n=24, id_slot=1)
            assert restored["timings"]["cache_n"] > 30
            return [*both, shifted, restored["content"]], server.log

    here, _ = texts("here.log", "-ngl", 0)
    there, log = texts("there.log", *rpc(machines(2)))
    assert len(buffers(log, "KV")) == 2, "the cache is not on both machines"
    assert there[0] == here[0] and there[1] == here[1] and there[3] == here[3]
    assert there[2] == here[2] and len(there[2]) > 100
    # a slot that one machine has saved is restored on several, and the reverse
    with Server(bin_dir, demo_model, tmp_path / "moved.log", *args, *rpc(machines(2)), n_ctx=512, slots=2) as server:
        assert server.slot("restore", "here.log.bin", 1)[0] == 200
        assert server.complete(PROMPT + here[1], n=24, id_slot=1)["content"] == here[3]


def test_llama_and_server_take_servers(demo_model, centered, machines, monkeypatch):
    """tbq.llama.Llama and tbq.Server, with the same servers one after the other: the text of this process alone."""
    code = (
        "import sys, tbq.llama\n"
        "m = tbq.llama.Llama(sys.argv[1], 'tbq4_0', n_ctx=256, n_threads=2, verbose=False, **eval(sys.argv[2]))\n"
        "print(m.create_completion(sys.argv[3], max_tokens=12, temperature=0)['choices'][0]['text'])"
    )

    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    means = centered[centered.index("--cache-center") + 1]

    def text(arguments):
        done = subprocess.run(
            [sys.executable, "-c", code, demo_model, repr({"center": str(means), **arguments}), PROMPT],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=ENV,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    servers = [machine.endpoint for machine in machines(2)]
    there = text({"rpc": servers})
    assert there == text({}) and "13, 14" in there
    with tbq.Server(demo_model, "tbq4_0", center=means, rpc=servers, options=["-c", "256", "-lv", "4"]) as server:
        assert len(buffers("\n".join(server.log), "KV")) == 2
        with server._open("/completion", {"prompt": PROMPT, "n_predict": 12, "temperature": 0}) as answer:
            assert b"13, 14" in answer.read()


# -- only servers of this project -------------------------------------------------------------------------------------


def refusal(bin_dir, model, endpoint, *args):
    """Why llama-server refuses a server: the line that tbq shows.  It ends by itself, and not by a signal."""
    done = run(bin_dir / "llama-server", "-m", model, *TYPES, "--rpc", endpoint, *args, "--port", 1, ok=False)
    assert done.returncode == 1, (done.returncode, done.stderr[-2000:])
    server = tbq.Server(model, "tbq4_0", center=False, rpc=endpoint, options=[*map(str, args), "-c", "256"])
    with pytest.raises(tbq.TBQError) as error, server:
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_servers_are_refused(bin_dir, demo_model, machines):
    server = machines(1)[0]

    def another_version(payload, real, client):
        answer = bytearray(real())
        answer[8:12] = struct.pack("<I", 9)  # the version of the format
        return bytes(answer)

    with Proxy(server, {TBQ_HELLO: lambda *_: None}) as stock:  # what upstream's server does
        line = refusal(bin_dir, demo_model, stock.endpoint)
        assert f"{stock.endpoint} is not an RPC server of ggml-tbq" in line
        code = (
            "import sys, tbq, tbq.llama\n"
            "try: tbq.llama.Llama(sys.argv[1], rpc=sys.argv[2])\n"
            "except tbq.TBQError as e: print(e)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, demo_model, stock.endpoint], capture_output=True, text=True, timeout=120
        )
        with pytest.raises(tbq.TBQError) as error:
            tbq.plan(demo_model, rpc=stock.endpoint)
        assert (
            done.stdout.strip() == str(error.value) and line.endswith(str(error.value)) and len(str(error.value)) > 40
        )
    with Proxy(server, {TBQ_HELLO: another_version}) as other:
        assert re.search(r"version 9\.\d+\.\d+\.\d+ of the format", refusal(bin_dir, demo_model, other.endpoint))
    with Proxy(server, {HELLO: lambda *_: b"\x01" + bytes(27)}) as old:
        assert "version mismatch" in refusal(bin_dir, demo_model, old.endpoint)
    with Proxy(server, {HELLO: lambda *_: b"HTTP/1.1 400"}) as web:
        assert "does not answer like an RPC server" in refusal(bin_dir, demo_model, web.endpoint)
    assert "Failed to connect" in refusal(bin_dir, demo_model, "127.0.0.1:1")
    for wrong in ("127.0.0.1", "127.0.0.1:0", "a:b", "127.0.0.1:1,127.0.0.1:1"):
        with pytest.raises(tbq.TBQError, match=r"HOST:PORT|twice"):
            tbq.Server(demo_model, rpc=wrong)


def test_a_device_without_the_operations_is_refused(bin_dir, demo_model, machines):
    """The server says what its device can do, and not the client."""
    asked = []

    def no_attention(payload, real, client):
        # after the device: rpc_tensor with id, type, buffer, ne, nb and the operation
        (operation,) = struct.unpack_from("<I", payload, 4 + 8 + 4 + 8 + 16 + 16)
        types = {struct.unpack_from("<I", payload, 4 + i * TENSOR + 8)[0] for i in range(11)}
        asked.append(operation)
        return struct.pack("<Q", 0) if 644 in types else real()

    TENSOR = 8 + 4 + 8 + 16 + 16 + 4 + 64 + 4 + 80 + 8 + 8 + 8 + 64 + 4
    with Proxy(machines(1)[0], {SUPPORTS_OP: no_attention}) as proxy:
        line = refusal(bin_dir, demo_model, proxy.endpoint)
    assert re.search(r"RPC0 has no attention for a cache of tbq4_0 keys", line)
    assert 5 < len(asked) < 150, "operations of all layers are asked for once"


def hello(endpoint):
    """A connection after both handshakes, as a client of this project opens it."""
    sock = connect(endpoint)
    assert len(ask(sock, HELLO, bytes(24))) == 28
    own = b"tbq-rpc\0" + struct.pack("<IIII16s", 1, 1, 0, 0, b"test")
    answer = ask(sock, TBQ_HELLO, own)
    assert answer[:8] == b"tbq-rpc\0"
    return sock, answer


def greet(endpoint):
    """The same with the right versions."""
    sock, answer = hello(endpoint)
    sock.close()  # the server has closed its side, too: the versions were others
    sock = connect(endpoint)
    ask(sock, HELLO, bytes(24))
    assert ask(sock, TBQ_HELLO, answer) == answer
    return sock


def tensor(type_id, ne=(64, 1, 1, 1), nb=(34, 34, 34, 34), op=0, src=(), id=1):
    """An rpc_tensor."""
    head = struct.pack("<QIQ4I4II", id, type_id, 0, *ne, *nb, op) + bytes(64 + 4)
    return head + struct.pack("<10Q", *src, *[0] * (10 - len(src))) + bytes(8 + 8 + 8 + 64 + 4)


def closes(endpoint, command, payload):
    """Whether the server closes the connection after a command, and then serves the next client."""
    with greet(endpoint) as sock:
        sock.sendall(struct.pack("<BQ", command, len(payload)) + payload)
        with pytest.raises((ConnectionError, OSError)):
            read(sock, 8)
    greet(endpoint).close()
    return True


def operation(build_dir, name):
    """The number of an operation of ggml."""
    header = (build_dir / "llama.cpp-src" / "ggml" / "include" / "ggml.h").read_text(encoding="utf-8")
    return re.findall(r"GGML_OP_\w+", header.partition("enum ggml_op {")[2]).index(f"GGML_OP_{name}")


def test_tensors_from_the_network_are_checked(build_dir, machines):
    """Types, rows and sources that no kernel could read end the connection, not the server."""
    machine = machines(1)[0]
    size = len(tensor(0))
    get_alloc_size = 13
    for bad in (
        tensor(4000),  # no such type
        tensor(643 - 43),  # a gap between upstream's types and ours
        tensor(648),  # what is inside of a dot product
        tensor(644, ne=(63, 1, 1, 1)),
        tensor(644, nb=(0, 34, 34, 34)),
        tensor(645, nb=(1, 68, 68, 68)),
    ):
        assert closes(machine.endpoint, get_alloc_size, struct.pack("<I", 0) + bad + bytes(10 * size))
    graph_compute = 10
    row, f32 = (64, 1, 1, 1), tensor(0, nb=(4, 256, 256, 256), id=2)
    wide = tensor(0, (128, 1, 1, 1), (4, 512, 512, 512), id=3)
    for bad in (
        (tensor(0, row, (4, 256, 256, 256), operation(build_dir, "FLASH_ATTN_EXT")),),
        (tensor(644, op=operation(build_dir, "SET_ROWS"), src=(3, 2)), f32, wide),
        (tensor(644, op=operation(build_dir, "SET_ROWS"), src=(2, 2, 0, 3)), f32, wide),
        (tensor(644, op=operation(build_dir, "SET_ROWS"), src=(2, 2, 0, 0, 0, 2, 2)), f32),
        (tensor(645, nb=(68, 68, 68, 68), op=operation(build_dir, "CONCAT"), src=(2, 2)), f32),
    ):
        graph = struct.pack("<IIQI", 0, 1, 1, len(bad)) + b"".join(bad)
        assert closes(machine.endpoint, graph_compute, graph)
    assert machine.process.poll() is None
    assert machine.log.count("invalid sources of graph node") == 5
    with greet(machine.endpoint) as sock:
        answer = ask(sock, get_alloc_size, struct.pack("<I", 0) + tensor(644) + bytes(10 * size))
        assert struct.unpack("<Q", answer)[0] == n_bytes("tbq4_0", 64)


# -- servers that are lost ---------------------------------------------------------------------------------------------


def test_lost_servers(bin_dir, demo_model, centered, isolated, tmp_path):
    """Killed, hung or cut off in the middle of an answer: an error within the time that the guide states, the server
    goes on, and a slot that was saved before can be restored after a restart.  All at once, because each waits."""
    ways = {"killed": (Machine.kill, 2), "hangs": (lambda m: m.signal(signal.SIGSTOP), LOST)}
    if isolated:
        ways["cut off"] = (Machine.cut, LOST)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        slow = pool.submit(_slow_server_is_not_lost, bin_dir, demo_model, tmp_path)
        runs = {
            name: pool.submit(
                _lose, bin_dir, demo_model, centered, isolated, tmp_path / name.replace(" ", "-"), 10 + i, *way
            )
            for i, (name, way) in enumerate(ways.items())
        }
        for name, done in runs.items():
            done.result(), name
        slow.result()
    if not isolated:
        pytest.skip("network namespaces are not allowed here: a server that is cut off was not tested")


def _lose(bin_dir, model, centered, isolated, folder, index, lose, seconds):
    folder.mkdir()
    args = (*centered, "-fa", "on", "--slot-save-path", folder)
    machines = [Machine(bin_dir, index + 10 * i, folder / f"{i}.log", isolated).start() for i in range(2)]
    try:
        with Server(bin_dir, model, folder / "1.log", *args, *rpc(machines), n_ctx=1024) as server:
            text = server.complete(PROMPT, n=16)["content"]
            assert server.slot("save", "slot.bin")[0] == 200
            timer = threading.Timer(1, lose, [machines[1]])
            timer.start()
            start = time.monotonic()
            long = {"prompt": "Once", "n_predict": 900, "ignore_eos": True, "temperature": 0}
            status, answer = server.request("/completion", long)
            timer.join()
            assert status >= 400 and "error" in answer, answer
            assert time.monotonic() - start - 1 < seconds + SLACK
            start = time.monotonic()
            status, answer = server.request("/completion", {"prompt": PROMPT, "n_predict": 4})
            assert status >= 400 and time.monotonic() - start < SLACK
            assert server.slot("save", "broken.bin")[0] >= 400 and not (folder / "broken.bin").exists()
            assert server.process.poll() is None
            assert re.search(r"RPC server \S+ was lost", server.log)
        if lose is Machine.cut:  # the server gives its client up, too, and serves the next one
            machines[1].plug()
            with connect(machines[1].endpoint, timeout=LOST + SLACK) as sock:
                assert len(ask(sock, HELLO, bytes(24))) == 28
        else:
            machines[1].close()
            machines[1] = Machine(bin_dir, index + 20, folder / "2.log", isolated).start()
        with Server(bin_dir, model, folder / "again.log", *args, *rpc(machines), n_ctx=1024) as server:
            assert server.slot("restore", "slot.bin")[0] == 200
            again = server.complete(PROMPT + text, n=8)
            assert again["timings"]["cache_n"] > 30
    finally:
        for machine in machines:
            machine.close()


def _slow_server_is_not_lost(bin_dir, model, folder):
    """An answer that takes longer than the limit is waited for while heartbeats come."""
    machine = Machine(bin_dir, 60, folder / "slow.log", False).start()
    waited = threading.Event()

    def slow(payload, real, client):
        if not waited.is_set():
            waited.set()
            for _ in range(5):
                time.sleep(5)
                client.sendall(struct.pack("<Q", BUSY))
        return real()

    try:
        with greet(machine.endpoint) as sock:  # the server's own heartbeats, while it waits for the rest of a command
            sock.sendall(struct.pack("<BQ", 6, 1 << 20))
            assert struct.unpack("<Q", read(sock, 8))[0] == BUSY
        get_tensor = 8
        with Proxy(machine, {get_tensor: slow}) as proxy:
            done = run(
                bin_dir / "llama-completion", "-m", model, "-p", PROMPT, "-n", 4, "-c", 256, "-no-cnv",
                "--no-display-prompt", *TYPES, *THREADS, *GREEDY, "--rpc", proxy.endpoint, "--no-warmup",
            )  # fmt: skip
            assert waited.is_set() and "13" in done.stdout
    finally:
        machine.close()


# -- the plan ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loud(bin_dir, isolated, tmp_path_factory):
    """Three servers that print the size of each buffer."""
    folder = tmp_path_factory.mktemp("loud")
    made = [
        Machine(bin_dir, 40 + i, folder / f"{i}.log", isolated).start(environment={"GGML_RPC_DEBUG": "1"})
        for i in range(3)
    ]
    yield made
    for machine in made:
        machine.close()


@pytest.mark.parametrize(
    "mode,shares",
    [("layer", None), ("layer", [3, 1]), ("layer", [1, 2, 2]), ("tensor", None), ("tensor", [2, 1, 1])],
    ids=str,
)
def test_plan_is_what_is_allocated(bin_dir, demo_model, loud, tmp_path, mode, shares):
    """The sizes of the buffers that the servers allocate, and of those that the client logs."""
    machines = loud[: len(shares or [0, 0])]
    given = {
        "tensor_split": shares,
        "split_mode": mode,
        "context": 1024,
        "parallel": 1,
        "pairs": [("tbq4_0", "tbq3_0")],
    }
    if shares:
        given["devices"] = ["1G"] * len(shares)
    else:
        given["rpc"] = [machine.endpoint for machine in machines]
    plan = tbq.plan(demo_model, recent=32, first=4, **given)
    packed = tbq.plan(demo_model, recent=0, first=0, **given).pair("tbq4_0", "tbq3_0")
    pair = plan.pair("tbq4_0", "tbq3_0")
    assert sum(pair.by_device) == pair.bytes and sum(packed.by_device) == packed.bytes < pair.bytes
    assert all(device.memory and device.memory > 1 << 28 for device in plan.devices)
    assert all(plan.fits_on(i, pair) for i in range(len(machines)))

    before = [len(machine.log) for machine in machines]
    kind = ("--tensor-split", ",".join(map(str, shares))) if shares else ()
    args = (*TYPES, "-sm", mode, "--cache-recent", 32, "--cache-first", 4, "-fit", "off", *rpc(machines), *kind)
    with Server(bin_dir, demo_model, tmp_path / "log", *args, n_ctx=1024) as server:
        log = server.log
    for i, machine in enumerate(machines):
        allocated = {int(n) for n in re.findall(r"\[alloc_buffer\] device: 0, size: (\d+) ", machine.log[before[i] :])}
        exact = pair.by_device[i] - packed.by_device[i]
        assert {plan.devices[i].weights_bytes, packed.by_device[i]} - {0} <= allocated, (i, allocated)
        # a CPU pads each tensor of the exact rows, of which each layer has two, to 32 bytes; the others need no padding
        assert any(exact <= n < exact + 2 * LAYERS * 32 for n in allocated), (exact, allocated)
    if mode == "layer":
        assert buffers(log, "KV") == pytest.approx([n / 2**20 for n in packed.by_device if n], abs=0.006)
        assert buffers(log, "model") == pytest.approx([d.weights_bytes / 2**20 for d in plan.devices], abs=0.006)


def test_architectures_without_a_split_of_tensors(build_dir, demo_model):
    """The list is that of the pinned llama.cpp, and the plan refuses what it refuses."""
    source = (build_dir / "llama.cpp-src" / "src" / "llama-arch.cpp").read_text(encoding="utf-8")
    names = dict(re.findall(r'\{ *(LLM_ARCH_\w+), *"([^"]+)" *\}', source))
    body = source[source.index("bool llm_arch_supports_sm_tensor") :]
    listed = {names[name] for name in re.findall(r"case (LLM_ARCH_\w+)", body[: body.index("return false")])}
    assert listed == devices._NOT_BY_TENSORS
    shape = types.SimpleNamespace(architecture="olmo2", layers=())
    with pytest.raises(tbq.TBQError, match="no split of tensors for architecture 'olmo2'"):
        devices.distribute(["a", "b"], [1, 1], shape, {}, 1, "tensor", None, None)
    for shares in ([float("nan"), 1], [float("inf"), 1]):
        with pytest.raises(tbq.TBQError, match="not all of them 0"):
            tbq.plan(demo_model, devices="1G,1G", tensor_split=shares)


def test_an_empty_list_of_servers_is_refused(demo_model):
    """What an unset variable of a shell leaves."""
    for make in (tbq.Server, tbq.plan):
        with pytest.raises(tbq.TBQError, match="RPC server '' is not HOST:PORT"):
            make(demo_model, rpc="")


def test_a_client_that_was_stopped_goes_on(bin_dir, demo_model, machines, tmp_path):
    """Ctrl-Z and fg: a blocked call of the network is interrupted then, and the server is not lost."""
    args = (*rpc(machines(1)), "-fa", "on")
    with Server(bin_dir, demo_model, tmp_path / "log", *args, n_ctx=512) as server:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            long = {"prompt": "Once", "n_predict": 300, "ignore_eos": True, "temperature": 0}
            answer = pool.submit(server.request, "/completion", long)
            for _ in range(20):
                time.sleep(0.1)
                server.process.send_signal(signal.SIGSTOP)
                time.sleep(0.02)
                server.process.send_signal(signal.SIGCONT)
            assert answer.result()[0] == 200 and not answer.result()[1].get("error")
        assert "was lost" not in server.log


def test_a_server_listens_on_ipv4_only():
    done = subprocess.run(
        [sys.executable, "-m", "tbq", "rpc-server", "--host", "::1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "host '::1' has no IPv4 address" in done.stderr
