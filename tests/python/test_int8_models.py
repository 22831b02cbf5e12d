"""The models of bench/int8_models.py: well formed, and small ones of their kinds keep the guard's promise in int8."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from halfstep import InferencePrecisionOptimizer
from torch import nn

pytest.importorskip("sklearn")

CPU = torch.device("cpu")
THRESHOLD = 0.02


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    return from_bench("int8_model_zoo")


def from_bench(name: str) -> ModuleType:
    folder = str(Path(__file__).parents[2] / "bench")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize(
    ("name", "millions"),
    # torchvision's models have 11.69 and 2.54 million with 1000 classes and 3 channels.
    [("resnet18", 11.18), ("mobilenet", 1.53), ("vit", 1.81), ("lstm", 0.286)],
)
def test_a_model_has_its_size_and_gives_ten_logits(zoo: ModuleType, name: str, millions: float) -> None:
    recipe = zoo.RECIPES[name]
    model = recipe.build().eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    images, _ = zoo.digits(recipe.size)
    with torch.no_grad():
        logits = model(images[:2])
        assert logits.shape == (2, 10)
        assert torch.allclose(model(images[1:2]), logits[1:], atol=1e-4)  # samples do not see each other


def test_digits_are_scaled_up_and_split(zoo: ModuleType) -> None:
    images, labels = zoo.digits(32)
    assert images.shape == (1797, 1, 32, 32) and labels.shape == (1797,)
    assert sum(len(labels) for _, labels in zoo.calibration(32)) <= zoo.TRAINED_ON
    assert zoo.right(Always(3), 32, CPU).float().mean() == (labels[zoo.TRAINED_ON :] == 3).float().mean()


class Always(nn.Module):
    """Gives one class."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.eye(10)[self.label].expand(len(x), 10)


def test_trained_weights_are_kept(zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.RECIPES, "tiny", zoo.Recipe(lambda: zoo.Lstm(8, 16), 16, 1, 1e-3))
    first = zoo.trained("tiny", CPU, tmp_path)
    monkeypatch.setattr(zoo, "train", None)
    again = zoo.trained("tiny", CPU, tmp_path)
    images, _ = zoo.digits(16)
    assert torch.equal(first(images[:9]), again(images[:9]))


@pytest.mark.parametrize("kind", ["vit", "lstm", "mobilenet"])
def test_a_small_model_keeps_the_promise_on_digits_it_never_saw(zoo: ModuleType, kind: str) -> None:
    build, epochs = {
        "vit": (lambda: zoo.ViT(64, 2, 16, 4), 8),
        "lstm": (lambda: zoo.Lstm(64, 16), 8),
        "mobilenet": (lambda: zoo.MobileNetV3Small(5), 8),
    }[kind]
    model = zoo.train(build(), 16, epochs, 4e-3, CPU)
    before = zoo.right(model, 16, CPU)
    assert before.float().mean() > 0.8  # it has learned something that int8 could destroy
    optimizer = InferencePrecisionOptimizer(accuracy_threshold=THRESHOLD, speed_guard=False, progress=False)
    int8 = optimizer.optimize_for_inference(model, zoo.calibration(16), "cpu")
    report = optimizer.report()
    assert report["kept"] and report["bound"] <= THRESHOLD
    assert report["result"] == "int8", optimizer.explain()
    lost = before.float() - zoo.right(int8, 16, CPU).float()
    noise = 2 * lost.std().item() / math.sqrt(len(lost))
    assert lost.mean() <= THRESHOLD + noise
    assert report["bytes"]["int8"] < report["bytes"]["float32"]


def test_the_sentence_encoder_ignores_padding_and_ranks_by_the_cosine() -> None:
    sentences = from_bench("int8_sentences")
    model = sentences.SentenceEncoder(64, 2, 4, 100).eval()
    texts = [[5, 6, 7], [8, 9, 10, 11, 12], [3]]
    with torch.no_grad():
        together = model(*sentences.padded(texts, 9))
        alone = torch.cat([model(*sentences.padded([text])) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)
    vectors = torch.eye(4)[:, :3]
    assert sentences.ranks(vectors[:3], vectors[:3]).tolist() == [1, 1, 1]
    documents = vectors[:3] + torch.tensor([[0.0], [0.3], [0.2]])
    assert sentences.ranks(vectors[[1, 0, 2]], documents).tolist() == [3, 2, 1]


def test_sentences_come_from_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = from_bench("int8_sentences")
    first, rest = "Copy the file to a place that exists.", "What lies there is lost, unless it is a folder."
    (tmp_path / "test").mkdir()
    for path, query in (("a.py", first), ("b.py", first), ("test/c.py", "Another" + first)):
        (tmp_path / path).write_text(f'def f():\n    """{query}\n\n    {rest}\n    """\n')
    (tmp_path / "short.py").write_text('"""Too short. To be of use."""\n')
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.setattr(sentences.sysconfig, "get_path", lambda _: str(tmp_path))
    assert sentences.docstrings() == [(first, rest)]
