"""Two trained adapters, mixed: AdapterFusion on top of adapters that learned the same task from different articles.

Prints the accuracy of each adapter alone and of the fusion on articles none of them saw, and draws which adapter each
layer listens to (runs/fusion/weights.png). About two minutes on two cores. Run it: python examples/fusion.py
"""

import lightning.pytorch as L
from two_tasks import TextModule, accuracy, articles, batches

from lightning_peft import PEFT, AdapterFusion, Pfeiffer, fusion_weights, load_adapter, save_adapter


def fit(module, method, rows, epochs):
    """A short training run."""
    L.seed_everything(0)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=epochs, callbacks=[PEFT(method)], **options).fit(module, batches(rows))


def draw(weights, path):
    """A heat map: layers down, adapters across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(next(iter(weights.values())))
    table = [[row[n] for n in names] for row in weights.values()]
    figure, axes = plt.subplots(figsize=(3.5, 4))
    image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(table)), [f"layer {i}" for i in range(len(table))])
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    figure.colorbar(image, label="attention weight (mean)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(folder="runs/fusion", epochs=3, part=40):
    """Train on the first two parts, fuse on the third, test on the fourth."""
    parts = [list(articles(part * (i + 1), part * i)) for i in range(4)]
    test, files = batches(parts[3]), {}
    for name, rows in (("first", parts[0]), ("second", parts[1])):
        module = TextModule()
        fit(module, Pfeiffer(modules_to_save=["head"]), rows, epochs)
        files[name] = f"{folder}/{name}.safetensors"
        save_adapter(module, files[name])

    found = {}
    for name, path in files.items():
        module = TextModule()
        load_adapter(module, path)
        found[name] = accuracy(module, test)
    module = TextModule(lr=5e-4)
    fit(module, AdapterFusion(files, modules_to_save=["head"]), parts[2], epochs)
    with fusion_weights(module) as weights:
        found["fusion"] = accuracy(module, test)
    draw(weights, f"{folder}/weights.png")
    print(", ".join(f"{name}: {value:.3f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
