"""Tests run offline, on one thread and without a GPU, with every cache in a temporary folder.

What the suite claims to the bit or of several processes is of the CPU. The claims of a GPU stand in test_gpu.py, which runs where
PSKD_TIMM_TEST_GPU is set.
"""

import os
import shutil
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", OMP_NUM_THREADS="1")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="pskd_timm-tests-")  # which its libraries read when they are imported
# Where these are set they go before HF_HOME.
os.environ.update({f"HF_{name.upper()}_CACHE": f"{os.environ['HF_HOME']}/{name}" for name in ("hub", "datasets")})
os.environ.update({} if "PSKD_TIMM_TEST_GPU" in os.environ else {"CUDA_VISIBLE_DEVICES": ""})

import pytest
import torch

from commands import forkserver

collect_ignore = [] if "PSKD_TIMM_TEST_GPU" in os.environ else ["test_gpu.py"]
torch.set_num_threads(1)
forkserver()  # what the first test to start it would leave out, all processes after it would import anew


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    os.environ.update(PSKD_TIMM_CACHE=str(folder / "decoded"), MPLCONFIGDIR=str(folder / "mpl"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The recipe and the result of a finished PS-KD run: three epochs, a held-out part, the two newest checkpoints.

    For all that only look at one; who changes its folder takes a copy.
    """
    from pskd_timm import load_recipe, train

    settings = {
        "epochs": 3,
        "threads": 1,
        "data.limit_train": 250,
        "data.limit_test": 100,
        "data.holdout_fraction": 0.2,
        "model.kwargs": {"width": 4, "drop_rate": 0.1},
        "checkpoint.keep": 2,
        "output_dir": str(tmp_path_factory.mktemp("finished")),
    }
    recipe = load_recipe("digits", settings)
    return recipe, train(recipe)


@pytest.fixture
def tiny(tmp_path):
    """A recipe of a few CPU seconds: digits, 300 of them, two epochs; overrides as on the command line."""
    from pskd_timm import load_recipe

    def recipe(**overrides):
        settings = {
            "epochs": 2,
            "batch_size": 64,
            "threads": 1,
            "data.limit_train": 300,
            "data.limit_test": 100,
            "data.gaussian_noise": 0.2,
            "augment.crop_padding": 1,
            "optim.lr": 0.05,
            "model.kwargs": {"width": 8},
            "model.channels_last": False,  # as networks that tests train by other means
            "output_dir": str(tmp_path / "runs"),
            "tracking.log_every": 1,
        }
        return load_recipe("digits", settings | {key.replace("__", "."): value for key, value in overrides.items()})

    return recipe
