"""A second task for the tests: synthetic sentences whose every token is a target, and a ten-line network."""

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from pskd_timm import Batch
from pskd_timm.metrics import METRICS, Metric, Outcomes
from pskd_timm.order import epoch_order, even_slice, num_batches
from pskd_timm.outcomes import Predictions
from pskd_timm.tasks import TASKS, UNREAD

NUM_SENTENCES, LONGEST, NUM_CLASSES, BATCH = 23, 5, 7, 5
UNREAD["sequences"] = {"augment": None, "translation": None}
TASKS["sequences"] = f"{__name__}:SequenceTask"


def sentences():
    """Tokens int64 [n, L], which of them count [n, L], and the rows [n, L] of those in all training targets."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(NUM_CLASSES, (NUM_SENTENCES, LONGEST), generator=generator)
    lengths = torch.randint(1, LONGEST + 1, (NUM_SENTENCES,), generator=generator)
    mask = torch.arange(LONGEST) < lengths[:, None]
    return tokens, mask, (mask.flatten().cumsum(0) - 1).view_as(mask)


class Tagger(nn.Module):
    """Says of each token that counts what stands there, from it and from its place: (tokens, mask) in, logits [T, K] out."""

    num_classes = NUM_CLASSES

    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(NUM_CLASSES, 8), nn.Embedding(LONGEST, 8)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, inputs):
        tokens, mask = inputs
        return self.head((self.token(tokens) + self.place.weight).tanh())[mask]


class Batches:
    """Sentences shared out over ranks; a rank's share has as many targets as it happens to have tokens."""

    def __init__(self, seed, rank, world_size):
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.tokens, self.mask, self.places = sentences()
        self.steps = num_batches(NUM_SENTENCES, BATCH, world_size)

    def whole(self, epoch):
        return epoch_order(NUM_SENTENCES, self.seed, epoch).split(BATCH)[: self.steps]

    def rank_batches(self, epoch):
        return [ids[even_slice(len(ids), self.rank, self.world_size)] for ids in self.whole(epoch)]

    def rows(self, batches):
        return torch.cat([self.places[ids][self.mask[ids]] for ids in batches] or [torch.empty(0, dtype=torch.int64)])

    def batches(self, batches, epoch, grad_accum_steps):
        for ids in batches:
            mask = self.mask[ids]
            yield [Batch((self.tokens[ids], mask), self.tokens[ids][mask], self.places[ids][mask])]

    def global_size(self, epoch, step):
        return int(self.mask[self.whole(epoch)[step]].sum())

    def rows_renewed(self, epoch):
        return int(self.mask.sum())

    def close(self):
        """Nothing reads ahead."""


class SequenceTask:
    counts = "tokens"
    metrics = (Metric("token_accuracy", "token accuracy", "%", 1, higher_is_better=True), METRICS["nll"])
    splits = ("test",)
    num_classes = NUM_CLASSES
    fingerprint = {"contents": "0"}

    def __init__(self, recipe, progress=None):
        self.seed = recipe.seed
        tokens, mask, _ = sentences()
        self.labels, self.num_rows = tokens[mask], int(mask.sum())

    def network(self):
        torch.manual_seed(self.seed)
        return Tagger()

    def check(self, network, world_size):
        pass

    def loader(self, network, device, rank, world_size, partners):
        return Batches(self.seed, rank, world_size)

    @torch.no_grad()
    def evaluate(self, network, split, final=False, progress=None, rows_in=None):
        tokens, mask, _ = sentences()
        logits = network.eval()((tokens, mask))
        found, probabilities = logits.argmax(1) == self.labels, logits.softmax(1)
        nll = F.cross_entropy(logits, self.labels, reduction="none").double()
        return TokenPredictions(Outcomes(probabilities.amax(1), found, found, nll), self.labels, logits.argmax(1))

    def save(self, network, folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), folder / "model.safetensors")

    def load(self, folder):
        network = Tagger()
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return network

    def describe(self):
        names = [f"token {k}" for k in range(NUM_CLASSES)]
        counts = {"num_train": self.num_rows, "num_test": self.num_rows, "num_holdout": 0}
        return counts | {"num_classes": NUM_CLASSES, "class_names": names}

    def examples(self, split, rows):
        return [f"target {row}" for row in rows.tolist()]


class TokenPredictions(Predictions):
    def score(self):
        each = self.outcomes
        return {"token_accuracy": 100 * each.correct.double().mean().item(), "nll": each.nll.mean().item()}
