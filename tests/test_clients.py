# SPDX-License-Identifier: MIT
"""The recipes of docs/guide/clients.md, each run as the page has it, against `tbq serve` on the demo model.

A recipe whose package is missing is skipped, and says so. `python -m pip install --group clients` installs them all.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from llama_tools import ENV
from tbq.serving.address import free_port
from test_serve import Serve

PAGE = ROOT / "docs" / "guide" / "clients.md"
NODE_MODULES = ROOT / "build" / "node" / "node_modules"


def recipes():
    """(section, number of the block in it) -> (language, code)."""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        name = section.partition("\n")[0]
        blocks = re.findall(r"^```(python|sh|js)\n(.*?)^```$", section, re.M | re.S)
        found |= {(name, i): block for i, block in enumerate(blocks)}
    return found


RECIPES = recipes()

PARIS = r"Paris"
# recipe -> the package that it needs, and what it prints
EXPECTED = {
    ("curl", 0): ("", PARIS),
    ("openai, Python", 0): ("openai", PARIS),
    ("openai, Python", 1): ("openai", PARIS),
    ("openai, Python", 2): ("openai", r"^\{'city': '[^']*', 'country': '(France|Italy)'\}$"),
    ("openai, Python", 3): ("openai", r"^get_weather \{'city': 'Paris'\}$"),
    ("openai, Python", 4): ("openai", r"^501 .*does not support embeddings"),
    ("openai, Node", 0): ("openai of Node", PARIS),
    ("LangChain, with the server", 0): ("langchain_openai", rf"{PARIS}[^\0]*Rome"),
    ("LangChain, in this process", 0): ("langchain_community", PARIS),
    ("LlamaIndex", 0): ("llama_index.llms.openai_like", rf"{PARIS}[^\0]*Rome"),
    ("LiteLLM", 0): ("litellm", PARIS),
    ("llm", 0): ("llm", PARIS),
    ("From Python, without a client", 0): ("", rf"{PARIS}[^\0]*'k_type': 'tbq4_0', 'v_type': 'tbq4_0', 'cells': 8192"),
}


SERVER = RECIPES.pop(("The server", 0))[1]


def test_every_block_is_run():
    assert RECIPES.keys() == EXPECTED.keys()


def serve(model, *options):
    """The page's command."""
    tbq, name, *arguments = shlex.split(SERVER.replace("model.gguf", str(model)))
    assert (tbq, name) == ("tbq", "serve")
    return Serve(*arguments, "--port", free_port("127.0.0.1"), "-t", 2, "--no-warmup", *options)


@pytest.fixture(scope="module")
def server(demo_model):
    with serve(demo_model) as running:
        yield running.until("llama-server is up")


@pytest.fixture
def server_with_tools(demo_model, build_dir):
    """With a chat template that has tools, which the demo model's has not."""
    template = build_dir / "llama.cpp-src" / "models" / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja"
    with serve(demo_model, "--chat-template-file", template) as running:
        yield running.until("llama-server is up")


def test_how_to_see_the_cache(server):
    assert next(line for line in server.out if line.startswith("tbq: cache: ")) in PAGE.read_text(encoding="utf-8")


def missing(package):
    if package == "openai of Node":
        if not shutil.which("node"):
            return "no node"
        return "" if (NODE_MODULES / "openai").is_dir() else "no openai: npm install --prefix build/node openai"
    try:
        found = not package or importlib.util.find_spec(package)
    except ModuleNotFoundError:  # a package around it
        found = None
    return "" if found else f"no {package}: python -m pip install --group clients"


@pytest.mark.parametrize("recipe", EXPECTED, ids=lambda recipe: f"{recipe[0]} {recipe[1]}")
def test_recipe(recipe, request, demo_model, tmp_path):
    package, expected = EXPECTED[recipe]
    if reason := missing(package):
        pytest.skip(reason)
    language, code = RECIPES[recipe]
    if "http://127.0.0.1:8080" in code:
        out = request.getfixturevalue("server_with_tools" if "tools=" in code else "server").out
        url = next(re.search(r"is up: (\S+);", line)[1] for line in out if "is up: " in line)
        code = code.replace("http://127.0.0.1:8080", url)
    else:
        assert '"model.gguf"' in code
        code = code.replace('"model.gguf"', json.dumps(str(demo_model)))
    if language == "python":
        command = [sys.executable, "-c", code]
    elif language == "sh":
        if not shutil.which("curl") and code.startswith("curl"):
            pytest.skip("no curl")
        command = ["sh", "-ec", code]
    else:
        (tmp_path / "recipe.mjs").write_text(code, encoding="utf-8")
        (tmp_path / "node_modules").symlink_to(NODE_MODULES)
        command = ["node", "recipe.mjs"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        # folders of their own for what clients keep, and the programs of this environment
        env={
            **ENV,
            "HOME": str(tmp_path),
            "LLM_USER_PATH": str(tmp_path),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.search(expected, done.stdout, re.M), done.stdout[-2000:] + done.stderr[-2000:]
    if recipe[0] == "LangChain, in this process":  # what the page says of the log
        assert re.search(r"llama_kv_cache: size = .* K \(tbq4_0\): .* V \(tbq4_0\): ", done.stderr)
