"""What keeps a fine-tuned encoder from the teacher in transfer: the direction of its embeddings, or their length?

Run:  python benchmarks/transfer_gap.py outputs/eurosat        (after `make run EXPERIMENT=eurosat`)

For each mask and encoder: test accuracy of the head in service, the same after giving each embedding the length the
teacher has on the complete image (an oracle), the ratio of lengths, and the cosine similarity.
"""

import sys
from pathlib import Path

import pandas as pd
import torch

from bandmask import datasets, encoders, masking
from bandmask.batches import Batches
from bandmask.classification import train_heads
from bandmask.training import Compute
from bandmask.views import View, embed_batches


def main() -> None:
    folder, compute = Path(sys.argv[1]), Compute.of("cpu")
    pack = datasets.open_dataset("eurosat")
    teacher, _ = encoders.load_encoder(folder / "encoder")
    test = Batches(pack, "test", image_size=64)
    nothing, zeros = masking.MaskSpec(), torch.zeros(13)
    complete, labels = embed_batches(View(teacher, nothing, zeros), test, compute)
    heads, _ = train_heads(View(teacher, nothing, zeros, 64), pack, passes=10, compute=compute)
    length = complete.norm(dim=1, keepdim=True)
    fill = masking.fill_values("dataset_mean", torch.tensor(pack.band_means()))

    def accuracy(embeddings: torch.Tensor) -> float:
        return 100 * float((heads(embeddings).argmax(-1) == labels).float().mean())

    rows = []
    for path in sorted(folder.glob("*/encoder-seed*")):
        student, card = encoders.load_encoder(path)
        spec = masking.MaskSpec(tuple(card.mask["bands"]))
        for name, model in (("pre-trained", teacher), (path.name, student)):
            found, _ = embed_batches(View(model, spec, fill, 64), test, compute)
            rows.append(
                {
                    "mask": path.parent.name,
                    "encoder": name,
                    "accuracy": accuracy(found),
                    "with the teacher's length": accuracy(found / found.norm(dim=1, keepdim=True) * length),
                    "length ratio": float((found.norm(dim=1, keepdim=True) / length).mean()),
                    "cosine": float(torch.cosine_similarity(found, complete).mean()),
                }
            )
    print(pd.DataFrame(rows).drop_duplicates(["mask", "encoder"]).round(3).to_markdown(index=False))


if __name__ == "__main__":
    main()
