"""Every shipped recipe: its network is built and takes a training step. Every kept result: its tables are built again."""

from pathlib import Path

import pytest
import torch

from pskd_timm import METHODS, Batch, load_recipe, report
from pskd_timm.models.build import create_model
from pskd_timm.optim import make_optimizer
from pskd_timm.recipe_files import shipped_recipes

IMAGES = [name for name in shipped_recipes() if not name.startswith("translation/")]


@pytest.mark.parametrize("name", IMAGES)
def test_every_recipes_network_takes_a_step_of_its_method_and_learns_from_first_to_last(name):
    recipe = load_recipe(name, {"data.path": "my_images"} if name == "custom" else None)
    torch.manual_seed(0)
    model = create_model(recipe.model, 7, (32, 32)).train()
    section = getattr(recipe, recipe.method).model_dump()
    method = METHODS[recipe.method].from_section(section)
    method.setup(num_samples=4, num_classes=7, num_epochs=recipe.epochs, device="cpu")
    method.begin_epoch(0, torch.arange(4))
    optimizer = make_optimizer(model, recipe.optim)
    weights = list(model.parameters())
    first, last = weights[0].clone(), model.get_classifier().weight.clone()
    images = torch.randn(4, 3, 32, 32)
    loss, logits = method.loss(model, Batch(images, torch.arange(4), torch.arange(4), images.flip(0)))
    loss.backward()
    optimizer.step()
    method.end_epoch()
    assert logits.shape == (4, 7) and loss.isfinite()
    assert not torch.equal(first, weights[0]) and not torch.equal(last, model.get_classifier().weight)


RESULTS = Path(__file__).parent.parent / "recipes/results"
KEPT = sorted({path.parents[2] for path in RESULTS.rglob("seed*/result.json")})


@pytest.mark.parametrize("folder", KEPT, ids=[str(folder.relative_to(RESULTS)) for folder in KEPT])
def test_every_kept_result_builds_its_tables_again(folder, tmp_path):
    found = report(folder, tmp_path)
    assert len(found.rows) == len(list(folder.rglob("seed*/result.json"))) and (found.rows.status == "finished").all()
    assert found.rows[found.metrics[0].name].notna().all() and (tmp_path / "report.html").is_file()
