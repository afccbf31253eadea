# SPDX-License-Identifier: MIT
"""`tbq bench recall` where the package is not installed: a GPU that is borrowed, with a llama-server built there.

    python3 bench/recall.py build/bin/llama-server model.gguf out/names --tasks names --types q4_0,tbq4_0 --chat \
        -- -ngl 99 -fa on

Writes OUT.txt, OUT.json and, with matplotlib, OUT.png; also what is finished when it is stopped by Ctrl-C or SIGTERM.
Needs NumPy and tqdm.
"""

import argparse
import importlib
import pathlib
import signal
import sys
import types

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "python" / "tbq"


def recall_module():
    """tbq.bench.recall, without the package's own __init__, which wants the compiled module."""
    package = sys.modules["tbq"] = types.ModuleType("tbq")
    package.__path__ = [str(PACKAGE)]
    version = sys.modules["tbq._version"] = types.ModuleType("tbq._version")
    version.__version__, version.FORMAT_VERSION = "source", 0
    return importlib.import_module("tbq.bench.recall")


def numbers(of):
    return lambda value: [of(x) for x in value.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out")
    parser.add_argument("--tasks", default="needle,names")
    parser.add_argument("--types", default="q8_0,q4_0,tbq4_0,tbq4_0/tbq3_0,tbq3_0,tbq2_0")
    parser.add_argument("--lengths", type=numbers(int), default=[4096])
    parser.add_argument("--depths", type=numbers(float), default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--passage", type=int, default=256)
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    given, options = sys.argv[1:], []
    if "--" in given:
        given, options = given[: given.index("--")], given[given.index("--") + 1 :]
    args = parser.parse_args(given)

    recall = recall_module()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = recall.measure(
        args.model,
        args.types.split(","),
        args.tasks.split(","),
        args.lengths,
        args.depths,
        args.samples,
        args.seed,
        args.text.read_text(encoding="utf-8") if args.text else None,
        options,
        args.chat,
        args.passage,
        recall.other_server(args.server, args.model),
        sys.stderr.isatty(),
    )
    identity = {"model": args.model.name, "text": args.text.name if args.text else "Python's language reference"}
    text = recall.as_text(report, identity)
    print(text, *(f"{kind}: {why}" for kind, why in report.failures.items()), sep="\n")
    pathlib.Path(f"{args.out}.txt").write_text(text + "\n", encoding="utf-8")
    pathlib.Path(f"{args.out}.json").write_text(recall.as_json(report, identity), encoding="utf-8")
    try:
        picture = recall.picture(report, args.model.name, "png")
    except ImportError:
        return
    pathlib.Path(f"{args.out}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
