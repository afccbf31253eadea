# SPDX-License-Identifier: MIT
"""docs/tour.ipynb runs from top to bottom, and what it shows is true."""

import base64
import re
import sys

import pytest

from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbformat, nbclient, ipykernel and matplotlib")
nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbformat, nbclient, ipykernel and matplotlib")
kernelspec = pytest.importorskip(
    "ipykernel.kernelspec", reason="the notebook needs nbformat, nbclient, ipykernel and matplotlib"
)
pytest.importorskip("matplotlib", reason="the notebook needs nbformat, nbclient, ipykernel and matplotlib")

TOUR = ROOT / "docs" / "tour.ipynb"


def read():
    return nbformat.read(TOUR, as_version=4)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, demo_model):
    """All printed text and the pictures, from a kernel of this interpreter in an empty folder."""
    folder, home = tmp_path_factory.mktemp("tour"), tmp_path_factory.mktemp("jupyter")
    kernelspec.write_kernel_spec(
        home / "kernels" / "tbq-tour", overrides={"argv": kernelspec.make_ipkernel_cmd(executable=sys.executable)}
    )
    (folder / "models").symlink_to(demo_model.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(home))
        patch.setenv("OMP_WAIT_POLICY", "passive")  # the machine may be busy
        done = nbclient.NotebookClient(
            read(), timeout=300, kernel_name="tbq-tour", resources={"metadata": {"path": str(folder)}}
        ).execute()
    assert [path.name for path in folder.iterdir()] == ["models"]
    shown = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in shown if output.output_type == "stream" and output.name == "stdout")
    return text, [
        base64.b64decode(output.data["image/png"]) for output in shown if "image/png" in output.get("data", {})
    ]


def test_pictures(outputs):
    assert len(outputs[1]) == 4 and all(
        picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in outputs[1]
    )


def test_gaussian_after_the_rotation(outputs):
    before, after = (float(x) for x in re.findall(r"^keys(?:, rotated)?: kurtosis ([\d.]+)$", outputs[0], re.M))
    assert before > 6 and abs(after - 3) < 0.5  # 10.8 and 2.68 with Python 3.11's text


def test_distortion_is_between_the_bounds(outputs):
    """The distortion of a Gaussian is also less than that of Lloyd-Max with the vector's length as the scale."""
    lloyd_max = {2: 0.1175, 3: 0.03454, 4: 0.009497}
    found = {
        what: {int(b): float(d) for b, d in re.findall(r"(\d): ([\d.]+)", lost)}
        for what, lost in re.findall(r"^(random|keys|values) \{(.*)\}$", outputs[0], re.M)
    }
    assert list(found) == ["random", "keys", "values"]
    for what, lost in found.items():
        assert list(lost) == [2, 3, 4]
        assert all(4.0**-b < d < 2.72 * 4.0**-b for b, d in lost.items()), (what, lost)
    assert all(d < lloyd_max[b] for b, d in found["random"].items())


def test_cosines_and_answer(outputs):
    mean = [float(x) for x in re.findall(r"^tbq\d_0: mean cosine ([\d.]+)", outputs[0], re.M)]
    assert len(mean) == 3 and 0.9 < mean[0] < mean[1] < mean[2] < 1 and mean[2] > 0.99
    assert "Paris" in outputs[0] and re.search(r"^54\.2 MiB for 8192 tokens; f16 would take 180\.0$", outputs[0], re.M)


def test_recall(outputs):
    """f16 finds the number in every text, and four bits lose little."""
    rows = re.findall(r"(?m)^\| (\S+) \| all \| 6 \| ([\d.]+) \|.*\| (-?[\d.]*) \| [^|]* \|$", outputs[0])
    assert [row[0] for row in rows] == ["f16", "tbq4_0", "tbq2_0"]
    assert float(rows[0][1]) == 100 and float(rows[1][2]) < 0.2


def test_kept_without_outputs():
    for cell in read().cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
