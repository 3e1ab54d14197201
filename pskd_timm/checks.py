"""What `train` would refuse, found out before any run is started."""

from .methods.build import make_method
from .optim import make_optimizer
from .progress import Display
from .recipe import Recipe
from .run.graph import check_recordable
from .tasks import open_task
from .teacher import BASELINE


def check_recipe(recipe: Recipe, methods: tuple[str, ...], display: Display) -> dict[str, str]:
    """The fingerprint of the data, which are read on the way, so that no run has to wait.

    Raises InputError where `train` would, for each of `methods`.
    """
    for method in methods:
        recipe.check_method(method)
    task = open_task(recipe, display.advance)
    network = task.network()
    task.check(network, 1)
    make_optimizer(network, recipe.optim)
    for method in methods:
        of_method = recipe.model_copy(update={"method": method})
        if of_method.method_section.trained_teacher == BASELINE:
            continue  # the teacher is trained first, from this very recipe
        taught = make_method(of_method, network)
        taught.check(network, task.num_classes)
        if recipe.model.compile == "graphs":
            check_recordable(taught)
    return task.fingerprint
