# SPDX-License-Identifier: MIT
"""`make demo` and `make serve`.

python -m tbq.cli.demo --cache DIR            ask one question, print the answer, stop the server
python -m tbq.cli.demo --cache DIR --serve    run the server until Ctrl-C
"""

import argparse
import pathlib
import sys

from tbq.demo import demo, fetch_model, serve
from tbq.errors import TBQError, one_line
from tbq.programs.signals import interruptible
from tbq.serving.address import check_port, free_port


def main() -> None:
    """Runs the demo.  An error ends the process with a line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m tbq.cli.demo", description="llama-server with a tbq4_0 cache")
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for the model")
    parser.add_argument("--port", type=int, help="port (a free one, 8080 with --serve)")
    parser.add_argument("--serve", action="store_true", help="run the server until Ctrl-C")
    parser.add_argument("--ui", type=pathlib.Path, help="folder of the built web UI, with --serve")
    args = parser.parse_args()
    try:
        with interruptible():
            port = args.port or (8080 if args.serve else free_port())
            check_port(port)
            model = fetch_model(args.cache)
            if args.serve:
                serve(model, port, args.ui)
            else:
                demo(model, port)
    except (TBQError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")


if __name__ == "__main__":
    main()
