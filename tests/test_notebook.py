"""The notebook, run from top to bottom in a kernel of its own."""

import base64
import io
import json

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from commands import LIMIT
from pskd_timm import Result
from pskd_timm.recipe_files import SHIPPED
from pskd_timm.reports.plots import COLOURS
from pskd_timm.run.folder import read_result

NOTEBOOK = SHIPPED / "compare_methods.ipynb"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder it ran in, and its executed cells by the heading they stand under."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # A cell that raises ends the execution with its traceback.
    NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(folder)}}).execute()
    cells, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            heading = cell.source.splitlines()[0].lstrip("# ")
        elif cell.cell_type == "code":
            cells.setdefault(heading, []).append(cell)
    return folder, cells


def finished(run_dir):
    return Result(run_dir, read_result(run_dir))


def text(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def picture(cell):
    found = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return Image.open(io.BytesIO(base64.b64decode(found[-1]))).convert("RGBA")


def test_it_trains_two_methods_and_draws_their_curves_while_it_does(done):
    folder, cells = done
    (cell,) = cells["Train, and watch"]
    shown = [output for output in cell.outputs if output.output_type == "display_data"]
    assert len(shown) == 1  # redrawn, not repeated
    colours = {
        f"#{r:02X}{g:02X}{b:02X}" for _, (r, g, b, opaque) in picture(cell).getcolors(1_000_000) if opaque == 255
    }
    assert {COLOURS["baseline"], COLOURS["pskd"]} <= colours
    for method in ("baseline", "pskd"):
        assert len(finished(folder / f"runs/notebook/{method}/seed0").history) == 6


def test_its_metrics_are_the_runs_own(done):
    folder, cells = done
    shown = cells["Look at the metrics"][0].outputs[-1].data["text/html"]
    for method in ("baseline", "pskd"):
        last = finished(folder / f"runs/notebook/{method}/seed0").last
        assert all(f"{last[name]:.2f}" in shown for name in ("top1_error", "nll", "ece", "aurc"))
    assert (folder / "runs/notebook/report.html").is_file()
    assert all(picture(cell).width > 200 for cell in cells["Look at the calibration"])


def test_it_stops_a_run_and_resumes_it_in_the_next_cell(done):
    folder, cells = done
    stopped, resumed = cells["Stop and resume"]
    assert text(stopped) == "stopped\n" and "cskd, seed 0" in resumed.outputs[-1].data["text/html"]
    history = finished(folder / "runs/notebook/cskd/seed0").history
    assert [line["epoch"] for line in history] == list(range(1, 7))


def test_its_own_loop_learns_and_two_processes_train_together(done):
    folder, cells = done
    loop, store = cells["PS-KD in a loop of your own"]
    assert "epoch 5: loss " in text(loop) and "α 0.80" in text(loop)
    assert store.outputs[0].data["text/plain"].splitlines()[0].split()[-1] == "label"
    assert "2 processes, error " in text(cells["Several processes"][0])


def test_it_is_stored_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert max(cell["source"].count("\n") for cell in cells) < 30
